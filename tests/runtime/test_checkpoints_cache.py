"""A conversion is complete or absent, even if it is interrupted or several processes ask for it at once."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dash_runtime.checkpoints.conversion_cache import ConversionSource, cached_conversion
from dash_runtime.checkpoints.manifest import MANIFEST_FILE
from dash_runtime.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint

DIES_WHILE_CONVERTING = """
import os, sys
from pathlib import Path
from dash_runtime.checkpoints.conversion_cache import ConversionSource, cached_conversion

def convert(file, folder):
    (folder / "config.json").write_text("half")
    os.kill(os.getpid(), 9)

source = ConversionSource("tiny", "id-1", "tiny-1", lambda: Path("tiny.gguf"))
cached_conversion(source, Path(sys.argv[1]), convert, print)
"""


class Converter:
    """Writes a small folder instead of converting, and counts its calls."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.num_calls = 0
        self.seconds = seconds

    def __call__(self, file: Path, folder: Path) -> None:
        self.num_calls += 1
        (folder / "config.json").write_text(f"made from {file}")
        time.sleep(self.seconds)
        save_file({"w": torch.arange(100.0)}, folder / "model.safetensors")


def absent() -> Path:
    raise CheckpointNotFound("The source is gone.")


def source(identity: str = "id-1", locate: Callable[[], Path] = lambda: Path("tiny.gguf")) -> ConversionSource:
    return ConversionSource("tiny", identity, "tiny-1", locate)


def ignore(message: str) -> None:
    pass


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_second_start_converts_nothing_and_needs_no_source(tmp_path: Path) -> None:
    convert = Converter()
    first = cached_conversion(source(), tmp_path / "a" / "b", convert, ignore)
    second = cached_conversion(source(locate=absent), tmp_path / "a" / "b", convert, ignore)
    assert first == second
    assert convert.num_calls == 1


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise CorruptCheckpoint(f"{file} is damaged.")

    with pytest.raises(CorruptCheckpoint, match="damaged"):
        cached_conversion(source(), tmp_path, fail, ignore)
    assert visible(tmp_path) == []


def test_a_killed_conversion_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", DIES_WHILE_CONVERTING, str(tmp_path)], capture_output=True)
    assert killed.returncode == -9
    assert "tiny-1" not in visible(tmp_path)
    assert len(visible(tmp_path)) == 1  # the leftover

    cached_conversion(source(), tmp_path, Converter(), ignore)

    assert visible(tmp_path) == ["tiny-1"]


def test_many_at_once_convert_once_and_all_end_well(tmp_path: Path) -> None:
    convert = Converter(seconds=0.1)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(cached_conversion(source(), tmp_path, convert, ignore)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [tmp_path / "tiny-1"] * 6
    assert convert.num_calls == 1
    assert visible(tmp_path) == ["tiny-1"]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "cut weights": ("model.safetensors", lambda data: data[:-8]),
    "weights with another header": ("model.safetensors", lambda data: data[:8] + b"?" + data[9:]),
    "another configuration": ("config.json", lambda data: data.replace(b"made", b"fade")),
    "no configuration": ("config.json", lambda data: None),
    "half a manifest": (MANIFEST_FILE, lambda data: b'{"files": {'),
    "an empty manifest": (MANIFEST_FILE, lambda data: b"{}"),
    "no manifest": (MANIFEST_FILE, lambda data: None),
}
"""A file and what becomes of its contents; None removes it."""


def damage(folder: Path, kind: str) -> str:
    """Damages one file. Returns what the complaint must name."""
    name, change = DAMAGES[kind]
    content = change((folder / name).read_bytes())
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    return "tiny-1" if kind == "no manifest" else name


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_made_again_and_the_reason_told(tmp_path: Path, kind: str) -> None:
    convert = Converter()
    folder = cached_conversion(source(), tmp_path, convert, ignore)
    named = damage(folder, kind)
    messages: list[str] = []

    assert cached_conversion(source(), tmp_path, convert, messages.append) == folder

    assert convert.num_calls == 2
    assert (folder / "config.json").read_text() == "made from tiny.gguf"
    assert len(messages) == 1
    assert named in messages[0]
    assert messages[0].endswith("converting tiny.gguf again")
    assert visible(tmp_path) == ["tiny-1"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_without_its_source_is_corrupt(tmp_path: Path, kind: str) -> None:
    folder = cached_conversion(source(), tmp_path, Converter(), ignore)
    named = damage(folder, kind)
    with pytest.raises(CorruptCheckpoint, match="delete the folder") as caught:
        cached_conversion(source(locate=absent), tmp_path, Converter(), ignore)
    assert named in str(caught.value)


def test_a_folder_of_another_source_is_not_used(tmp_path: Path) -> None:
    convert = Converter()
    cached_conversion(source("id-1"), tmp_path, convert, ignore)
    cached_conversion(source("id-2"), tmp_path, convert, ignore)
    assert convert.num_calls == 2


def test_a_cache_that_cannot_be_written_is_told_in_one_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match="tiny cannot be converted into"):
        cached_conversion(source(), blocked / "cache", Converter(), ignore)
