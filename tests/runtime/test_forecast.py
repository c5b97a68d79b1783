"""What a model will take is told from its configuration, before anything is converted."""

from pathlib import Path

import pytest

from dash_runtime.config import EngineConfig
from dash_runtime.startup.forecast import tell_needs
from tests.runtime.gguf_files import write_gguf
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("forecast"), "llama", hidden_size=256, vocab_size=320)


def test_weights_memory_and_disk_are_told_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    cache = tmp_path / "cache" / "deeper"
    tell_needs(str(write_gguf(tmp_path / "own.gguf", folder)), cache, EngineConfig(), said.append)
    assert len(said) == 2
    assert said[0].startswith("own: 0.00 billion weights take 0.0 GB in FULL, 0.0 GB in INT8, 0.0 GB in INT4 of ")
    assert said[1].endswith(f"GB that are free in {cache}")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("contents", [b"", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_nothing_is_told_of_what_cannot_be_read(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "own.gguf").write_bytes(contents)
    for model in (str(tmp_path / "own.gguf"), "/no/such/folder", "organisation/name"):
        tell_needs(model, tmp_path, EngineConfig(), pytest.fail)
