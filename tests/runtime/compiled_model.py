"""A small model with a policy, and every program that decoding it needs, really compiled."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils import _pytree as pytree

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.decoder.backends.needed_programs import program_specs, skip_specs
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import save_policy
from dash_runtime.programs.compile_program import sample
from dash_runtime.programs.program_cache import Program, ProgramSpec, load_programs
from dash_runtime.startup.policy_programs import PolicyPrograms
from tests.runtime.random_policy import random_policy
from tests.runtime.support import ALL_ACTIONS
from tests.tiny_models import save_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 272}
"""Small sizes that the programs can stand for."""
NUM_THREADS = 2
BUDGETS = (0.5, 0.85)


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
    policy = random_policy(model, BUDGETS, block_size=1)
    policy_file = folder / "policy.safetensors"
    save_policy(policy_file, policy, model_fingerprint(config, open_weights(model)))
    specs = [*program_specs(config, ALL_ACTIONS, NUM_THREADS), *PolicyPrograms(config, policy, NUM_THREADS, None).specs]
    specs += skip_specs(config, Action.INT8, 16, NUM_THREADS)
    said: list[str] = []
    programs = load_programs(specs, folder / "cache" / "programs", said.append)
    assert programs is not None, said
    return CompiledModel(model, policy_file, folder / "cache", programs)
