"""Weights for native code are packed once, into files that every start maps; what is damaged is packed again."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.packed_model import Part, parts_of
from dash_runtime.decoder.loading import pack_in_memory
from dash_runtime.files.tensor_stream import TensorStream, changed_tensor
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.startup import packed_files
from dash_runtime.startup.packed_files import PackedFiles, WeightsPlace
from tests.runtime.native_model import SIZES
from tests.runtime.support import CPU
from tests.tiny_models import save_tiny_model

ACTIONS = (Action.SKIP, Action.INT3, Action.INT4, Action.INT8, Action.FULL)
PARTS = parts_of(ACTIONS, None)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> WeightLoader:
    folder = save_tiny_model(tmp_path_factory.mktemp("packed"), "qwen2-sliding-window", **SIZES)
    return WeightLoader(load_model_config(folder), open_weights(folder), torch.bfloat16, CPU)


@pytest.fixture
def files(loader: WeightLoader, tmp_path: Path) -> PackedFiles:
    weights = loader.weights
    return PackedFiles(tmp_path / "packed", ("a model",), loader, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", WeightsPlace)
def test_files_hold_what_packing_in_memory_makes(
    files: PackedFiles, loader: WeightLoader, place: WeightsPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "_LEAST_COPIED", 1)
    packed, expected = files.open(PARTS, place, lambda said: None), pack_in_memory(loader, ACTIONS)
    assert torch.equal(packed.embedding, expected.embedding)
    assert torch.equal(packed.loudest, expected.loudest)
    heads = ("head.INT4", "head.INT8", "head.FULL", "head.ERRORS")
    for mine, theirs in ((packed.matrix(name), expected.matrix(name)) for name in heads):
        assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
    for index in range(loader.config.num_layers):
        mine, theirs = (own.layer(index, ACTIONS[1:]) for own in (packed, expected))
        assert mine.vectors.keys() == theirs.vectors.keys()
        assert all(torch.equal(own, theirs.vectors[name]) for name, own in mine.vectors.items())
        for action in ACTIONS[1:]:
            pairs = list(zip(mine.matrices[action], theirs.matrices[action], strict=True))
            assert len(pairs) >= 4
            assert all(size == other for (_, size), (_, other) in pairs)
            assert all(all(map(torch.equal, one.tensors(), two.tensors())) for (one, _), (two, _) in pairs)


def test_weights_are_packed_once_and_later_starts_say_nothing(files: PackedFiles) -> None:
    said: list[str] = []
    files.open(PARTS, WeightsPlace.MAPPED, said.append)
    assert said == ["packing weights for ENDS, INT3, INT4, INT8, FULL (once)"]
    files.open(PARTS, WeightsPlace.MAPPED, said.append)
    assert len(said) == 1


def test_only_the_parts_of_the_actions_that_are_offered_are_packed(files: PackedFiles) -> None:
    said: list[str] = []
    files.open(parts_of((Action.SKIP, Action.INT4), None), WeightsPlace.MAPPED, said.append)
    assert sorted(own.name.partition("-")[2] for own in files.folder.glob("*.safetensors")) == [
        "ends.safetensors",
        "int4.safetensors",
    ]
    files.open(PARTS, WeightsPlace.MAPPED, said.append)
    assert said == ["packing weights for ENDS, INT4 (once)", "packing weights for INT3, INT8, FULL (once)"]


def _flip_a_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1000] ^= 1
    path.write_bytes(contents)


DAMAGES: list[Callable[[Path], object]] = [
    _flip_a_byte,
    lambda path: os.truncate(path, path.stat().st_size - 4096),
    lambda path: os.truncate(path, 100),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(bytes(path.stat().st_size)),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_has_changed_is_packed_again(files: PackedFiles, damage: Callable[[Path], object]) -> None:
    before = files.open(PARTS, WeightsPlace.COPIED, lambda said: None).matrix("head.INT4").tensors()[0].clone()
    damage(files.path(Part.INT4))
    said: list[str] = []
    again = files.open(PARTS, WeightsPlace.MAPPED, said.append).matrix("head.INT4").tensors()[0]
    assert torch.equal(before, again)
    assert "has changed since it was written" in said[0]
    assert said[-1] == "packing weights for INT4 (once)"


def test_a_stopped_start_leaves_nothing_that_the_next_one_keeps(files: PackedFiles) -> None:
    class Stopped(BaseException):
        pass

    def stop(said: str) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        files.open(PARTS, WeightsPlace.MAPPED, stop)
    (files.folder / ".killed-int4.safetensors.0.partial").write_bytes(b"half a file")
    assert not list(files.folder.glob("*.safetensors"))
    files.open(PARTS, WeightsPlace.MAPPED, lambda said: None)
    assert not list(files.folder.glob(".*.partial"))


def test_a_folder_that_cannot_be_written_costs_memory_and_time_only(
    files: PackedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TensorStream, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorStream, "add", full)
    said: list[str] = []
    packed = files.open(PARTS, WeightsPlace.MAPPED, said.append)
    assert packed.matrix("head.FULL").tensors()[0].numel()
    assert f"{files.folder} cannot be written (No space left on device)" in said[1]
    assert [own.name for own in files.folder.iterdir()] == [".lock"]


def test_other_weights_have_other_files(files: PackedFiles) -> None:
    other = replace(files, key=("another model",))
    assert {files.path(part) for part in Part} & {other.path(part) for part in Part} == set()


def test_a_stream_of_tensors_is_a_safetensors_file_whose_tensors_are_aligned(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "words": torch.arange(32, dtype=torch.int32).view(2, 16),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    path = tmp_path / "own.safetensors"
    with path.open("wb") as file:
        stream = TensorStream(file)
        for name, tensor in tensors.items():
            stream.add(name, tensor)
        stream.finish({"format": "pt"})
    assert changed_tensor(path) is None
    with safe_open(path, framework="pt") as opened:
        for name, tensor in tensors.items():
            own = opened.get_tensor(name)
            assert own.dtype is tensor.dtype
            assert torch.equal(own, tensor)
            assert own.data_ptr() % 64 == 0


def test_the_distance_of_an_actions_weights_from_the_models_own_is_measured(loader: WeightLoader) -> None:
    packed = pack_in_memory(loader, ACTIONS)
    assert packed.error(Action.FULL) == 0
    assert 0.001 < packed.error(Action.INT8) < 0.02 < packed.error(Action.INT4) < 0.12
    assert packed.error(Action.INT4) < packed.error(Action.INT3) < 0.3
