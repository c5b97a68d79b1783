"""The rungs of the ladder: computed, packed and stored."""

from pathlib import Path

import pytest
import torch

from dash_runtime.checkpoints import load_model_config
from dash_runtime.errors import PolicyFileError
from dash_runtime.layers.compensation import LowRank, PackedLowRank, packed
from dash_runtime.policy.compensation_file import load_compensation, restored, save_compensation, stored
from tests.runtime.support import CPU
from tests.tiny_models import HIDDEN_SIZE, NUM_LAYERS


def low_rank(rank: int = 16) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    down = 0.1 * torch.randn(NUM_LAYERS, rank, HIDDEN_SIZE, generator=generator)
    up = 0.1 * torch.randn(NUM_LAYERS, HIDDEN_SIZE, rank, generator=generator)
    return LowRank(down, up, 0.1 * torch.randn(NUM_LAYERS, HIDDEN_SIZE, generator=generator))


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("rung", [low_rank(), packed(low_rank(), torch.bfloat16)])
def test_a_row_is_compensated_alike_alone_and_among_others(rung: LowRank | PackedLowRank) -> None:
    hidden = rows(9)
    alone = torch.cat([rung(2, row) for row in hidden.split(1)])
    assert torch.equal(rung(2, hidden), alone)


def test_a_packed_map_is_the_map_that_it_was_made_of_but_for_rounding() -> None:
    whole, small = low_rank(), packed(low_rank(), torch.bfloat16)
    assert isinstance(small, PackedLowRank)
    delta = whole(3, rows(20)).float() - rows(20).float()
    error = small(3, rows(20)).float() - whole(3, rows(20)).float()
    assert error.norm() < 0.02 * delta.norm()
    assert sum(t.nbytes for t in small.tensors().values()) < 0.4 * sum(t.nbytes for t in whole.tensors().values())


@pytest.mark.parametrize(("rank", "dtype"), [(12, torch.bfloat16), (16, torch.float32)])
def test_a_map_that_the_kernel_has_no_form_for_stays_as_it_is(rank: int, dtype: torch.dtype) -> None:
    whole = low_rank(rank)
    assert packed(whole, dtype) is whole


def test_storing_what_was_restored_gives_the_same_tensors(tiny_folder: Path) -> None:
    config = load_model_config(tiny_folder)
    first = stored(low_rank())
    again = stored(restored("low_rank", first, config, torch.bfloat16, CPU))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name


def test_a_compensation_file_is_for_one_model_and_is_checked(tiny_folder: Path, tmp_path: Path) -> None:
    config = load_model_config(tiny_folder)
    path = tmp_path / "compensation.safetensors"
    save_compensation(path, low_rank(), "mine")

    def load(fingerprint: str = "mine") -> object:
        return load_compensation(path, config, fingerprint, dtype=torch.bfloat16, device=CPU)

    assert isinstance(load(), PackedLowRank)
    with pytest.raises(PolicyFileError, match="another model"):
        load("another")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(PolicyFileError, match=r"compensation\.safetensors"):
        load()


@pytest.mark.parametrize("broken", ["down_scales", "down", "offsets", "missing", "wide"])
def test_tampered_low_rank_tensors_are_refused(broken: str, tiny_folder: Path) -> None:
    config = load_model_config(tiny_folder)
    tensors = stored(low_rank())
    if broken == "missing":
        del tensors["up"]
    elif broken == "wide":
        tensors["up"] = tensors["up"][:, :-1]
    elif broken == "down":
        tensors["down"] = tensors["down"].float()
    else:
        tensors[broken] = torch.full_like(tensors[broken], float("nan"))
    with pytest.raises(PolicyFileError):
        restored("low_rank", tensors, config, torch.bfloat16, CPU)
