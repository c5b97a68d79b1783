"""Weights are read lazily from safetensors, and errors name the file."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dash_runtime.checkpoints import open_weights, tokenizer_file
from dash_runtime.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def write_single(folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS) -> Path:
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_shards(folder: Path, weight_map: Mapping[str, str] | None = None) -> Path:
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in places.items():
        save_file({name: TENSORS[name]}, folder / file)
    index = {"metadata": {}, "weight_map": dict(weight_map or places)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_tensors_are_a_mapping(tmp_path: Path, write: object) -> None:
    assert callable(write)
    weights = open_weights(write(tmp_path))
    assert sorted(weights) == ["a", "b"]
    assert len(weights) == 2
    assert "a" in weights
    assert "c" not in weights
    assert weights.get("c") is None
    for name, tensor in TENSORS.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor)
    weights.check("a", (3, 4))


def test_a_missing_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    weights = open_weights(write_single(tmp_path))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: tensor c is missing"):
        weights["c"]


def test_another_shape_than_expected_is_named(tmp_path: Path) -> None:
    weights = open_weights(write_single(tmp_path))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: tensor a .*\[3, 4\].*\[4, 3\]"):
        weights.check("a", (4, 3))


def test_integers_are_refused(tmp_path: Path) -> None:
    weights = open_weights(write_single(tmp_path, {"a": torch.ones(3, dtype=torch.int8)}))
    with pytest.raises(UnsupportedArchitecture, match="I8; supported: BF16, F16, F32"):
        weights.check("a", (3,))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model-00001-of-00002\.safetensors is missing"):
        open_weights(tmp_path)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    weights = open_weights(write_shards(tmp_path, {"z": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CorruptCheckpoint, match=r"00001.*tensor z is missing"):
        weights["z"]


@pytest.mark.parametrize("weight_map", [{"a": "../elsewhere.safetensors"}, {"a": 3}, {}])
def test_an_index_that_makes_no_sense_is_corrupt(tmp_path: Path, weight_map: dict[str, object]) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CorruptCheckpoint, match=r"index\.json"):
        open_weights(tmp_path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="safetensors only"):
        open_weights(tmp_path)


def test_a_folder_without_weights_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"model\.safetensors"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointNotFound, match="no folder"):
        open_weights(tmp_path / "none")


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenizer_file(tmp_path)
