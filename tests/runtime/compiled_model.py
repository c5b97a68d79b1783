"""A small model with a policy, and every program that decoding it needs, really compiled."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.inductor import program_specs, skip_specs
from dash_runtime.policy.learned import BudgetCalibration, LearnedPolicy, PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy_file import model_fingerprint, save_policy
from dash_runtime.programs.compile_program import sample
from dash_runtime.programs.program_cache import Program, ProgramSpec, load_programs
from dash_runtime.startup.policy_programs import PolicyPrograms
from tests.runtime.support import ALL_ACTIONS, load_decoder, some_affine, some_costs
from tests.tiny_models import NUM_LAYERS, save_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 272}
"""Small sizes that the programs can stand for."""
NUM_THREADS = 2
BUDGETS = (0.5, 0.9)


@dataclass(frozen=True)
class CompiledModel:
    """The model's folder, its policy's file, and a cache folder that has all programs."""

    folder: Path
    policy_file: Path
    cache_folder: Path
    programs: dict[ProgramSpec, Program]


class UncompiledProgram(Program):
    """A program's module, run eagerly."""

    def __init__(self, spec: ProgramSpec) -> None:
        self._module, inputs, _ = sample(spec)
        self._structure = pytree.tree_structure(inputs)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        return pytree.tree_leaves(self._module(*pytree.tree_unflatten(inputs, self._structure)))


def compile_model(folder: Path) -> CompiledModel:
    """Makes the model below `folder`: full and sliding attention and biases in one, as all layers share programs."""
    model = save_tiny_model(folder / "model", "qwen2-sliding-window", **SIZES)
    config = load_model_config(model)
    policy = random_policy(model)
    policy_file = folder / "policy.safetensors"
    save_policy(policy_file, policy, model_fingerprint(config, open_weights(model)))
    specs = [*program_specs(config, ALL_ACTIONS, NUM_THREADS), *PolicyPrograms(config, policy, NUM_THREADS, None).specs]
    specs += skip_specs(config, Action.INT8, 16, NUM_THREADS)
    said: list[str] = []
    programs = load_programs(specs, folder / "cache" / "programs", said.append)
    assert programs is not None, said
    return CompiledModel(model, policy_file, folder / "cache", programs)


def random_policy(folder: Path) -> LearnedPolicy:
    """A policy that has learned nothing and takes every action somewhere."""
    generator = torch.Generator().manual_seed(5)
    width, block_size, embedding_size = 16, 1, 4

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    spec = PlanSpec(
        actions=ALL_ACTIONS,
        pinned=frozenset((0, NUM_LAYERS - 1)),
        lookahead=1,
        block_size=block_size,
        head=Action.INT8,
        costs=some_costs(),
    )
    num_blocks = len(spec.decision_blocks)
    network = PolicyNetwork(
        block_embedding=random(num_blocks, embedding_size),
        action_embedding=random(len(Action), embedding_size),
        input_weight=random(width, SIZES["hidden_size"] + 2 * embedding_size + 3),
        input_bias=random(width),
        output_weight=random(num_blocks, block_size, len(ALL_ACTIONS), width),
        output_bias=random(num_blocks, block_size, len(ALL_ACTIONS)),
    )
    low, high = BUDGETS
    return LearnedPolicy(
        name="random-network",
        network=network,
        spec=spec,
        compensation=some_affine(load_decoder(folder, torch.bfloat16)),
        calibration=BudgetCalibration(((low, 1.0), (high, -1.0)), (0.4, 0.1), high),
    )
