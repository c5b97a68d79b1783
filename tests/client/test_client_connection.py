"""Targets, TLS, tokens and keepalive of a client, and the settings that it refuses."""

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from client_colours import COLOURS, open_client
from fake_dash_server import FakeDashServer, free_port

from dash_client import AsyncDashClient, DashClient, Generation, InvalidArgumentError, UnavailableError
from dash_client.channel import channel_options, resolve_target
from dash_server.listening import channel_options as server_options
from dash_server.settings import Settings

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_credentials(authority: trustme.CA, *, asks_clients: bool = False) -> grpc.ServerCredentials:
    leaf = authority.issue_cert("localhost", "dash.example")
    pair = leaf.private_key_pem.bytes(), leaf.cert_chain_pems[0].bytes()
    roots = authority.cert_pem.bytes() if asks_clients else None
    return grpc.ssl_server_credentials([pair], roots, asks_clients)


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("dash.example:50051", "dns:///dash.example:50051"),
        ("localhost:50051", "dns:///localhost:50051"),
        (" dash_1:5 ", "dns:///dash_1:5"),
        ("10.0.0.1:50051", "10.0.0.1:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("dns:///dash.example:50051", "dns:///dash.example:50051"),
        ("dns://10.0.0.1/dash.example:50051", "dns://10.0.0.1/dash.example:50051"),
        ("unix:/run/dash.sock", "unix:/run/dash.sock"),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", "ipv4:10.0.0.1:1,10.0.0.2:1"),
    ],
)
def test_a_name_is_looked_up_and_may_stand_for_several_servers(target: str, address: str) -> None:
    resolved = resolve_target(target)
    assert (resolved.name, resolved.address) == (target.strip(), address)
    config = json.loads(str(dict(channel_options(resolved, 3))["grpc.service_config"]))
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]


NO_PORTS: list[Any] = ["localhost", "localhost:", ":50051", "localhost:0", "localhost:65536", "localhost:port"]
NO_HOSTS: list[Any] = ["two words:1", "a:1:2", "::1:50051", "host/path:1", "http://localhost:1", "ftp://localhost:1"]


@pytest.mark.parametrize("target", [*NO_PORTS, *NO_HOSTS, 7, b"localhost:1"])
def test_a_target_that_is_none_is_refused_at_once(target: Any) -> None:
    for kind in (DashClient, AsyncDashClient):
        with pytest.raises(InvalidArgumentError, match="target"):
            kind(target)


def test_the_server_takes_the_clients_pings() -> None:
    ours = dict(channel_options(resolve_target(None), 3))
    theirs = dict(server_options(Settings()))
    assert int(ours["grpc.keepalive_time_ms"]) >= theirs["grpc.http2.min_ping_interval_without_data_ms"]
    assert theirs["grpc.keepalive_permit_without_calls"] or not ours["grpc.keepalive_permit_without_calls"]


def generate(colour: str, target: str, **options: Any) -> Generation:
    """Makes one unary call with a new client."""
    with open_client(colour, target, **options) as client:
        return client.generate("x")


@pytest.mark.parametrize("colour", COLOURS)
def test_a_client_connects_at_once_where_an_older_one_waits_to_try_again(colour: str) -> None:
    port = free_port()
    with open_client(colour, f"localhost:{port}", retries=0) as older:
        with pytest.raises(UnavailableError, match="no server"):
            older.generate("x")
        with FakeDashServer(port=port) as server:
            assert generate(colour, server.target, retries=0).text == "Hello"


@pytest.mark.parametrize("colour", COLOURS)
def test_tls_with_an_authority_of_ones_own(colour: str, authority: trustme.CA, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    with FakeDashServer(credentials=server_credentials(authority)) as server:
        for ca_file in (path, str(path), path.read_bytes()):
            assert generate(colour, server.target, ca_file=ca_file).text == "Hello"
        address = server.target.replace("localhost", "127.0.0.1")
        assert generate(colour, address, ca_file=path, server_name="dash.example").text == "Hello"


@pytest.mark.parametrize("colour", COLOURS)
def test_mutual_tls(colour: str, authority: trustme.CA, tmp_path: Path) -> None:
    mine = authority.issue_cert("me")
    certificate, key = tmp_path / "me.pem", tmp_path / "me.key"
    mine.cert_chain_pems[0].write_to_path(certificate)
    mine.private_key_pem.write_to_path(key)
    with FakeDashServer(credentials=server_credentials(authority, asks_clients=True)) as server:
        options = {"ca_file": authority.cert_pem.bytes(), "certificate_file": certificate, "key_file": key}
        assert generate(colour, server.target, **options).text == "Hello"


@pytest.mark.parametrize("colour", COLOURS)
def test_the_token_goes_with_every_call(colour: str, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(["first", "second", "third"])
    monkeypatch.delenv("DASH_TOKEN", raising=False)
    with FakeDashServer() as server:
        generate(colour, server.target)
        generate(colour, server.target, token=SECRET)
        with open_client(colour, server.target, token=lambda: next(tokens)) as client:
            client.generate("x")
            client.stream("x").final()
            client.model_info()
        monkeypatch.setenv("DASH_TOKEN", f"{SECRET}\n")
        generate(colour, server.target)
        generate(colour, server.target, token="mine")
    sent = [metadata.get("authorization") for metadata in server.metadata]
    names = [SECRET, "first", "second", "third", SECRET, "mine"]
    assert sent == [None, *(f"Bearer {name}" for name in names)]


@pytest.mark.parametrize("kind", [DashClient, AsyncDashClient])
def test_a_token_is_not_sent_where_others_can_read_it(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASH_TOKEN", raising=False)
    remote = ("dash.example:1", "10.0.0.1:1", "dns:///dash.example:1", "ipv4:10.0.0.1:1", "ipv4:127.0.0.1:1,10.0.0.1:1")
    for target in remote:
        with pytest.raises(InvalidArgumentError, match="allow_insecure_token") as caught:
            kind(target, token=SECRET)
        assert SECRET not in str(caught.value)
        with pytest.raises(InvalidArgumentError, match="allow_insecure_token"):
            kind(target, token=lambda: SECRET)
        kind(target, token=SECRET, allow_insecure_token=True)
        kind(target, token=SECRET, tls=True)
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/x", "dns:///localhost:1", "ipv4:127.0.0.1:1"):
        kind(target, token=SECRET)
    monkeypatch.setenv("DASH_TOKEN", SECRET)
    with pytest.raises(InvalidArgumentError, match="allow_insecure_token"):
        kind("dash.example:1")


@pytest.mark.parametrize("token", ["", "two words", f"{SECRET}\n", "schlüssel", 5, b"bytes"])
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(token: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="token") as caught:
        DashClient(token=token)
    assert "secret" not in str(caught.value)
    with DashClient(token=lambda: token) as client, pytest.raises(InvalidArgumentError, match="token") as caught:
        client.generate("x")
    assert "secret" not in str(caught.value)


def test_what_the_token_function_raises_is_the_users_own() -> None:
    def no_token() -> str:
        raise LookupError("the vault is shut")

    with DashClient(token=no_token) as client, pytest.raises(LookupError, match="vault"):
        client.generate("x")


def test_secrets_are_in_no_representation() -> None:
    for kind in (DashClient, AsyncDashClient):
        client: Any = kind("localhost:1", token=SECRET)
        call = client._calls.generate("x", None, {})
        shown = f"{client!r} {client._connection!r} {call!r}"
        assert SECRET not in shown
        assert "localhost:1" in shown


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"ca_file": "/no/such/file"}, "ca_file"),
        ({"ca_file": "/"}, "ca_file"),
        ({"ca_file": b"not PEM"}, "ca_file"),
        ({"ca_file": 7}, "ca_file"),
        ({"certificate_file": b"-----BEGIN CERTIFICATE-----"}, "key_file"),
        ({"key_file": b"-----BEGIN PRIVATE KEY-----"}, "certificate_file"),
        ({"tls": False, "ca_file": b"-----BEGIN CERTIFICATE-----"}, "tls"),
        ({"tls": False, "server_name": "x"}, "tls"),
        ({"tls": "yes"}, "tls"),
        ({"server_name": 1}, "server_name"),
        ({"allow_insecure_token": "yes"}, "allow_insecure_token"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        DashClient(**options)
    assert caught.value.field_violations[0].field == argument


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"no such option: tokn; there are .*token"):
        DashClient(tokn="x")  # type: ignore[call-arg]
