"""Many prompts at once: order, errors, laziness and concurrency, in both clients."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pytest
from client_colours import COLOURS, open_client
from fake_dash_server import FakeDashServer, Script, delta, fail, finished, started

from dash_client import CancelledError, Generation, InvalidArgumentError, NotFoundError

pytestmark = pytest.mark.parametrize("colour", COLOURS)


class Echo(FakeDashServer):
    """Answers with the prompt, later prompts faster; refuses "bad"; counts concurrent calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.most_inside = 0
        self._lock = threading.Lock()

    def begin(self, request: Any, context: Any) -> Script:
        super().begin(request, context)
        text = request.parameters.text
        with self._lock:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        time.sleep(0.05 if text.endswith("0") else 0.005)
        with self._lock:
            self.inside -= 1
        endings: dict[str, Script] = {"wait": [self.wait], "bad": [fail(grpc.StatusCode.NOT_FOUND, "no such thing")]}
        return endings.get(text, [started(), delta(text, [1]), finished(1)])


@pytest.fixture
def server() -> Iterator[Echo]:
    with Echo() as server:
        yield server


def map_all(colour: str, server: Echo, prompts: Iterable[Any], **options: Any) -> list[Any]:
    with open_client(colour, server.target) as client:
        results: list[Any] = client.map(prompts, **options)
    return results


def test_results_are_in_the_order_of_the_prompts(colour: str, server: Echo) -> None:
    prompts = [f"p{number}" for number in range(40)]
    results = map_all(colour, server, prompts, temperature=0.5)
    assert [result.text for result in results] == prompts
    assert {request.parameters.sampling.temperature for request in server.requests} == {0.5}


def test_no_more_than_asked_for_are_inside(colour: str, server: Echo) -> None:
    map_all(colour, server, [f"p{number}" for number in range(20)], max_concurrency=3)
    assert server.most_inside == 3


def test_prompts_are_taken_when_there_is_room(colour: str, server: Echo) -> None:
    ahead = []

    def prompts() -> Iterator[str]:
        for number in range(30):
            ahead.append(number + 1 - len(server.requests))
            yield f"p{number}"

    assert len(map_all(colour, server, prompts(), max_concurrency=2)) == 30
    assert max(ahead) <= 3


def test_an_error_is_the_result_in_its_place(colour: str, server: Echo) -> None:
    results = map_all(colour, server, ["a", "bad", [], "b"])
    assert [type(result) for result in results] == [Generation, NotFoundError, InvalidArgumentError, Generation]
    assert results[2].field_violations[0].field == "prompt"


def test_the_first_error_is_raised_where_that_is_wanted(colour: str, server: Echo) -> None:
    begin = time.monotonic()
    with pytest.raises(NotFoundError):
        map_all(colour, server, ["wait", "bad", "a"], raise_errors=True, max_concurrency=2)
    assert time.monotonic() - begin < 5


def test_nothing_is_asked_with_wrong_options(colour: str, server: Echo) -> None:
    for wrong in ({"temperature": -1}, {"max_concurrency": 0}, {"max_concurrency": True}, {"timeout": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            map_all(colour, server, ["a"], **wrong)
    with pytest.raises(InvalidArgumentError, match="prompts"):
        map_all(colour, server, "one prompt")
    with pytest.raises(TypeError, match="temprature"):
        map_all(colour, server, ["a"], temprature=1)
    assert server.requests == []
    assert map_all(colour, server, []) == []


def test_prompts_that_fail_themselves_end_it(colour: str, server: Echo) -> None:
    def prompts() -> Iterator[str]:
        yield "wait"
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        map_all(colour, server, prompts())


def test_closing_the_client_ends_it(colour: str, server: Echo) -> None:
    with open_client(colour, server.target) as client:
        timer = threading.Timer(0.3, client.close)
        timer.start()
        (result,) = client.map(["wait"])
        timer.join()
    assert isinstance(result, CancelledError)


def test_progress_is_shown_where_tqdm_is(colour: str, server: Echo, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    map_all(colour, server, ["a", "bad"], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_progress_without_tqdm_is_a_warning(colour: str, server: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.warns(UserWarning, match=r"dash-llm\[cli\]"):
        assert len(map_all(colour, server, ["a"], progress=True)) == 1
