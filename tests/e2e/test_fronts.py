"""Several fronts behind one name: what a client notices when one drains, one dies and one joins. Workers are fakes."""

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Self

import pytest

from dash_client import AsyncDashClient, DashClient, DashError
from tests.e2e.name_server import NameServer
from tests.server.fake_worker import PROBE_TOKEN_ID
from tests.server.server_harness import ServerProcess, fake_model, free_port, running_server, server_process

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
AGE_SECONDS = 1.0
PAUSE_BETWEEN_LOOKUPS_SECONDS = 5.0


class Front:
    """A server process on its own address, and a client that talks to it alone."""

    def __init__(self, process: ServerProcess, host: str) -> None:
        self.process = process
        self.client = DashClient(f"{host}:{process.wait_for_port()}")
        self.client.wait_until_ready(timeout=30)
        self._num_probes = 0

    def num_answered(self) -> int:
        """Returns the number of requests that came to it from others."""
        counts = self.client.generate([PROBE_TOKEN_ID]).token_ids
        self._num_probes += 1
        return counts[1] - self._num_probes

    def is_asked(self) -> bool:
        """True if requests of others come to it now."""
        before = self.num_answered()
        time.sleep(0.2)
        return self.num_answered() > before


@contextmanager
def three_fronts(folder: Path, model: str, port: int) -> Iterator[list[Front]]:
    """Yields three fronts on one port of three addresses, as one name in DNS needs them."""
    with ExitStack() as stack:
        processes = []
        for host in HOSTS:
            (own := folder / host).mkdir()
            variables = {"host": host, "port": port, "max_connection_age_seconds": AGE_SECONDS}
            processes.append(stack.enter_context(server_process(own, model=model, **variables)))
        fronts = [Front(process, host) for process, host in zip(processes, HOSTS, strict=True)]
        for front in fronts:
            stack.callback(front.client.close)
        yield fronts


class Load:
    """Streams one after another in each of several threads, over one client. Sorts failures by what had begun."""

    def __init__(self, client: DashClient) -> None:
        self.num_whole = 0
        self.broken: list[DashError] = []
        """Streams that ended after they had started."""
        self.failed: list[DashError] = []
        self._client = client
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(6)]

    def _run(self) -> None:
        while not self._is_over.is_set():
            failures = self.failed
            try:
                with self._client.stream("abc", max_new_tokens=4) as stream:
                    assert stream.started
                    failures = self.broken
                    assert len(stream.final().token_ids) == 4
                self.num_whole += 1
            except DashError as error:
                failures.append(error)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def wait_until_asked(front: Front, seconds: float) -> float:
    """Returns how long it took."""
    begin = time.monotonic()
    while not front.is_asked():
        assert time.monotonic() - begin < seconds
    return time.monotonic() - begin


def test_calls_that_have_not_begun_never_fail_while_fronts_join_drain_and_die(
    tmp_path: Path, model_folder: Path
) -> None:
    port = free_port()
    with (
        three_fronts(tmp_path, fake_model(model_folder, token_seconds=0.005), port) as (first, second, third),
        NameServer(*HOSTS[:2]) as names,
        DashClient(names.target(port)) as client,
        Load(client) as load,
    ):
        wait_until_asked(first, 2)
        wait_until_asked(second, 2)
        assert third.num_answered() == 0

        names.addresses = list(HOSTS)
        wait_until_asked(third, PAUSE_BETWEEN_LOOKUPS_SECONDS + AGE_SECONDS * 1.1 + 4)
        assert (load.failed, load.broken) == ([], [])

        with first.client.stream("abc", max_new_tokens=300) as long_stream:
            assert long_stream.started
            num_whole = load.num_whole
            first.process.process.send_signal(signal.SIGTERM)
            assert len(long_stream.final().token_ids) == 300
        code, log = first.process.outcome()
        assert code == 0, log
        # The long stream kept it draining for more than a second, in which it cost nobody a pause.
        assert load.num_whole - num_whole > 20
        assert (load.failed, load.broken) == ([], [])

        second.process.process.kill()
        num_whole = load.num_whole
        time.sleep(1)
        assert load.num_whole - num_whole > 20
        assert third.is_asked()
    assert load.failed == []
    assert len(load.broken) <= 6  # one in each thread


@asynccontextmanager
async def calling(client: AsyncDashClient, *, in_sessions: bool) -> AsyncIterator[Counter[str]]:
    """Makes calls in 24 tasks, or ten at a time in one session of each, and counts their outcomes."""
    outcomes: Counter[str] = Counter()
    is_over = asyncio.Event()

    async def call() -> None:
        while not is_over.is_set():
            async with client.session() as session:
                asked = session if in_sessions else client
                for _ in range(10):
                    try:
                        await asked.generate("abc", max_new_tokens=1)
                        outcomes["OK"] += 1
                    except DashError as error:
                        outcomes[f"{error.code}: {error}"] += 1

    callers = [asyncio.create_task(call()) for _ in range(24)]
    try:
        yield outcomes
    finally:
        is_over.set()
        await asyncio.gather(*callers)


@pytest.mark.parametrize("in_sessions", [False, True])
async def test_a_call_that_meets_a_closing_connection_is_made_elsewhere(model_folder: Path, in_sessions: bool) -> None:
    """In each drain some calls reach a server whose connection is just closing."""
    model = fake_model(model_folder, token_seconds=0.002)
    async with running_server(model) as staying:
        for _ in range(5):
            async with running_server(model) as leaving:
                target = f"ipv4:127.0.0.1:{leaving.port},127.0.0.1:{staying.port}"
                async with AsyncDashClient(target) as client, calling(client, in_sessions=in_sessions) as outcomes:
                    async with asyncio.timeout(30):
                        while (num_asked := (await leaving.probe()).num_submits) <= 20:
                            await asyncio.sleep(0.1)
                    await leaving.server.drain(5)
                    await asyncio.sleep(0.1)
            assert outcomes.keys() == {"OK"}
            assert outcomes["OK"] > num_asked
