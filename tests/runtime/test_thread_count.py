"""Native code takes one thread where a neighbour slows several down, and all of them again when it has gone."""

from collections.abc import Callable

from dash_runtime.native.thread_count import ThreadCount

QUIET = {2: 1.0, 1: 1.9}.__getitem__
BUSY = {2: 4.0, 1: 2.0}.__getitem__
SLOWER_MEMORY = {2: 1.8, 1: 3.4}.__getitem__


def run(
    threads: ThreadCount, seconds: Callable[[int], float], count: int, work: str = "a", num_passes: int = 1
) -> float:
    """Runs calls whose passes take as long as their number of threads says; returns the share of them in one thread."""
    alone = 0
    for _ in range(count):
        alone += threads.current == 1
        own = 1 if threads.is_trying else num_passes
        if threads.is_seen():
            threads.took(work, seconds(threads.current), own)
    return alone / count


def test_a_quiet_machine_uses_all_threads_all_the_time() -> None:
    assert run(ThreadCount(2), QUIET, 1000) == 0


def test_a_busy_neighbour_leaves_one_thread_within_a_few_calls_and_gives_all_back_when_it_goes() -> None:
    threads = ThreadCount(2)
    run(threads, QUIET, 50)
    run(threads, BUSY, 20)
    assert run(threads, BUSY, 1000) > 0.93
    run(threads, QUIET, 170)
    assert run(threads, QUIET, 1000) == 0


def test_calls_of_many_passes_leave_and_give_back_all_threads_within_a_few() -> None:
    threads = ThreadCount(2)
    run(threads, QUIET, 10, num_passes=11)
    assert run(threads, QUIET, 100, num_passes=11) == 0
    run(threads, BUSY, 11, num_passes=11)
    assert threads.current == 1
    run(threads, BUSY, 1000, num_passes=11)
    run(threads, QUIET, 22, num_passes=11)
    assert run(threads, QUIET, 100, num_passes=11) == 0


def test_a_trial_of_all_threads_ends_with_a_first_call_that_takes_longer_than_one_thread_does() -> None:
    threads = ThreadCount(2)
    run(threads, QUIET, 50)
    run(threads, BUSY, 2000)
    counts = [run(threads, BUSY, 1) for _ in range(1000)]
    trials = "".join("1" if alone else "2" for alone in counts).split("1")
    assert max(map(len, trials)) == 1
    assert sum(counts) > 990


def test_a_spell_of_slow_calls_that_is_over_leaves_all_threads() -> None:
    threads = ThreadCount(2)
    run(threads, QUIET, 50)
    run(threads, {2: 2.5, 1: 3.0}.__getitem__, 6)
    run(threads, QUIET, 12)
    assert run(threads, QUIET, 1000) == 0


def test_a_choice_that_a_spell_made_wrong_ends_within_a_few_calls() -> None:
    threads = ThreadCount(2)
    run(threads, QUIET, 50)
    run(threads, BUSY, 28)
    assert threads.current == 1
    run(threads, QUIET, 30)
    assert run(threads, QUIET, 1000) == 0


def test_a_machine_whose_memory_became_slower_keeps_its_threads() -> None:
    threads = ThreadCount(2)
    run(threads, QUIET, 50)
    assert run(threads, SLOWER_MEMORY, 2000) < 0.05
    assert run(threads, SLOWER_MEMORY, 1000) == 0


def test_short_and_long_work_are_not_compared() -> None:
    threads = ThreadCount(2)
    for _ in range(100):
        run(threads, QUIET, 3, "short")
        assert run(threads, {2: 9.0, 1: 17.0}.__getitem__, 3, "long") == 0


def test_a_single_thread_stays_one() -> None:
    assert run(ThreadCount(1), BUSY, 100) == 1
