"""The command's connection options: the sources of a token, and TLS."""

from pathlib import Path

import grpc
import pytest
import trustme
from command_runs import Command
from fake_dash_server import FakeDashServer

from dash_client.cli import main


def test_the_token_comes_from_a_file_or_the_environment(
    server: FakeDashServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    monkeypatch.setenv("DASH_TOKEN", "from-the-environment")
    command("info")
    command("info --token-file", str(file))
    sent = [metadata.get("authorization") for metadata in server.metadata]
    assert sent == ["Bearer from-the-environment"] * 2 + ["Bearer from-a-file"] * 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), (b"\n", "is empty"), (b"two secrets", "token"), (b"secret" * 9999, "more than a token")],
    ids=["none", "empty", "two words", "long"],
)
def test_a_wrong_token_file_is_one_line_that_does_not_quote_it(
    server: FakeDashServer, command: Command, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    err = command("health --token-file", str(file), code=2).err
    assert expected in err
    assert "secret" not in err
    assert err.count("\n") == 1


def test_a_token_on_the_command_line_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["--token", "secret"], ["--token=secret"], ["--token"]):
        with pytest.raises(SystemExit) as caught:
            main(["health", *line])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert "can be read by every user" in err
        assert "DASH_TOKEN" in err
        assert "secret" not in err


def test_tls_is_checked_against_the_given_authority(tmp_path: Path, command: Command) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    own = authority.issue_cert("somebody@example.org")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "own.pem")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    options = ["--ca-file", str(tmp_path / "ca.pem"), "--certificate-file", str(tmp_path / "own.pem")]
    with FakeDashServer(credentials=credentials) as server:
        health = ["health", "--target", server.target, "--timeout", "10"]
        command("", *health, "--tls", *options, "--key-file", str(tmp_path / "key.pem"))
        command("", *health, "--tls", code=3)
        assert "missing.pem" in command("", *health, "--ca-file", str(tmp_path / "missing.pem"), code=2).err
