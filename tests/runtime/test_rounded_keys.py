"""Rounded layers attend to keys and values in INT8, where the processor multiplies bytes. Those in bf16 remain."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.planner import GroupPlanner
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.recipe import Level
from dash_runtime.passes import PassPlan, RowPlan
from tests.runtime.layer_case import FINER, Case
from tests.runtime.native_code import NATIVE_SIZES, native_library
from tests.runtime.native_model import SIZES, native_decoder
from tests.runtime.support import full_plan, run_rows
from tests.tiny_models import save_tiny_model

SPANS = ((140, 1), (133, 5), (64, 1), (17, 2))
"""Contexts of up to three blocks, whose last one is full, or holds anything from a position on."""
KERNELS = ("INT8", "INT4", "INT3", FINER)


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral-sliding-window"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, each_level: Level) -> Case:
    if not native_library().rounds_keys:
        pytest.skip("this processor's rounded layers attend to keys and values in bf16")
    family = request.param
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / family, family, **NATIVE_SIZES)
    return Case(folder, {"attention_scale": 1.0}, SPANS, num_positions=144)


@torch.inference_mode()
def test_they_differ_from_others_as_rounding_keys_and_values_says(case: Case) -> None:
    for kernel in KERNELS:
        outputs, in_bf16 = (case.run(kernel, keys_in_int8=own).outputs.float() for own in (True, False))
        expected, usual = (case.body(kernel, None, True, own).outputs for own in (True, False))
        torch.testing.assert_close(outputs, expected, rtol=0.01, atol=0.15)
        # Inputs that are nearly half-way between two bytes go either way, so no two runs are the same.
        both = torch.stack([(outputs - in_bf16).flatten(), (expected - usual).flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.3, kernel


@torch.inference_mode()
def test_whoever_reads_them_first_writes_the_same(case: Case) -> None:
    for kernel in KERNELS:
        together, alone = (case.run(kernel, False, Identity(), apart, keys_in_int8=True) for apart in (False, True))
        assert all(map(torch.equal, vars(together).values(), vars(alone).values())), kernel


@pytest.fixture(scope="module", params=["llama", "mistral-sliding-window"])
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, native_library: NativeLibrary
) -> Decoder:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param, **SIZES)
    return native_decoder(folder, native_library)


def prefilled(decoder: Decoder, count: int) -> list[SequenceCache]:
    """Returns caches of one pool that begin with the same 70 tokens."""
    caches = decoder.caches([256] * count)
    for cache in caches:
        run_rows(decoder, [cache], [[(41 * place + 7) % 250 for place in range(70)]], [full_plan(decoder)])
    return caches


def run_plans(
    decoder: Decoder, caches: Sequence[SequenceCache], actions: Sequence[Action], latencies: LatencyTable | None = None
) -> Tensor:
    """Runs the token 3 of each sequence with an action in all layers; returns the logits."""
    batch = decoder.batch(PassKind.DECODE, caches, [1] * len(caches), [Identity()] * len(caches))
    rows = [RowPlan(dict.fromkeys(range(decoder.num_layers), action)) for action in actions]
    planner = None if latencies is None else GroupPlanner(latencies)
    plan = PassPlan(rows, [Action.FULL] * len(caches), planner=planner)
    result = decoder.run_pass(plan, [3] * len(caches), batch)
    batch.commit()
    assert result.logits is not None
    return result.logits


@torch.inference_mode()
def test_what_takes_the_place_of_a_draft_is_what_rounded_layers_attend_to(decoder: Decoder) -> None:
    own, other = prefilled(decoder, 2)
    for _ in range(3):
        run_plans(decoder, [own], [Action.INT4])
    own.truncate(other.length)
    for cache in (own, other):
        run_rows(decoder, [cache], [[5]], [full_plan(decoder)])
    assert torch.equal(*(run_plans(decoder, [cache], [Action.INT4]) for cache in (own, other)))


@torch.inference_mode()
def test_a_row_in_full_depth_has_its_own_bits_beside_one_that_was_raised_to_full(decoder: Decoder) -> None:
    raising = LatencyTable((1,), {action: (11.0 - 2 * action,) for action in Action})
    alone, raised, beside = prefilled(decoder, 3)
    expected = run_plans(decoder, [alone], [Action.FULL])
    logits = run_plans(decoder, [raised, beside], [Action.INT4, Action.FULL], raising)
    assert torch.equal(logits[1:], expected)
    assert torch.equal(logits[:1], expected)  # it ran in full, too
