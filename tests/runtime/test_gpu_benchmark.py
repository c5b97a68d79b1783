"""The GPU benchmark is right wherever it runs; only the device's name differs here."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import (
    BATCH_SIZES,
    FULL_DEPTH,
    PARITY_TOKENS,
    Engines,
    adaptive,
    build,
    device_parity,
    equal_tokens,
    generate,
    lane_parity,
    main,
    speeds,
    tokens_alone,
    tokens_of_transformers,
)
from dash_runtime.config import LaneKind

PROMPTS = [[1, 2, 3], [40, 50, 60, 70], [7]]


@pytest.fixture(scope="module")
def engines(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    cache_folder = tmp_path_factory.mktemp("cache")
    lanes = (LaneKind.INLINE, LaneKind.THREAD)
    return {lane: build(tiny_folder, cache_folder, "cpu", "float32", lane) for lane in lanes}


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_cuda_device_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out == "no CUDA device: nothing measured\n"


def test_only_the_tokens_before_the_first_difference_count_as_equal() -> None:
    assert equal_tokens([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 9, 3], [9, 2, 3]]) == [3, 1, 0]


def test_a_batch_of_any_measured_size_decodes_in_the_same_steps(engines: Engines) -> None:
    for size in BATCH_SIZES:
        prompts = [PROMPTS[place % len(PROMPTS)] for place in range(size)]
        run = generate(engines[LaneKind.INLINE], prompts, 5, adaptive(engines[LaneKind.INLINE]))
        assert [len(tokens) for tokens in run.tokens] == [5] * size
        assert 0 < run.exposed_seconds < run.step_seconds


def test_full_depth_exposes_no_policy(engines: Engines) -> None:
    assert generate(engines[LaneKind.INLINE], PROMPTS, 3, FULL_DEPTH).exposed_seconds == 0


def test_tokens_in_float32_are_those_of_transformers(engines: Engines, tiny_folder: Path) -> None:
    expected = tokens_of_transformers(tiny_folder, "cpu", "float32", PROMPTS, 12)
    assert tokens_alone(engines[LaneKind.INLINE], PROMPTS, 12, FULL_DEPTH) == expected


def test_parities_that_must_hold_hold_where_there_is_one_device(
    engines: Engines, tiny_folder: Path, tmp_path: Path
) -> None:
    figures = [device_parity(tiny_folder, tmp_path, "cpu", PROMPTS[:1]), *lane_parity(engines, PROMPTS[:1])]
    assert [figure.low for figure in figures] == [PARITY_TOKENS] * 2


def test_speeds_name_every_mode_and_lane_and_inline_is_its_own_baseline(engines: Engines) -> None:
    figures = {figure.name: figure for figure in speeds(engines, PROMPTS, 4, 2)}
    for name in ("full_depth", "int8", "int4", "adaptive_inline", "adaptive_thread"):
        assert figures[f"batch3_{name}_tokens_per_second"].low > 0
    assert 0 < figures["batch3_inline_exposed_share_of_token"].value < 1
    assert figures["batch3_inline_overlap"].value == 0
    assert figures["batch3_inline_speed_vs_inline"].value == 1
    assert figures["batch3_thread_overlap"].value < 1
