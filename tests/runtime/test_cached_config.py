"""A cached configuration is used only for the files that it was read from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dash_runtime.checkpoints import cached_model_config, load_model_config
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint, DashRuntimeError, UnsupportedArchitecture
from tests.tiny_models import save_tiny_model

READ_AGAIN = """
import sys
from pathlib import Path
from dash_runtime.checkpoints import cached_model_config
print(cached_model_config(Path(sys.argv[1]), Path(sys.argv[2])))
assert "transformers" not in sys.modules and "torch" not in sys.modules
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "qwen2-sliding-window")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cached_files(cache: Path) -> list[Path]:
    return sorted((cache / "configurations").iterdir())


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_later_start_reads_the_same_without_transformers(folder: Path, cache: Path) -> None:
    config = load_model_config(folder)
    assert cached_model_config(folder, cache) == config
    assert cached_model_config(folder, cache) == config
    command = [sys.executable, "-c", READ_AGAIN, str(folder), str(cache)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(config)
    assert len(cached_files(cache)) == 1


def test_a_change_to_any_file_or_the_name_is_seen(folder: Path, cache: Path) -> None:
    cached_model_config(folder, cache)
    change(folder / "config.json", rms_norm_eps=0.25)
    assert cached_model_config(folder, cache).rms_norm_eps == 0.25
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert cached_model_config(folder, cache).eos_token_ids == {3, 5}
    change(folder / "generation_config.json", eos_token_id=7)
    assert cached_model_config(folder, cache).eos_token_ids == {7}
    renamed = folder.rename(folder.with_name("other"))
    assert cached_model_config(renamed, cache).name == "other"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"name": 3}', b"\xff\xfe", b'{"name": "model", "archi'])
def test_a_damaged_file_is_read_anew_and_mended(folder: Path, cache: Path, content: bytes) -> None:
    config = cached_model_config(folder, cache)
    (cached,) = cached_files(cache)
    whole = cached.read_bytes()
    cached.write_bytes(content)
    assert cached_model_config(folder, cache) == config
    assert cached_files(cache) == [cached]
    assert cached.read_bytes() == whole


def test_a_cache_that_cannot_be_written_to_costs_only_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert cached_model_config(folder, tmp_path / "file") == load_model_config(folder)


def test_what_cannot_be_read_is_refused_as_ever_and_not_cached(folder: Path, cache: Path) -> None:
    def refusal(kind: type[DashRuntimeError]) -> str:
        with pytest.raises(kind) as loaded:
            load_model_config(folder)
        with pytest.raises(kind) as cached:
            cached_model_config(folder, cache)
        assert str(cached.value) == str(loaded.value)
        return str(cached.value)

    change(folder / "config.json", architectures=["NoSuchModel"])
    assert "NoSuchModel" in refusal(UnsupportedArchitecture)
    (folder / "config.json").write_text("{")
    refusal(CorruptCheckpoint)
    (folder / "config.json").unlink()
    refusal(CheckpointNotFound)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to("nowhere")
    refusal(CheckpointNotFound)
    assert not cache.exists()
