"""TLS, tokens, limits and addresses, over real sockets; and that secrets stay secret."""

import asyncio
import signal
from pathlib import Path

import grpc
import psutil
import pytest
import trustme
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from dash_api.v1 import model_pb2
from dash_server.listening import ListenError, is_loopback
from tests.server.authority import Authority
from tests.server.refusals import refusal
from tests.server.server_harness import (
    RunningServer,
    bearer,
    fake_model,
    generation_request,
    open_channel,
    running_server,
    server_process,
    write_tokens,
)
from tests.server.test_server_process import wait_until_serving

TOKEN = "a-token-nobody-may-see"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return write_tokens(tmp_path, ann=TOKEN)


async def code_of_unary(channel: grpc.aio.Channel) -> grpc.StatusCode:
    call = channel.unary_unary("/dash_api.v1.ModelService/GetModel")(b"", timeout=5)
    return await call.code()


async def test_tls_serves_those_who_trust_it_and_nobody_in_plain_text(model_folder: Path, authority: Authority) -> None:
    credentials = authority.credentials()
    async with running_server(fake_model(model_folder), credentials=credentials, **authority.settings()) as server:
        assert (await server.generate(text="abc", max_new_tokens=3)).output.text == "abc"
        for other in (None, grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())):
            async with open_channel(server.port, other) as channel:
                assert await code_of_unary(channel) is grpc.StatusCode.UNAVAILABLE
        assert await server.is_serving()


async def test_only_clients_with_a_certificate_get_in_where_one_is_asked_for(
    model_folder: Path, authority: Authority
) -> None:
    options = {**authority.settings(), "tls_client_ca_file": authority.ca_file, "max_requests_per_caller": 1}
    model = fake_model(model_folder, token_seconds=0.005)
    async with running_server(model, credentials=authority.credentials("ann"), **options) as server:
        call = server.stream(text="abc", max_new_tokens=900)
        await call.read()
        assert (await refusal(server.generate(text="abc", max_new_tokens=1))).reason == "CALLER_LIMIT"
        # Another certificate is another caller. Without one, or with another authority's, there is no connection.
        async with open_channel(server.port, authority.credentials("bob")) as channel:
            other = RunningServer(server.server, server.worker, server.port, channel)
            assert (await other.generate(text="abc", max_new_tokens=1)).output.text == "a"
        for credentials in (authority.credentials(), authority.credentials("ann", issuer=trustme.CA())):
            async with open_channel(server.port, credentials) as channel:
                assert await code_of_unary(channel) is grpc.StatusCode.UNAVAILABLE
        call.cancel()


async def test_a_renewed_certificate_is_used_and_a_broken_one_is_not(
    model_folder: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dash_server.watched_files._SECONDS_BETWEEN_LOOKS", 0)

    async def serial_number() -> int:
        return (await asyncio.to_thread(_served_certificate, server.port, authority)).serial_number

    credentials = authority.credentials()
    async with running_server(fake_model(model_folder), credentials=credentials, **authority.settings()) as server:
        first = await serial_number()
        authority.renew()
        second = await serial_number()
        assert second != first
        authority.key.write_text("not a key")
        assert await serial_number() == second
        assert await serial_number() == second
        assert caplog.text.count("the certificate stays as it was") == 1
        authority.renew()
        assert await serial_number() not in (first, second)
        assert await server.is_serving()


def _served_certificate(port: int, authority: Authority):  # type: ignore[no-untyped-def]
    import ssl

    from cryptography import x509

    return x509.load_pem_x509_certificate(
        ssl.get_server_certificate(("localhost", port), ca_certs=str(authority.ca_file)).encode()
    )


async def test_calls_without_a_token_are_refused_but_for_health(model_folder: Path, token_file: Path) -> None:
    options = {"token_file": token_file, "channelz": True}
    async with running_server(fake_model(model_folder), **options) as server:
        assert await server.is_serving()
        assert (await server.generate(token=TOKEN, text="abc", max_new_tokens=3)).output.text == "abc"
        answer = await server.model.GetModel(model_pb2.GetModelRequest(), metadata=bearer(TOKEN))
        assert answer.name == "fake"
        reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        channelz = channelz_pb2_grpc.ChannelzStub(server.channel)
        for token in (None, "another-token-of-nobody"):
            metadata = bearer(token)
            calls = [
                server.generation.Generate(generation_request(text="a"), metadata=metadata),
                server.model.GetModel(model_pb2.GetModelRequest(), metadata=metadata),
                server.model.GetPolicy(model_pb2.GetPolicyRequest(), metadata=metadata),
                server.model.Tokenize(model_pb2.TokenizeRequest(text="a"), metadata=metadata),
                channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=metadata),
                # Without a request: grpcio's client says INTERNAL if it writes one when the call has just ended.
                reflection.ServerReflectionInfo(metadata=metadata),
            ]
            for call in calls:
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
            assert (await refusal(server.generate(token=token, text="a"))).reason == "UNAUTHENTICATED"
        servers = await channelz.GetServers(channelz_pb2.GetServersRequest(), metadata=bearer(TOKEN))
        assert servers.server


async def test_channelz_is_off_unless_asked_for(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder)) as server:
        call = channelz_pb2_grpc.ChannelzStub(server.channel).GetServers(channelz_pb2.GetServersRequest())
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_too_much_metadata_is_refused_and_the_connection_goes_on(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), max_metadata_bytes=4096) as server:
        call = server.model.GetModel(model_pb2.GetModelRequest(), metadata=(("x-noise", "a" * 8000),))
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await server.is_serving()


async def test_a_prompt_over_the_limit_is_refused_by_field(model_folder: Path) -> None:
    async with running_server(fake_model(model_folder), max_prompt_tokens=10) as server:
        assert (await server.generate(text="a" * 10, max_new_tokens=1)).output.text == "a"
        refused = await refusal(server.generate(text="a" * 11, max_new_tokens=1))
        assert refused.message == "parameters.prompt: has 11 tokens, and 10 are accepted"


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False)],
)
def test_loopback_is_what_other_machines_do_not_reach(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected


async def test_other_machines_are_served_only_with_tls_or_when_told_so(
    model_folder: Path, authority: Authority
) -> None:
    model = fake_model(model_folder)
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ListenError, match="DASH_ALLOW_PLAINTEXT"):
            async with running_server(model, host=host):
                pass
    async with running_server(model, host="0.0.0.0", allow_plaintext=True) as server:
        assert await server.is_serving()
    credentials = authority.credentials()
    async with running_server(model, host="::", credentials=credentials, **authority.settings()) as server:
        assert await server.is_serving()


def test_a_token_is_in_no_log_argument_or_environment_of_a_process(
    tmp_path: Path, model_folder: Path, token_file: Path
) -> None:
    options = {"token_file": token_file, "log_level": "DEBUG"}
    with server_process(tmp_path, model=fake_model(model_folder), **options) as server:
        port = server.wait_for_port()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            wait_until_serving(channel)
            call = channel.unary_unary("/dash_api.v1.ModelService/GetModel")
            call(b"", metadata=bearer(TOKEN), timeout=5)
            with pytest.raises(grpc.RpcError):
                call(b"", metadata=bearer("wrong" + TOKEN), timeout=5)
        for process in (main := psutil.Process(server.process.pid), *main.children(recursive=True)):
            assert TOKEN not in " ".join(process.cmdline())
            assert TOKEN not in str(process.environ())
        code, stderr = server.end(signal.SIGTERM)
    assert code == 0
    assert TOKEN not in stderr
