"""The order in which callers are served."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_server.fair_queue import FairQueue, Priority, PriorityQueue

LOW, NORMAL, HIGH = Priority


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_callers_requests_are_served_in_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abcde":
        queue.push(name, "ann", 7)
    assert drained(queue) == list("abcde")
    assert queue.head() is None


def test_a_newcomer_waits_for_one_request_of_a_caller_with_five_hundred() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(500):
        queue.push("ann", "ann", 10)
    assert queue.pop() == "ann"
    queue.push("bob", "bob", 10)
    assert queue.num_ahead("cleo") <= 2
    assert "bob" in [queue.pop(), queue.pop()]


def test_callers_get_turns_by_cost_and_weight() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("cheap", "cheap", 1)
        queue.push("dear", "dear", 4)
        queue.push("heavy", "heavy", 1, weight=2)
    served = [queue.pop() for _ in range(70)]
    assert 18 <= served.count("cheap") <= 24
    assert 4 <= served.count("dear") <= 7
    assert 36 <= served.count("heavy") <= 46


def test_who_waited_idle_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(50):
        queue.push("ann", "ann", 1)
    for _ in range(20):
        queue.pop()
    for _ in range(10):
        queue.push("bob", "bob", 1)
    assert 9 <= [queue.pop() for _ in range(20)].count("bob") <= 10


def test_what_is_removed_is_not_charged() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("ann-huge", "ann", 1000)
    queue.push("ann-small", "ann", 1)
    queue.push("bob", "bob", 1)
    queue.push("bob-next", "bob", 1)
    queue.remove("ann-huge", "ann")
    assert set(drained(queue)[:2]) == {"ann-small", "bob"}


def test_the_longest_line_and_its_newest_are_known() -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    assert queue.longest_line() == ("", 0)
    for name, priority in (("a1", LOW), ("a2", HIGH), ("b1", LOW), ("a3", LOW), ("a4", NORMAL)):
        queue.push(name, priority, name[0], 1)
    assert queue.longest_line() == ("a", 4)
    assert queue.newest("a") == "a3", "of the lowest class"


def test_a_class_is_served_only_while_none_above_it_waits() -> None:
    queue: PriorityQueue[str] = PriorityQueue()
    assert queue.head() is None
    for name, priority in (("l1", LOW), ("n1", NORMAL), ("l2", LOW), ("h1", HIGH), ("n2", NORMAL)):
        queue.push(name, priority, "ann", 1)
    queue.push("n3", NORMAL, "bob", 1)
    assert queue.num_ahead(HIGH, "bob") == 1
    assert queue.num_ahead(LOW, "bob") > queue.num_ahead(NORMAL, "bob")
    queue.remove("l1", LOW, "ann")
    served = [queue.pop() for _ in range(5)]
    assert served[0] == "h1"
    assert set(served[1:4]) == {"n1", "n2", "n3"}, "in turns"
    assert served[4] == "l2"
    with pytest.raises(IndexError):
        queue.pop()


operations = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.sampled_from([0.5, 1, 3])), max_size=60)


@given(operations, st.randoms(use_true_random=False))
def test_nothing_is_lost_served_twice_or_overtaken_by_its_own_caller(
    pushes: list[tuple[str, int, float]], random: object
) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    served: list[tuple[str, int]] = []
    removed: set[tuple[str, int]] = set()
    pushed: list[tuple[str, int]] = []
    for number, (caller, cost, weight) in enumerate(pushes):
        assert queue.num_ahead(caller) <= len(queue)
        queue.push((caller, number), caller, cost, weight)
        pushed.append((caller, number))
        chance = random.random()  # type: ignore[attr-defined]
        if chance < 0.3:
            head = queue.head()
            served.append(queue.pop())
            assert served[-1] == head
        elif chance < 0.4:
            item = next(iter(queue))
            queue.remove(item, item[0])
            removed.add(item)
    served += [queue.pop() for _ in range(len(queue))]
    assert sorted(served + list(removed)) == sorted(pushed)
    for caller in "abc":
        own = [number for name, number in served if name == caller]
        assert own == sorted(own)
    assert not queue._lines
