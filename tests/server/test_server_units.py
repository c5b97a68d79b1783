"""Settings, handlers, outboxes and statuses, without a server."""

import asyncio
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import grpc
import pytest
from google.rpc import status_pb2
from pydantic import Field, SecretStr

from dash_api.v1 import common_pb2, generation_pb2
from dash_runtime.actions import Action
from dash_runtime.config import Mode
from dash_runtime.errors import InvalidRequest
from dash_runtime.events import (
    DepthStatistics,
    EndReason,
    RequestRefused,
    SequenceFinished,
    SlotGranted,
    TokenLogprobs,
    TokenProduced,
)
from dash_server.from_pb import MODES
from dash_server.handlers import rpc_handlers
from dash_server.load_settings import SettingsError, load_settings, unknown_variables
from dash_server.request_record import RequestRecord, observed
from dash_server.settings import Settings
from dash_server.settings_table import settings_table
from dash_server.statuses import (
    CallerLimitReached,
    DeadlineTooShort,
    InvalidFields,
    QueueFull,
    ServiceError,
    ShuttingDown,
    Unauthenticated,
    WorkerUnavailable,
    failure_of,
)
from dash_server.worker.outbox import Delivery, Outbox

CUDA = {"DEVICES": "cuda:0,cuda:1"}
FINISHED = SequenceFinished("r", EndReason.LENGTH, 3, 0, 0, DepthStatistics(2, [], {}, 2.0, 0))


def test_action_and_mode_numbers_are_those_of_the_contract() -> None:
    assert {f"ACTION_{action.name}" for action in Action} == {
        name for name, number in common_pb2.Action.items() if number
    }
    assert {number: f"MODE_{mode.name}" for number, mode in MODES.items()} == {
        number: name for name, number in common_pb2.Mode.items() if number
    }
    assert set(MODES.values()) == set(Mode)


GENERATION = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]


class _Servicer:
    async def generate(self) -> None: ...


class _FullServicer(_Servicer):
    async def stream_generate(self) -> None: ...

    async def session(self) -> None: ...

    async def score(self) -> None: ...


class _OverfullServicer(_FullServicer):
    async def generate_all(self) -> None: ...


def test_every_method_of_a_service_gets_its_handler() -> None:
    handlers = rpc_handlers(GENERATION, _FullServicer())
    streams = {name: handler.response_streaming for name, handler in handlers.items()}
    assert streams == {"Generate": False, "StreamGenerate": True, "Session": True, "Score": False}
    assert all(handler.request_streaming for handler in handlers.values())  # which gRPC does not read by itself
    assert all(handler.request_deserializer is None for handler in handlers.values())


@pytest.mark.parametrize(
    ("servicer", "message"),
    [
        (_Servicer(), "dash_api.v1.GenerationService lacks _Servicer.score"),
        (_OverfullServicer(), "dash_api.v1.GenerationService has no use for _OverfullServicer.generate_all"),
    ],
)
def test_a_forgotten_or_superfluous_handler_is_named(servicer: object, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rpc_handlers(GENERATION, servicer)


def test_settings_come_from_variables_and_empty_ones_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_SLOTS", "3")
    monkeypatch.setenv("DASH_CONTEXT_LENGTH", "")
    monkeypatch.setenv("DASH_LOG_LEVEL", "debug")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    settings = load_settings()
    assert (settings.slots, settings.context_length, settings.log_level) == (3, None, "DEBUG")
    assert settings.cache_folder == Path("/somewhere/dash-llm")
    assert settings.worker_config().engine.num_slots == 3


def test_a_lone_requests_tokens_wait_for_each_other_no_longer_than_tokens_may_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for milliseconds, burst in (("25", 20), ("4", 4), ("0", 0)):
        monkeypatch.setenv("DASH_FLUSH_MILLISECONDS", milliseconds)
        assert load_settings().worker_config().engine.burst_milliseconds == burst


def test_a_ray_address_needs_ray_and_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_RAY_ADDRESS", "auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"^DASH_RAY_ADDRESS: needs `pip install 'dash-llm\[ray\]'`$"):
        load_settings()
    ray = ModuleType("ray")
    ray.__spec__ = ModuleSpec("ray", None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(SettingsError, match=r"^DASH_NUM_THREADS: is required with DASH_RAY_ADDRESS"):
        load_settings()
    monkeypatch.setenv("DASH_NUM_THREADS", "4")
    monkeypatch.setenv("DASH_WORKERS", "2-8")
    config = load_settings().worker_config(3)
    assert (config.num_threads, config.worker_number, config.num_workers) == (4, 0, 1)


def test_devices_are_a_list_or_else_the_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASH_DEVICE", "cuda:1")
    assert load_settings().worker_config().devices == ("cuda:1",)
    monkeypatch.setenv("DASH_DEVICE", "")
    monkeypatch.setenv("DASH_DEVICES", "cuda:0, cuda:1")
    settings = load_settings()
    assert settings.worker_config().devices == ("cuda:0", "cuda:1")
    assert " devices=cuda:0,cuda:1 " in settings.loggable()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PORT": "70000"}, "DASH_PORT: must be less than or equal to 65535, got '70000'"),
        ({"METRICS_PORT": "70000"}, "DASH_METRICS_PORT: must be less than or equal to 65535, got '70000'"),
        ({"SLOTS": "many"}, "DASH_SLOTS: must be a valid integer"),
        ({"PRECISION": "fp8"}, "DASH_PRECISION: must be 'bfloat16' or 'float32', got 'fp8'"),
        ({"DEFAULT_MODE": "fixed"}, "DASH_DEFAULT_MODE: must be 'full_depth', 'adaptive' or 'exact', got 'fixed'"),
        ({"DEFAULT_COMPUTE_BUDGET": "nan"}, "DASH_DEFAULT_COMPUTE_BUDGET: must be a finite number"),
        ({"POLICY_FILE": "/no/such/file"}, "DASH_POLICY_FILE: "),
        *(({"FLUSH_MILLISECONDS": wrong}, "DASH_FLUSH_MILLISECONDS: must be") for wrong in ("26", "-1", "soon", "nan")),
        ({"WORKERS": "4-2"}, "DASH_WORKERS: must be from 1 to 64"),
        ({"WORKERS": "many"}, "DASH_WORKERS: must be a number, or a range such as 2-8, got 'many'"),
        ({"RAY_ADDRESS": "ray:/x"}, "DASH_RAY_ADDRESS: must be auto, host:port or ray://host:port, got 'ray:/x'"),
        ({**CUDA, "DEVICE": "cuda"}, "DASH_DEVICES: cannot be set with DASH_DEVICE; set one of them"),
        ({**CUDA, "WORKERS": "1-2"}, "DASH_WORKERS: must be 1 with several DASH_DEVICES"),
        *(
            ({"DEVICES": names}, f"DASH_DEVICES: must be different names with commas between them, got '{names}'")
            for names in ("cuda:0,,cuda:1", "cuda:0,cuda:0")
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], line: str
) -> None:
    for name, text in variables.items():
        monkeypatch.setenv(f"DASH_{name}", text)
    with pytest.raises(SettingsError) as refusal:
        load_settings()
    (told,) = refusal.value.lines
    assert told.startswith(line)
    assert "\n" not in told


def test_every_setting_has_a_description_and_a_default() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_the_documented_settings_are_the_settings() -> None:
    assert settings_table() in (Path(__file__).parents[2] / "docs" / "settings.md").read_text()


def test_the_documented_errors_are_the_errors() -> None:
    """Each reason has a row with its code."""
    rows = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text().splitlines()
    reasons = {error.reason: error.code.name for error in ServiceError.__subclasses__()}
    for reason, code in {**reasons, "INVALID_REQUEST": "INVALID_ARGUMENT", "INTERNAL": "INTERNAL"}.items():
        assert [row for row in rows if f"| `{code}` | `{reason}` |" in row], reason


def test_secrets_are_neither_logged_nor_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithSecret(Settings):
        token: SecretStr = Field(default=SecretStr(""), max_length=8)

    monkeypatch.setenv("DASH_TOKEN", "hunter2")
    assert "hunter2" not in load_settings(WithSecret).loggable()
    monkeypatch.setenv("DASH_TOKEN", "hunter2 and more")
    with pytest.raises(SettingsError, match="DASH_TOKEN") as failure:
        load_settings(WithSecret)
    assert "hunter2" not in str(failure.value)


def test_unknown_variables_are_told_with_the_closest_setting() -> None:
    environment = {"DASH_PROT": "1", "DASH_ZZZZZZ": "1", "DASH_PORT": "1", "DASH_TARGET": "x", "PATH": "x"}
    assert unknown_variables(environment) == [
        "DASH_PROT is set, but there is no such setting; did you mean DASH_PORT?",
        "DASH_ZZZZZZ is set, but there is no such setting",
    ]


@pytest.mark.parametrize("may_share", [False, True])
async def test_an_outbox_merges_what_was_not_taken(may_share: bool) -> None:
    outbox = Outbox("r", Delivery.SHARED)
    outbox.put(SlotGranted("r", "toy", None, 0.0))
    for token_id in (1, 2, 3):
        logprobs = TokenLogprobs(-token_id, [])
        outbox.put(TokenProduced("r", token_id, bytes([token_id] * 2), logprobs), may_share=may_share)
    outbox.put(FINISHED)
    assert (await outbox.granted()).policy == "toy"
    first, last = await outbox.take(2), await outbox.take(2)
    assert (first.token_ids, first.actions, first.finished) == ([1, 2], b"\1\1\2\2", None)
    assert (last.token_ids, last.actions, last.finished) == ([3], b"\3\3", FINISHED)
    assert [entry.chosen for entry in (*first.logprobs, *last.logprobs)] == [-1, -2, -3]


async def test_an_outbox_wakes_its_reader_for_tokens_and_for_failures() -> None:
    outbox = Outbox("r")
    reader = asyncio.create_task(outbox.take(10))
    await asyncio.sleep(0)
    outbox.put(TokenProduced("r", 1))
    assert (await reader).token_ids == [1]
    reader = asyncio.create_task(outbox.take(10))
    await asyncio.sleep(0)
    outbox.fail(WorkerUnavailable("gone"))
    with pytest.raises(WorkerUnavailable):
        await reader


async def test_an_outbox_tells_of_a_refusal() -> None:
    outbox = Outbox("r")
    outbox.put(RequestRefused("r", "prompt", "is too long"))
    with pytest.raises(InvalidRequest, match="prompt: is too long"):
        await outbox.granted()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("prompt", "is bad"), grpc.StatusCode.INVALID_ARGUMENT),
        (InvalidFields([InvalidRequest("a" * 9999, "ä" * 9999)] * 5000), grpc.StatusCode.INVALID_ARGUMENT),
        (QueueFull(3, 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (CallerLimitReached("3 requests at once", 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeadlineTooShort(3.0, -1.0), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Unauthenticated("who is it?"), grpc.StatusCode.UNAUTHENTICATED),
        (ShuttingDown(), grpc.StatusCode.UNAVAILABLE),
        (WorkerUnavailable("gone"), grpc.StatusCode.UNAVAILABLE),
        (ValueError("internals"), grpc.StatusCode.INTERNAL),
        (AssertionError(), grpc.StatusCode.INTERNAL),
    ],
)
def test_statuses_agree_with_their_details_and_fit_in_a_trailer(error: Exception, code: grpc.StatusCode) -> None:
    failure = failure_of(error, "request-1")
    trailers = dict(failure.trailing_metadata)
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    assert failure.code is code
    assert (status.code, status.message) == (code.value[0], failure.message)
    assert "internals" not in failure.message
    assert len(details) * 4 / 3 + 3 * len(failure.message.encode()) < 8000
    assert ("grpc-retry-pushback-ms" in trailers) == isinstance(error, QueueFull | CallerLimitReached)


class _UncutCall:
    """The context of a call that does not end."""

    def add_done_callback(self, callback: object) -> None: ...


@pytest.mark.parametrize(
    ("seconds_left", "code"),
    [
        (None, grpc.StatusCode.CANCELLED),
        (60.0, grpc.StatusCode.CANCELLED),
        (0.01, grpc.StatusCode.DEADLINE_EXCEEDED),  # the client's clock was ahead by the way
        (-1.0, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_a_call_that_is_cut_off_at_its_deadline_passed_it(seconds_left: float | None, code: grpc.StatusCode) -> None:
    record, told = RequestRecord("id", "Generate", seconds_left), []
    with pytest.raises(asyncio.CancelledError), observed(record, cast(Any, _UncutCall()), [told.append]):
        raise asyncio.CancelledError
    assert (told, record.code) == ([record], code)
