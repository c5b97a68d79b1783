"""Runs the engine in the worker process, which owns the device and speaks token ids over a socket.

The first message says what to load. The loop ends when the other end of the socket closes. Knows no gRPC and no text.
"""

import gc
import logging
import math
import socket
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import resolve_checkpoint
from dash_runtime.devices import num_devices
from dash_runtime.devices.cuda_graphs import CaptureFailed
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import DashRuntimeError, InvalidRequest
from dash_runtime.events import CostStatus, EngineEvent, RequestRefused
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.startup.forecast import tell_needs
from dash_runtime.startup.native_code import NativeCode, begin_to_compile
from dash_runtime.startup.packed_files import WeightsPlace
from dash_runtime.startup.process_memory import settle_memory
from dash_server.worker import messages
from dash_server.worker.server_socket import ServerGone, receive, send

logger = logging.getLogger("dash_server.worker")

_SECONDS_BETWEEN_SIGNS = 1.0


class _Closed(Exception):
    """The server told the worker to exit."""


class EngineLoop:
    """Moves messages between the socket and the engine, one engine step at a time."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._frames = messages.FrameReader()
        self._is_serving = False
        self._said_at = 0.0

    def run(self) -> int:
        """Serves until the other end closes. Returns the exit code."""
        try:
            engine, remaining = self._start()
            if engine is None:
                return 2
            try:
                self._serve(engine, remaining)
            finally:
                engine.close()
        except (_Closed, ServerGone):
            pass
        except CaptureFailed as failure:
            logger.error("%s; this worker ends, and the next one does without graphs", failure)
            self._send(messages.GraphsFailed(str(failure)))
            return 4
        except Exception:
            # After a device error nothing on the device can be trusted: the server starts another worker.
            logger.exception("the engine failed, and this worker ends")
            return 3
        return 0

    def _start(self) -> tuple[Engine | None, list[bytes]]:
        bodies: list[bytes] = []
        while not bodies:
            bodies = self._receive(timeout=None)
        config = messages.decode_to_worker(bodies[0])
        assert isinstance(config, messages.WorkerConfig)
        started = time.monotonic()
        try:
            cache_folder = Path(config.cache_folder)
            native_code = NativeCode(config.native_code)
            if config.devices[0] in ("auto", "cpu") and not torch.cuda.is_available():
                begin_to_compile(cache_folder, native_code)
            if not config.serves_first:
                tell_needs(config.model, cache_folder, config.engine, self._tell)
            folder = resolve_checkpoint(config.model, config.revision, cache_folder, self._tell)
            policy_file = None if config.policy_file is None else Path(config.policy_file)
            options = BuildOptions(
                devices_of_worker(config.devices, config.worker_number),
                config.precision,
                threads_of_worker(config.num_threads, config.num_workers),
                policy_file,
                None if config.actions is None else [Action[name] for name in config.actions],
                WeightsPlace(config.weights),
                native_code=native_code,
                use_graphs=config.use_graphs,
                checks_kept_costs=config.checks_costs,
                serves_first=config.serves_first,
            )
            engine = build_engine(folder, cache_folder, options, config.engine, self._tell)
        except DashRuntimeError as error:
            self._send(messages.StartupFailed(str(error)))
            return None, []
        # Weights and code live as long as the process: spare the garbage collector the walk over them.
        gc.collect()
        gc.freeze()
        self._is_serving = True
        self._send(messages.Ready(engine.facts, str(folder), time.monotonic() - started))
        return engine, bodies[1:]

    def _tell(self, doing: str) -> None:
        """Logs what this worker is doing, and tells the server while it starts."""
        logger.info(doing)
        if not self._is_serving:
            self._send(messages.Starting(doing))

    @torch.inference_mode()  # once, not for every step
    def _serve(self, engine: Engine, bodies: list[bytes]) -> None:
        engine.on_progress = self._say_that_it_works
        engine.bursts.wake_file = self._server.fileno()
        engine.later.serve_others = partial(self._serve_others, engine)
        watch, judged, facts = engine.cost_watch, CostStatus(), engine.facts
        while True:
            self._step(engine, bodies)
            bodies = self._receive(self._patience(engine))
            if not bodies and not engine.has_work:
                if not engine.later.is_done:
                    self._work_later(engine)
                elif watch is not None:
                    watch.work_idly()
            status = judged if watch is None else watch.status
            if status != judged or engine.facts is not facts:
                judged, facts = status, engine.facts
                self._send(messages.CostsJudged(judged, facts))

    def _step(self, engine: Engine, bodies: Sequence[bytes]) -> None:
        events: list[EngineEvent] = []
        for body in bodies:
            events += self._handle(engine, messages.decode_to_worker(body))
        events += engine.step()
        if events:
            self._send(messages.StepEvents(events))

    def _work_later(self, engine: Engine) -> None:
        """Does a piece of the work that was left for later."""
        try:
            engine.later.work()
        except DashRuntimeError as error:  # what it would have found is only worth speed
            logger.error("a measurement failed, and the engine serves on without it: %s", error)
        if engine.later.is_done:
            settle_memory(moves=False)

    def _serve_others(self, engine: Engine) -> None:
        """Serves whoever waits, between two passes of a measurement."""
        while (bodies := self._receive(0.0)) or engine.has_work:
            self._step(engine, bodies)

    def _patience(self, engine: Engine) -> float | None:
        """Returns the seconds to wait for a message; None for as long as it takes."""
        if engine.has_work:
            return 0.0
        if not engine.later.is_done:
            return 0.0
        seconds = math.inf if engine.cost_watch is None else engine.cost_watch.seconds_until_idle_work()
        return None if seconds == math.inf else seconds

    def _handle(self, engine: Engine, message: messages.ToWorker) -> list[EngineEvent]:
        match message:
            case messages.Submit(request=request):
                try:
                    engine.submit(request)
                except InvalidRequest as error:
                    return [RequestRefused(request.request_id, error.field, error.description)]
            case messages.Cancel(request_id=request_id):
                return engine.cancel(request_id)
            case messages.Stop(request_id=request_id):
                return engine.stop(request_id)
            case messages.Ping():
                self._send(messages.Pong())
            case messages.Shutdown():
                raise _Closed
        return []

    def _receive(self, timeout: float | None) -> list[bytes]:
        """Returns the frames that have arrived, after at most `timeout` seconds; None waits for data."""
        return self._frames.feed(receive(self._server, timeout))

    def _send(self, message: messages.FromWorker) -> None:
        send(self._server, messages.encode_frame(message))
        self._said_at = time.monotonic()

    def _say_that_it_works(self) -> None:
        """Tells the server so in the middle of a long step. An engine that hangs does not come here."""
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_SIGNS:
            self._send(messages.Pong())


def devices_of_worker(devices: Sequence[str], number: int) -> Sequence[str]:
    """Returns the devices of worker `number`, from 0. Unless CUDA devices are named, workers take turns."""
    count = num_devices(devices[0]) if len(devices) == 1 else 0
    return [f"cuda:{number % count}"] if count else devices


def threads_of_worker(num_threads: int | None, num_workers: int) -> int | None:
    """Returns the CPU threads of each worker: the setting, or its share of the machine; None is torch's choice."""
    if num_threads is not None or num_workers == 1:
        return num_threads
    return max(1, torch.get_num_threads() // num_workers)
