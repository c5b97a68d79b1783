"""A start that cannot succeed ends with one line that says why, and an exit code. The command runs in this process."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from dash_server.main import main
from tests.server.server_harness import FAKE_WORKER, fake_model

pytestmark = pytest.mark.usefixtures("root_logger_as_it_was")

CERTIFICATE, KEY, AUTHORITY = "{folder}/chain.pem", "{folder}/key.pem", "{folder}/ca.pem"
GARBAGE = "{folder}/garbage"
OWN = {"tls_certificate_file": CERTIFICATE, "tls_key_file": KEY}
NOT_A_PAIR = "not a certificate and its key in PEM"

WRONG_STARTS: dict[str, tuple[dict[str, str], str]] = {
    "certificate without a key": (
        {"tls_certificate_file": CERTIFICATE},
        "DASH_TLS_KEY_FILE: is required with DASH_TLS_CERTIFICATE_FILE",
    ),
    "authority without a certificate": (
        {"tls_client_ca_file": AUTHORITY},
        "DASH_TLS_CERTIFICATE_FILE: is required with DASH_TLS_CLIENT_CA_FILE",
    ),
    "key of another certificate": (OWN | {"tls_key_file": "{folder}/other.key"}, NOT_A_PAIR),
    "certificate that is none": (OWN | {"tls_certificate_file": GARBAGE}, NOT_A_PAIR),
    "authority that is none": (
        OWN | {"tls_client_ca_file": GARBAGE},
        "with the authorities in {folder}/garbage",
    ),
    "key that is not there": (OWN | {"tls_key_file": "/no/such/file"}, "DASH_TLS_KEY_FILE"),
    "tokens that are no text": ({"token_file": GARBAGE}, f"{GARBAGE} is not UTF-8"),
    "address that others reach": ({"host": "0.0.0.0"}, "DASH_HOST: other machines reach 0.0.0.0"),
    "host that nobody has": ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
    "port in use": ({"port": "{port}"}, "cannot listen on 127.0.0.1, port {port}: Address already in use"),
    "metrics port in use": (
        {"metrics_port": "{port}"},
        "DASH_METRICS_PORT: cannot listen on 127.0.0.1, port {port}: Address already in use",
    ),
    "metrics that others reach": (
        {"metrics_port": "0", "metrics_host": "0.0.0.0"},
        "DASH_METRICS_HOST: other machines reach 0.0.0.0, ",
    ),
    "model folder that is elsewhere": (
        {"model": "fake?folder=/elsewhere"},
        "DASH_MODEL and DASH_CACHE_FOLDER must be folders that all machines share",
    ),
    "no tokenizer": ({"model": "fake?folder={folder}"}, "There is no file {folder}/tokenizer.json."),
    "refusal of the worker": ({"model": "fake?startup_failed=nothing is there"}, "nothing is there"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A folder with certificates, a key of another one and what is neither; and a port in use."""
    folder = tmp_path_factory.mktemp("wrong")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    for name, blob in (
        ("ca.pem", authority.cert_pem),
        ("chain.pem", issued.cert_chain_pems[0]),
        ("key.pem", issued.private_key_pem),
        ("other.key", authority.issue_cert("localhost").private_key_pem),
    ):
        blob.write_to_path(folder / name)
    (folder / "garbage").write_bytes(b"\0\xff secret")
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield {"folder": folder, "port": other.getsockname()[1]}


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> int:
    """Runs `dash-server` with the fake worker until it ends by itself; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["dash-server", *arguments])
    for name, value in {"port": "0", "log_level": "ERROR", **variables}.items():
        monkeypatch.setenv(f"DASH_{name.upper()}", value)
    return main(FAKE_WORKER)


@pytest.mark.parametrize("case", WRONG_STARTS)
def test_what_is_wrong_is_one_line(
    model_folder: Path,
    places: dict[str, object],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variables, words = WRONG_STARTS[case]
    given = {name: value.format(**places) for name, value in variables.items()}
    assert run_command(monkeypatch, **{"model": fake_model(model_folder), **given}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dash-server: ")
    assert words.format(**places) in line
    assert "secret" not in line


def test_what_cannot_be_prepared_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "--prepare", model="fake?startup_failed=nothing is there") == 2
    assert capsys.readouterr().err == "dash-server: nothing is there\n"


@pytest.mark.parametrize("behaviour", ["die_at_start", "die_when_ready"])
def test_a_worker_that_keeps_dying_before_a_first_token_ends_the_server(
    model_folder: Path, behaviour: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dash_server.worker.link._FIRST_RESTART_DELAY_SECONDS", 0.01)
    assert run_command(monkeypatch, model=fake_model(model_folder, **{behaviour: 1})) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("dash-server: "))
    assert "the worker died 5 times in a row before it gave a token" in line
