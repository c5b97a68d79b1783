"""A GGUF file's weights are read where they are, and equal those of a conversion bit for bit."""

import os
import resource
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from dash_runtime.actions import Action
from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, resolve_checkpoint
from dash_runtime.checkpoints.copied_weights import copied
from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.config import EngineConfig
from dash_runtime.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint
from dash_runtime.files import checked_once
from dash_runtime.startup.build import BuildOptions, build_engine
from dash_runtime.startup.native_code import NativeCode
from tests.runtime.gguf_files import tiny_tokens, write_gguf
from tests.runtime.native_model import SIZES, SmallModel
from tests.tiny_models import save_tiny_model

FAMILIES = [("llama", "llama"), ("granite-untied-biased", "granite"), ("gemma3", "gemma3"), ("qwen3-moe", "qwen3moe")]
"""Families whose rows change places, whose biases do, whose norms have an offset, and whose experts are stacked."""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    llama = save_tiny_model(folder / "llama", "llama", num_hidden_layers=2, dtype="bfloat16")
    return write_gguf(folder / "tiny.gguf", llama, kind=GGMLQuantizationType.Q8_0)


def copy_of(gguf: Path, folder: Path) -> Path:
    own = folder / gguf.name
    own.write_bytes(gguf.read_bytes())
    return own


@pytest.mark.parametrize(("family", "architecture"), FAMILIES)
def test_tensors_and_rows_are_those_of_a_conversion(family: str, architecture: str, tmp_path: Path) -> None:
    original = save_tiny_model(tmp_path / "original", family, num_hidden_layers=2, dtype="bfloat16")
    kind = GGMLQuantizationType.Q8_0
    gguf = write_gguf(tmp_path / "own.gguf", original, architecture=architecture, kind=kind)
    (tmp_path / "converted").mkdir()
    convert_gguf(gguf, tmp_path / "converted")
    expected = open_weights(tmp_path / "converted")
    weights = open_weights(resolve_checkpoint(str(gguf), None, tmp_path / "cache"))
    check_weights(weights, load_model_config(tmp_path / "converted"))
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
        if tensor.dim() == 2:
            some = [0, len(tensor) // 3, len(tensor) - 1]
            assert torch.equal(weights.rows(name, some), tensor[some]), name


def test_its_folder_has_no_weights(gguf: Path, tmp_path: Path) -> None:
    folder = resolve_checkpoint(str(gguf), None, tmp_path)
    assert sum(file.stat().st_size for file in folder.iterdir()) < gguf.stat().st_size / 2
    assert not list(folder.glob("*.safetensors"))


def test_a_folder_whose_file_is_gone_or_another_is_refused_by_the_files_name(gguf: Path, tmp_path: Path) -> None:
    own = copy_of(gguf, tmp_path)
    folder = resolve_checkpoint(str(own), None, tmp_path / "cache")
    os.utime(own, ns=(1, 1))
    with pytest.raises(CorruptCheckpoint, match=r"tiny\.gguf is another file than"):
        open_weights(folder)
    own.unlink()
    with pytest.raises(CheckpointNotFound, match=r"no file .*tiny\.gguf, which has the weights of"):
        open_weights(folder)


def test_a_file_is_found_again_by_another_link_than_its_folder_was_made_through(gguf: Path, tmp_path: Path) -> None:
    folders = []
    for parent in ("a", "b"):
        link = tmp_path / parent / "own.gguf"
        link.parent.mkdir()
        link.symlink_to(gguf)
        folders.append(resolve_checkpoint(str(link), None, tmp_path / "cache"))
        assert open_weights(folders[-1])["model.norm.weight"].isfinite().all()
        link.unlink()
    assert folders[0] == folders[1]
    with pytest.raises(CorruptCheckpoint, match=r"no file .*own\.gguf, which .*; delete the folder"):
        resolve_checkpoint(str(folders[0]), None, tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": [], "shapes": {"a": ["b"]}}', "no JSON"])
def test_a_damaged_place_of_the_weights_is_refused_by_name(gguf: Path, tmp_path: Path, content: str) -> None:
    folder = resolve_checkpoint(str(gguf), None, tmp_path)
    (folder / "model.gguf.json").write_text(content)
    with pytest.raises(CorruptCheckpoint, match=r"model\.gguf\.json"):
        open_weights(folder)


def test_a_copy_is_made_once_and_again_when_it_is_damaged(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_once, "_YOUNG_SECONDS", -1.0)
    weights, said = open_weights(resolve_checkpoint(str(gguf), None, tmp_path)), list[str]()

    def assert_copied() -> None:
        for name, tensor in copied(weights, tmp_path / "copies", said.append).items():
            assert torch.equal(tensor, weights[name]), name

    for _ in range(2):
        assert_copied()
    assert said == ["converting weights to bfloat16 (once)"]
    (path,) = (tmp_path / "copies").glob("*.safetensors")
    os.truncate(path, path.stat().st_size - 4096)
    assert_copied()
    assert "has changed since it was written" in said[1]
    assert copied(again := copied(weights, tmp_path / "copies", said.append), tmp_path, pytest.fail) is again


def test_a_copy_without_room_is_told_in_one_sentence_and_leaves_nothing(gguf: Path, tmp_path: Path) -> None:
    weights = open_weights(resolve_checkpoint(str(gguf), None, tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"copies/.*\.safetensors cannot be written: File too large\."):
            copied(weights, tmp_path / "copies", lambda said: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [own.name for own in (tmp_path / "copies").iterdir()] == [".lock"]


def test_only_layers_that_run_eagerly_need_a_copy(small_model: SmallModel, tmp_path: Path) -> None:
    cache, said = tmp_path / "cache", list[str]()
    cache.mkdir()
    (cache / "native").symlink_to(small_model.cache_folder / "native")
    own = save_tiny_model(tmp_path / "own", "llama", **SIZES)
    tokens = tiny_tokens()
    tokens += [f"<{number}>" for number in range(SIZES["vocab_size"] - len(tokens))]
    gguf = write_gguf(tmp_path / "own.gguf", own, metadata={"tokenizer.ggml.tokens": tokens})
    folder = resolve_checkpoint(str(gguf), None, cache)
    for native_code, has_copy in ((NativeCode.AUTO, False), (NativeCode.OFF, True)):
        options = BuildOptions(native_code=native_code, actions=[Action.FULL], serves_first=True)
        build_engine(folder, cache, options, EngineConfig(num_slots=1), said.append).close()
        assert (cache / "copies").exists() == has_copy
    assert "packing weights for ENDS, FULL (once)" in said  # natively at first
