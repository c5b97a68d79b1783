"""Server and worker as processes: what ends, ends both; what cannot start says why. A tiny model, nothing faked."""

import subprocess
from pathlib import Path

import pytest

from dash_client import UnavailableError
from tests.e2e.service import REPEATABLE, SERVER, Service, server_environment


def test_a_killed_worker_fails_its_requests_and_is_replaced_and_a_killed_server_leaves_none(
    tmp_path: Path, tiny_folder: Path
) -> None:
    service = Service(tmp_path, tiny_folder, **REPEATABLE)
    try:
        with service.client.stream("some text", max_new_tokens=450, ignore_eos=True) as stream:
            next(iter(stream))
            (worker,) = service.workers()
            worker.kill()
            with pytest.raises(UnavailableError):
                stream.final()
        service.client.wait_until_ready(timeout=30)
        assert service.client.generate("again", max_new_tokens=2, ignore_eos=True).token_ids
        service.client.close()
        (worker,) = service.workers()
    finally:
        service.process.kill()
        service.process.wait(timeout=5)
    worker.wait(timeout=5)


@pytest.mark.parametrize(
    ("variables", "words"),
    [({"DASH_MODEL": "/no/such/folder"}, "/no/such/folder"), ({"DASH_LANE": "cuda_stream"}, "cuda_stream")],
)
def test_what_cannot_be_started_says_why_in_one_line_and_exits_with_2(
    tmp_path: Path, tiny_folder: Path, variables: dict[str, str], words: str
) -> None:
    environment = server_environment(tmp_path, tiny_folder, **REPEATABLE, **variables)
    run = subprocess.run(SERVER, env=environment, capture_output=True, text=True, timeout=60)
    errors = [line for line in run.stderr.splitlines() if line.startswith("dash-server: ")]
    assert run.returncode == 2, run.stderr
    assert len(errors) == 1, run.stderr
    assert words in errors[0]
    assert "Traceback" not in run.stderr
