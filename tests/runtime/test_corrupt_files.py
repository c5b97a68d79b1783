"""Damaged files are refused in one sentence that names them; the long version is benchmarks/soak/corrupt_files.py."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.soak import loaders
from benchmarks.soak.corrupt_files import report
from benchmarks.soak.corruptible_files import KINDS, make_originals
from benchmarks.soak.corruption_cases import CorruptionRun, Outcome, cases
from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, resolve_checkpoint
from dash_runtime.checkpoints.manifest import MANIFEST_FILE
from dash_runtime.errors import CheckpointError, CorruptCheckpoint, PolicyFileError
from dash_runtime.files.tensor_file import CHECKSUM, load_tensors, save_tensors
from dash_runtime.files.wording import one_line, quoted
from dash_runtime.policy.policy_file import find_policies

NUM_CASES = 250


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_originals(folder)
    return folder


@pytest.fixture
def policy_folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "policy", tmp_path / "policy"))


@pytest.fixture
def model_folder(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "model", tmp_path / "model"))


def test_damaged_files_of_every_kind_are_refused_or_accepted_for_a_reason(originals: Path, tmp_path: Path) -> None:
    run = CorruptionRun(originals, tmp_path)
    results = [run.run(case) for case in cases(NUM_CASES, seed=3)]
    broken = [f"{one.case.label}: {one.damage}: {one.detail}" for one in results if one.outcome is Outcome.BROKEN]
    assert broken == []
    outcomes = Counter(one.outcome for one in results)
    assert outcomes[Outcome.REFUSED] > 0.6 * NUM_CASES, report(results)
    assert outcomes[Outcome.MADE_AGAIN] > 0
    assert {one.case.kind for one in results} == {kind.name for kind in KINDS}


def test_a_flipped_bit_in_a_policy_files_header_or_tensors_is_refused(policy_folder: Path) -> None:
    data = (policy_folder / "tiny.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    # Bit 5 makes capitals of letters, which JSON does not always tell apart.
    flips = [(place, bit) for place in range(end) for bit in {5, place % 8}]
    flips += [(place, place % 8) for place in range(end, len(data), 37)]
    assert [flip for flip in flips if loads_with(policy_folder, data, *flip)] == []


def loads_with(folder: Path, data: bytes, place: int, bit: int) -> bool:
    """Returns True if the policy file loads with one bit of `data` flipped."""
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    (folder / "tiny.safetensors").write_bytes(changed)
    try:
        loaders.load_policies(folder)
    except PolicyFileError:
        return False
    return True


def test_a_policy_file_says_what_is_wrong_with_its_checksum(policy_folder: Path) -> None:
    file = policy_folder / "tiny.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(PolicyFileError, match=r"tiny\.safetensors has changed since it was written"):
        loaders.load_policies(policy_folder)
    with pytest.raises(PolicyFileError, match=r"tiny\.safetensors has changed since it was written"):
        find_policies(policy_folder, "another model")


def test_a_policy_file_without_a_checksum_loads_as_it_did(originals: Path, policy_folder: Path) -> None:
    plain = originals / "plain-policy"
    assert CHECKSUM not in metadata_of(plain / "tiny.safetensors")
    assert CHECKSUM in metadata_of(policy_folder / "tiny.safetensors")
    assert loaders.load_policies(plain) == loaders.load_policies(policy_folder)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


TENSORS = {
    "numbers": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "one": torch.tensor(2, dtype=torch.int8),
    "none": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def test_tensors_and_metadata_come_back_without_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_tensors(file, "file", TENSORS, {"a": "1"})
    tensors, metadata = load_tensors(file, "file", ("a", "b"))
    assert metadata == {"a": "1"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"numbers": TENSORS["numbers"].reshape(3, 2)}, {}),
        ({"numbers": TENSORS["numbers"].view(torch.int32)}, {}),
        ({"numbers": TENSORS["numbers"] + 1}, {}),
        ({"more": TENSORS["numbers"]}, {}),
        ({}, {"a": "2"}),
        ({}, {"b": "1"}),
        ({}, {CHECKSUM: ""}),
        ({}, {"sha257": "1"}),
    ],
)
def test_a_change_in_shape_type_value_name_or_metadata_is_found(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    file = tmp_path / "some.safetensors"
    save_tensors(file, "file", TENSORS, {"a": "1"})
    save_file(load_file(file) | tensors, file, metadata=metadata_of(file) | metadata)
    with pytest.raises(PolicyFileError, match=r"file .*some\.safetensors has "):
        load_tensors(file, "file", ("a", "b"))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 3}, r"model\.safetensors: config\.json asks for no tensor 'model\.layers\.3\."),
        ({"num_hidden_layers": 2**40}, r"config\.json: 1099511627776 layers"),
        ({"num_labels": 2**40, "num_hidden_layers": 5}, r"model\.layers\.4\..* is missing, but config\.json asks"),
        ({"max_position_embeddings": 2**40}, "context of 1099511627776 tokens"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta .* positive number"),
        ({"eos_token_id": 260}, "260 is outside its vocabulary of 260"),
        ({"head_dim": 25}, "head_dim.*25"),
    ],
)
def test_a_configuration_that_contradicts_itself_or_the_weights_is_corrupt(
    model_folder: Path, changes: dict[str, Any], named: str
) -> None:
    (model_folder / "generation_config.json").unlink()
    change_json(model_folder / "config.json", **changes)
    with pytest.raises(CorruptCheckpoint, match=named):
        check_weights(open_weights(model_folder), load_model_config(model_folder))


def test_weights_that_are_not_finite_are_corrupt(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, file)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: tensor model\.norm\.weight .* not finite"):
        open_weights(model_folder)["model.norm.weight"]


def test_large_weights_are_finite_though_their_sum_is_not(tmp_path: Path) -> None:
    save_file({"w": torch.full((4,), 3e38)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path)["w"].max() > 2e38


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_no_file_is_waited_for(model_folder: Path, name: str) -> None:
    (model_folder / name).unlink()
    os.mkfifo(model_folder / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        loaders.load_folder(model_folder)


def test_a_flipped_bit_in_converted_weights_leads_to_another_conversion(originals: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(originals / "cache", tmp_path / "cache"))
    weights = cache / "kept" / loaders.CONVERSION / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors has changed since it was written"):
        loaders.load_converted_folder(cache)
    assert "model.safetensors has changed" in (loaders.load_conversion(cache).message or "")
    assert weights.read_bytes() == whole
    assert loaders.load_conversion(cache).message is None


def test_a_conversion_from_before_its_manifest_had_a_digest_is_used(originals: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(originals / "cache", tmp_path / "cache"))
    manifest = cache / "kept" / loaders.CONVERSION / MANIFEST_FILE
    old = json.loads(manifest.read_text())
    del old["sha256"]
    old["files"]["model.safetensors"]["sha256"] = None
    manifest.write_text(json.dumps(old))
    assert loaders.load_conversion(cache).message is None
    assert resolve_checkpoint(str(manifest.parent), None, tmp_path) == manifest.parent


def test_what_an_error_quotes_is_short_and_printable() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10_000, "two\nlines", "\ud800\x00", deep, list(range(1000)), {"a": "b" * 1000}, 10**4000):
        assert len(quoted(value)) <= 200
        assert quoted(value).isprintable()
        if value is not deep:
            assert len(one_line(value)) <= 200
            assert one_line(value).isprintable()
