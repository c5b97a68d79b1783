"""A narrow head has exact logits for the likeliest tokens, INT4's for other likely ones, rough ones for the rest."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.decoder.backends.packed_model import PackedModel, Part, pack_head, pack_narrow_head
from dash_runtime.layers.heads import Head
from dash_runtime.layers.narrow_head import NUM_LIKELY, HeadMap, narrow_head
from dash_runtime.layers.norm import RmsNorm
from dash_runtime.layers.shortlist import NUM_EXACT_TILES, int4_logits
from dash_runtime.linears.dense_linear import FullLinear
from dash_runtime.linears.grouped_matrix import LANES, quantize_int4_with_rest
from dash_runtime.model_config import ModelConfig
from dash_runtime.native.model import HeadRows
from tests.runtime.native_code import native_library

pytestmark = pytest.mark.usefixtures("each_level")

VOCABULARY, SIZE, RANK, MARGIN = 10096, 96, 32, 14.0
"""631 tiles, which no number of threads divides, and more tokens than are computed again."""
LOUDEST = torch.arange(3, 35)


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> ModelConfig:
    return replace(load_model_config(tiny_folder), hidden_size=SIZE)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return (torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1).bfloat16()


@pytest.fixture(scope="module")
def head_map() -> HeadMap:
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(SIZE, RANK, generator=generator)).Q
    return HeadMap(basis.T.contiguous(), basis, torch.rand(VOCABULARY, generator=generator))


def some_rows(num_rows: int, head_map: HeadMap) -> Tensor:
    """States that the map nearly keeps."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(num_rows, RANK, generator=generator) @ head_map.narrow
    return (own + 0.05 * torch.randn(num_rows, SIZE, generator=generator)).bfloat16()


def norm_of(config: ModelConfig) -> RmsNorm:
    return RmsNorm(torch.ones(SIZE).bfloat16(), config.rms_norm_eps)


def head(config: ModelConfig, weight: Tensor, head_map: HeadMap, threads: int = 1, multiplier: float = 1.0) -> HeadRows:
    backend = NativeBackend(config, native_library(), tuple(Action), threads, shares_heads=False)
    tensors = {"embedding": weight, "final_norm": norm_of(config).weight}
    pack_head(dict.fromkeys(Part, tensors.__setitem__), FullLinear(weight), LOUDEST)
    pack_narrow_head(tensors.__setitem__, weight, LOUDEST, head_map)
    return backend.heads.make(PackedModel(config, tensors), multiplier, head_map)[Action.SKIP]


def logits_of_likely(config: ModelConfig, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of all tokens by the rounded matrix, and by the exact one, float32 `[rows, VOCABULARY]`."""
    normed = norm_of(config)(rows).float()
    rounded = quantize_int4_with_rest(weight, LOUDEST).dequantized()
    return torch.cat((normed, normed[:, LOUDEST]), dim=1) @ rounded.T, normed @ weight.float().T


def eager_head(config: ModelConfig, weight: Tensor, head_map: HeadMap, multiplier: float = 1.0) -> Head:
    rounded = int4_logits(weight, LOUDEST)
    return narrow_head(weight, rounded, FullLinear(weight), head_map, norm_of(config), multiplier)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 3, 11])
def test_the_likeliest_tokens_have_exact_logits_likely_ones_rounded_and_the_rest_rough_ones(
    config: ModelConfig, weight: Tensor, head_map: HeadMap, num_rows: int, threads: int
) -> None:
    rows = some_rows(num_rows, head_map)
    logits = head(config, weight, head_map, threads)(rows)
    rounded, exact = logits_of_likely(config, weight, rows)
    is_best = exact >= exact.topk(NUM_EXACT_TILES // 4).values[:, -1:]  # the others may be others by rounded logits
    for row in range(num_rows):
        likely = logits[row] > logits[row].max() - MARGIN + 2  # by rough logits: near the margin either may be
        assert 0 < likely.sum() < NUM_LIKELY
        torch.testing.assert_close(logits[row][is_best[row]], exact[row][is_best[row]], atol=0.02, rtol=0.005)
        off = torch.minimum((logits - rounded)[row].abs(), (logits - exact)[row].abs())
        assert (off[likely] <= 0.05 + 0.01 * exact[row][likely].abs()).all()
        rest = logits[row] < logits[row].max() - MARGIN - 2
        assert rest.sum() > VOCABULARY / 4
        rough = (logits - exact)[row][rest]
        assert 0.1 < rough.abs().mean() < 2
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))


def test_a_row_has_the_same_bits_among_any_number_of_others_with_any_number_of_threads(
    config: ModelConfig, weight: Tensor, head_map: HeadMap
) -> None:
    rows = some_rows(17, head_map)
    alone = torch.cat([head(config, weight, head_map)(row) for row in rows.split(1)])
    for threads in (1, 2, 5):
        own = head(config, weight, head_map, threads)
        for num_rows in range(1, 18):
            assert torch.equal(own(rows[:num_rows]), alone[:num_rows]), (num_rows, threads)


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_many_rows_have_nearly_the_logits_that_native_code_computes(
    config: ModelConfig, weight: Tensor, head_map: HeadMap, multiplier: float, scale: float
) -> None:
    """Logits that lie close together leave room for only some of those within the margin."""
    weight, rows = weight * scale, some_rows(40, head_map)
    native = head(config, weight, head_map, 2, multiplier)(rows)
    eager = eager_head(config, weight, head_map, multiplier)(rows)
    is_near = (native - eager).abs() <= 0.02 * native.abs().mean() + 0.02 * native.abs()
    assert is_near.float().mean() > 0.98  # a token at the edge of a bin may be computed again by one alone
    chosen = native.gather(1, eager.argmax(-1, keepdim=True))
    torch.testing.assert_close(chosen, native.amax(-1, keepdim=True), atol=0.02 * scale, rtol=0.01)


def test_no_token_is_computed_again_where_more_than_there_is_room_for_are_equal(
    config: ModelConfig, weight: Tensor, head_map: HeadMap
) -> None:
    same = weight[:1].expand(VOCABULARY, -1).contiguous()
    flat = HeadMap(head_map.narrow, head_map.widen, torch.zeros(VOCABULARY))
    rows = some_rows(3, head_map)
    logits = head(config, same, flat, 2)(rows)
    rest = logits[:, NUM_EXACT_TILES * LANES :]  # of equal tiles the first have exact logits
    assert (rest == rest[:, :1]).all()
    _, exact = logits_of_likely(config, same, rows)
    again = slice(0, NUM_EXACT_TILES * LANES)
    torch.testing.assert_close(logits[:, again], exact[:, again], atol=0.05, rtol=0.01)
    torch.testing.assert_close(logits, eager_head(config, same, flat)(rows), atol=0.05, rtol=0.02)


def test_logits_of_what_is_no_number_are_none_and_its_neighbours_stay(
    config: ModelConfig, weight: Tensor, head_map: HeadMap
) -> None:
    rows = some_rows(9, head_map)
    expected = head(config, weight, head_map)(rows)
    rows[4, 41] = float("nan")
    for num_rows in (6, 9):
        logits = head(config, weight, head_map, threads=2)(rows[:num_rows])
        others = [row for row in range(num_rows) if row != 4]
        assert torch.equal(logits[others], expected[others])
        assert logits[4].isnan().all()
