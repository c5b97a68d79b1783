"""Fixtures for the evaluation's tests: both runners, an engine, and transformers to compare with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dash_runtime.actions import Action
from dash_runtime.config import EngineConfig
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.engine import Engine
from dash_runtime.evaluation.likelihood import Run, full_depth_runner, rollout_runner
from dash_runtime.policy.catalog import PolicyCatalog
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.startup.measured_engine import assemble_engine
from tests.runtime.support import ALL_ACTIONS, some_affine, some_costs, some_plans
from tests.tiny_models import NUM_LAYERS

CONTEXT = 128

Reference = Callable[[Sequence[int]], torch.Tensor]
"""Maps token ids to log-probabilities, `[tokens, vocab_size]`."""


def load_reference(folder: Path) -> Reference:
    """Loads the model with transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.inference_mode()
    def log_probs(token_ids: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([list(token_ids)])).logits[0].log_softmax(dim=-1)

    return log_probs


def encode(text: str) -> list[int]:
    """Encodes as the tiny models' tokenizer does: a token is a byte."""
    return list(text.encode())


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")


def full_depth(decoder: Decoder, **options: int) -> Run:
    return full_depth_runner(decoder, some_costs(), **{"context_length": CONTEXT, **options})


def runner_of(decoder: Decoder, action: Action, head: Action = Action.FULL, **options: Any) -> Run:
    """Takes one action wherever there is a choice."""

    def choose(block: tuple[int, ...], hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.full((len(block), len(hidden)), int(action))

    spec = PlanSpec(
        actions=ALL_ACTIONS,
        pinned=dict.fromkeys((0, NUM_LAYERS - 1), Action.FULL),
        lookahead=1,
        block_size=1,
        head=head,
        costs=some_costs(),
    )
    return rollout_runner(decoder, spec, some_affine(decoder), choose, context_length=CONTEXT, **options)


def make_engine(decoder: Decoder, eos: frozenset[int] = frozenset()) -> Engine:
    config = EngineConfig(num_slots=2)
    catalog = PolicyCatalog(some_costs(), ALL_ACTIONS, some_affine(decoder), (), 0.8, plans=some_plans())
    return assemble_engine(decoder, catalog, config, CONTEXT, eos)
