"""Whether a measurement's threads had to wait for cores."""

import time
from pathlib import Path

from dash_runtime.startup.quiet import quietness


def test_the_time_that_threads_wait_for_cores_is_known_where_the_system_tells(tmp_path: Path) -> None:
    def thread(name: str, waited: int) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "schedstat").write_text(f"123 {waited} 4\n")

    thread("1", 10**9)
    thread("2", 0)
    began_at = time.monotonic()
    with quietness(tmp_path) as found:
        time.sleep(0.05)
        thread("2", 20_000_000)
        took_at_least = time.monotonic() - began_at
    took_at_most = time.monotonic() - began_at
    assert 0.02 / took_at_most <= found.waited <= 0.02 / 0.05
    assert not found.is_quiet or took_at_least > 0.19
    with quietness(tmp_path / "a system that does not tell") as found:
        pass
    assert found.is_quiet
