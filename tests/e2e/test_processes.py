"""Server and worker as processes: what ends, ends both; what cannot start says why. A tiny model, nothing faked."""

import subprocess
from pathlib import Path

import pytest

from dash_client import UnavailableError
from tests.e2e.service import SERVER, Service, server_environment


def test_a_cancelled_stream_frees_its_slot(tmp_path: Path, tiny_folder: Path) -> None:
    service = Service(tmp_path, tiny_folder, DASH_SLOTS="1")
    try:
        with service.client.stream("never ending", max_new_tokens=400, ignore_eos=True) as stream:
            next(iter(stream))
        assert service.client.generate("next", max_new_tokens=1, timeout=5).token_ids
    finally:
        assert service.stop() == 0


def test_a_killed_worker_fails_its_requests_and_is_replaced(tmp_path: Path, tiny_folder: Path) -> None:
    service = Service(tmp_path, tiny_folder)
    try:
        with service.client.stream("some text", max_new_tokens=450, ignore_eos=True) as stream:
            next(iter(stream))
            (worker,) = service.workers()
            worker.kill()
            with pytest.raises(UnavailableError):
                stream.final()
        service.client.wait_until_ready(timeout=30)
        assert service.client.generate("again", max_new_tokens=2, ignore_eos=True).token_ids
    finally:
        assert service.stop() == 0


def test_a_killed_server_leaves_no_worker(tmp_path: Path, tiny_folder: Path) -> None:
    service = Service(tmp_path, tiny_folder)
    service.client.close()
    (worker,) = service.workers()
    service.process.kill()
    service.process.wait(timeout=5)
    worker.wait(timeout=5)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"DASH_MODEL": "/no/such/folder"}, "/no/such/folder"),
        ({"DASH_POLICY_FILE": "{foreign}"}, "foreign.safetensors"),
        ({"DASH_DEVICE": "warp"}, "warp"),
        ({"DASH_LANE": "cuda_stream"}, "cuda_stream"),
        ({"DASH_MODEL": "{gguf}"}, "corrupt.gguf"),
        ({"DASH_COMPUTE_BUDGET": "1", "DASH_DEFAULT_COMPUTE_BUDGET": "1.5"}, "DASH_DEFAULT_COMPUTE_BUDGET"),
    ],
)
def test_what_cannot_be_started_says_why_in_one_line_and_exits_with_2(
    tmp_path: Path, tiny_folder: Path, variables: dict[str, str], words: str
) -> None:
    (tmp_path / "foreign.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (tmp_path / "corrupt.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    places = {"foreign": str(tmp_path / "foreign.safetensors"), "gguf": str(tmp_path / "corrupt.gguf")}
    filled = {name: value.format(**places) for name, value in variables.items()}
    run = subprocess.run(
        SERVER, env=server_environment(tmp_path, tiny_folder, **filled), capture_output=True, text=True, timeout=60
    )
    errors = [line for line in run.stderr.splitlines() if line.startswith("dash-server: ")]
    assert run.returncode == 2, run.stderr
    assert len(errors) == 1, run.stderr
    assert words in errors[0]
    assert "Traceback" not in run.stderr
