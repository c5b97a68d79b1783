"""The programs of learned policies: their own, that of skipped layers, and those of layers that decide the next one.

Knows policies and programs; knows no files.
"""

from collections.abc import Mapping
from dataclasses import replace

from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.decoder.backends.needed_programs import layer_spec, skip_specs
from dash_runtime.layers.row_compensation import has_program, program_rank
from dash_runtime.model_config import ModelConfig
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.programs.program_cache import Program, ProgramKind, ProgramSpec


class PolicyPrograms:
    """Names the programs of one policy, and hands them to it.

    Args:
        lane: the kind that was asked for. Layers evaluate a policy only where nothing else is said.
    """

    def __init__(self, model: ModelConfig, policy: LearnedPolicy, num_threads: int, lane: LaneKind | None) -> None:
        self._policy = policy
        # In one thread, since waking another takes longer than a row.
        self._own = ProgramSpec(ProgramKind.POLICY, Action.FULL, policy.shape, 1)
        self._skips = skip_specs(model, policy.kv_action, program_rank(policy.compensation), num_threads)
        self._layers: dict[Action, ProgramSpec] = {}
        decides_next = policy.block_size == 1 and policy.lookahead == 1
        if decides_next and lane in (None, LaneKind.INLINE) and has_program(policy.compensation):
            for action in sorted({*policy.spec.actions, *policy.pinned.values()}):
                spec = self._skips[0] if action is Action.SKIP else layer_spec(model, action, num_threads)
                self._layers[action] = replace(spec, policy=policy.shape)

    @property
    def specs(self) -> list[ProgramSpec]:
        return [self._own, *self._skips, *self._layers.values()]

    def attached(self, programs: Mapping[ProgramSpec, Program]) -> LearnedPolicy:
        """Returns the policy with its programs."""
        layers = {action: programs[spec] for action, spec in self._layers.items()}
        return replace(self._policy, program=programs[self._own], layer_programs=layers or None)
