"""The real server with the embedded model where something is missing: it starts, says what it lacks, and answers."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dash_runtime.devices.cpu import memory_limit_files
from tests.e2e.service import Service

pytestmark = pytest.mark.embedded

EMBEDDED = Path("embedded")
QUESTION = "The capital of France is"


@pytest.fixture
def without_compiler(tmp_path: Path) -> str:
    """A path without one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("env", "sh", "uname"):
        (folder / name).symlink_to(shutil.which(name) or "/bin/false")
    return str(folder)


def answer_of(service: Service) -> str:
    """Asks, and stops the server."""
    try:
        answer = service.client.generate(QUESTION, max_new_tokens=8).text
    finally:
        code = service.stop()
    log = service.log.read_text()
    assert code == 0, log
    assert "Traceback" not in log
    return answer


def test_with_one_core_it_answers(tmp_path: Path, embedded_cache: Path) -> None:
    code = (
        "import os, sys; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); os.execv(sys.argv[1], sys.argv[1:])"
    )
    own = {"DASH_CACHE_FOLDER": str(embedded_cache), "DASH_MEASURE_FIRST": "false"}
    answer = answer_of(Service(tmp_path, EMBEDDED, [sys.executable, "-c", code], **own))
    assert "Paris" in answer


@pytest.fixture
def small_group(tmp_path: Path) -> Iterator[Path]:
    """A control group of 1 GB beneath this process's own."""
    for limit in memory_limit_files(Path("/proc/self/cgroup").read_text()):
        group = limit.parent / f"dash-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit.name).write_text(str(1 << 30))
            yield group
            return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("needs to make a control group with a limit of memory")


def test_in_a_gigabyte_it_answers_with_the_actions_that_fit_well(
    tmp_path: Path, embedded_cache: Path, small_group: Path
) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
    own = {"DASH_CACHE_FOLDER": str(embedded_cache), "DASH_MEASURE_FIRST": "false"}
    prefix = [sys.executable, "-c", code, str(small_group / "cgroup.procs")]
    service = Service(tmp_path, EMBEDDED, prefix, **own)
    assert "Paris" in answer_of(service)
    found = re.search(r" of ([0-9.]+) GB free", service.log.read_text())
    assert found is not None
    assert float(found[1]) <= round(((1 << 30) + psutil.swap_memory().total) / 1e9, 1)  # swap is not in the limit


def test_without_a_compiler_and_without_native_code_it_answers_eagerly_and_says_so(
    tmp_path: Path, embedded_cache: Path, without_compiler: str
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for kept in embedded_cache.iterdir():
        if kept.name not in ("native", "packed"):
            (cache / kept.name).symlink_to(kept)
    own = {"DASH_CACHE_FOLDER": str(cache), "DASH_MEASURE_FIRST": "false"}
    service = Service(tmp_path, EMBEDDED, PATH=without_compiler, **own)
    assert "Paris" in answer_of(service)
    assert "layers run eagerly: no C++ compiler here" in service.log.read_text()


def test_without_a_home_to_write_to_it_answers_from_a_folder_that_is_named(
    tmp_path: Path, embedded_cache: Path
) -> None:
    own = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "DASH_MEASURE_FIRST": "false"}
    answer = answer_of(Service(tmp_path, EMBEDDED, **own, DASH_CACHE_FOLDER=str(embedded_cache)))
    assert "Paris" in answer
