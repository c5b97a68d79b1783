"""Tests each family beyond its decoder's numbers: rows of any action, EXACT, and policies."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.commands.cli import main
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.kv_cache import SequenceCache
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import load_policy
from dash_runtime.startup.model_facts import model_facts
from tests.marks import long
from tests.runtime.random_policy import random_policy
from tests.runtime.support import (
    ALL_ACTIONS,
    CPU,
    drain,
    full_plan,
    load_decoder,
    new_cache,
    policy_arguments,
    run_rows,
    some_affine,
    some_costs,
    some_plans,
    tokens,
)
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("short_measurements")

TRAINED = ["qwen3-moe", *long(["granite", "gemma3"])]
"""Families whose factors, norms or experts training has to know; test_dense_decoder.py has the passes of all."""
FAMILIES = ("granite", "smollm3", "phi3-longrope", "olmo2", "olmo3-yarn", "ministral3", "gemma3", "qwen3-moe")
NEARLY_FREE = {1: 0.5, 3: 0.5, 7: 0.5}
"""Verifications so cheap that the engine drafts whatever is accepted."""
PROMPTS = [list(range(1, 4 + 9 * row)) for row in range(5)]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param)


def mixed_plans(num_layers: int) -> list[Sequence[Action]]:
    return [[ALL_ACTIONS[(row + layer) % 4] for layer in range(num_layers)] for row in range(len(PROMPTS))]


@torch.inference_mode()
def test_rows_of_all_actions_have_the_same_bits_in_a_batch_as_alone(folder: Path) -> None:
    decoder = load_decoder(folder, torch.bfloat16)
    affine, plans = some_affine(decoder), mixed_plans(decoder.num_layers)
    alone, together = (prefilled(decoder) for _ in range(2))
    for step in range(4):
        token_ids = [[10 * row + step] for row in range(len(PROMPTS))]
        batched = run_rows(decoder, together, token_ids, plans, affine)
        rows = zip(alone, token_ids, plans, strict=True)
        single = [run_rows(decoder, [cache], [ids], [plan], affine) for cache, ids, plan in rows]
        assert torch.equal(batched, torch.cat(single))


def prefilled(decoder: Decoder) -> list[SequenceCache]:
    caches = [new_cache(decoder) for _ in PROMPTS]
    for cache, prompt in zip(caches, PROMPTS, strict=True):
        run_rows(decoder, [cache], [prompt], [full_plan(decoder)])
    return caches


def test_exact_requests_have_full_depths_tokens_and_adaptive_ones_end(folder: Path) -> None:
    assert_policy_serves(folder, random_policy(folder))


@pytest.mark.parametrize("family", TRAINED)
def test_a_policy_that_was_trained_for_it_serves(family: str, text: Path, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / family, family, num_hidden_layers=4)
    small = ["--rounds", "1", "--batches", "1", "--rank", "4", "--actions", "skip,full", "--block-size", "2"]
    common = policy_arguments(folder, text, cache=tmp_path / "cache")
    assert main(["train", *common, "--out", str(tmp_path / "run"), *small]) == 0
    config, weights = load_model_config(folder), open_weights(folder)
    fingerprint, file = model_fingerprint(config, weights), tmp_path / "run" / "policy.safetensors"
    assert_policy_serves(folder, load_policy(file, config, fingerprint, dtype=torch.float32, device=CPU))


def assert_policy_serves(folder: Path, policy: LearnedPolicy) -> None:
    decoder = load_decoder(folder)
    costs, plans = some_costs(decoder.num_layers), some_plans(decoder.num_layers)
    catalog = PolicyCatalog(costs, ALL_ACTIONS, Identity(), (policy,), 0.8, NEARLY_FREE, plans=plans)
    facts = model_facts(decoder, EngineConfig(), catalog.facts(), decoder.config.context_length, frozenset())
    engine = Engine(decoder, catalog, InlineLane(), facts, EngineConfig())

    def run(skip: SkipOptions) -> list[int]:
        engine.submit(GenerationRequest("a", PROMPTS[2], StoppingParameters(40, ignore_eos=True), skip=skip))
        return tokens(drain(engine)["a"])

    assert run(SkipOptions(Mode.EXACT, policy_name=policy.name)) == run(SkipOptions(Mode.FULL_DEPTH))
    assert len(run(SkipOptions(Mode.ADAPTIVE, policy_name=policy.name))) == 40
