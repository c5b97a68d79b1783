"""Trains a budget-conditioned policy with its compensation: fitted cost-to-go, in rounds.

Each round measures what other actions would have cost along the present policy's paths (labels.py), fits a network to
all labels so far (damage_model.py), and distils the compensation along the new policy's paths (distill.py). A stopped
run resumes to the same result. Knows the loop; knows no command line.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import LowRank, PackedLowRank, packed
from dash_runtime.policy.network import PolicyNetwork, facts_of
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import greedy_choice
from dash_runtime.rollout.rollout import Choose, costs_by_action
from dash_runtime.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dash_runtime.training.damage_model import FitSettings, fit_damages
from dash_runtime.training.dense_decoder import Compensate, DenseDecoder, Text, token_batch
from dash_runtime.training.distill import DistillSettings, distill_compensation
from dash_runtime.training.labels import Labeller, Labels, SpoiltContext
from dash_runtime.training.loss import Loss, Objective
from dash_runtime.training.paths import run_path, skip_kernel

_JUDGED = (0.25, 0.5, 0.75)
"""The prices by which progress is shown, as places in the logarithmic range."""
_DISTILLED = (0.1, 0.7)
"""Compensation is distilled at prices from this part of the range: at the dearest nearly everything is skipped."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """A round labels `batches` batches of `sequences` sequences, each at `changes` pairs of a layer and an action.

    `price_range` bounds λ, the price of a whole token's cost, which is drawn for each sequence.
    """

    rounds: int = 6
    batches: int = 8
    sequences: int = 16
    changes: int = 6
    distill_steps: int = 40
    distill_sequences: int = 8
    num_prompt_tokens: int = 16
    price_range: tuple[float, float] = (0.1, 6.0)
    objective: Objective = Objective.DIVERGENCE
    seed: int = 0
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        for name in ("rounds", "batches", "sequences", "changes"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")

    def log_price(self, place: float) -> float:
        """Returns log λ at a place of the range, 0 to 1."""
        low, high = (math.log(price) for price in self.price_range)
        return low + place * (high - low)


@dataclass(frozen=True, slots=True)
class Reached:
    """The means of the policy at one price: `cost` without the head's saving, as a share of full depth."""

    cost: float
    loss: float


class TrainProgress(Protocol):
    """Is told how far training is."""

    def note(self, text: str) -> None: ...

    def batch(self, done: int, num_labels: int) -> None:
        """Receives the number of labelled batches so far, in all rounds."""

    def round(self, number: int, num_labels: int, reached: Sequence[Reached]) -> None:
        """Receives a finished round, and the policy's outcome at three prices."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of training: a network, and the compensation that it runs with."""

    network: PolicyNetwork
    compensation: LowRank


class Trainer:
    """One run of training.

    Args:
        spec: the terms of the policy.
        decoder: the model, with the spec's kernels.
        sequences: the text, all of one length.
        held_out: text by which the compensation is chosen and progress is shown.
    """

    def __init__(
        self,
        spec: PlanSpec,
        decoder: DenseDecoder,
        sequences: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
        settings: TrainSettings,
        progress: TrainProgress,
    ) -> None:
        self._spec = spec
        self._decoder = decoder
        self._sequences = sequences
        self._held_out = held_out
        self._token_ids = token_batch(sequences, settings.num_prompt_tokens)
        self._settings = settings
        self._progress = progress
        self._kernel = skip_kernel(spec.actions)

    def run(self, compensation: LowRank, checkpoint_file: Path) -> Trained:
        """Trains, starting with `compensation`. The state is written after each round. A run that finds it goes on
        there and ends as without the stop, since each round draws from its own seed.

        Raises:
            TrainingDiverged: a loss is not a number; the last checkpoint is intact.
            PolicyFileError: the checkpoint is damaged or of another run, or cannot be written.
        """
        state = Checkpoint(0, None, compensation, SpoiltContext.nothing(self._spec.num_layers), None)
        signature = self._signature()
        if checkpoint_file.exists():
            state = load_checkpoint(checkpoint_file, signature)
        while state.rounds < self._settings.rounds:
            state = self._round(state)
            save_checkpoint(checkpoint_file, signature, state)
        assert state.network is not None
        return Trained(state.network, state.compensation)

    def _round(self, before: Checkpoint) -> Checkpoint:
        settings, number = self._settings, before.rounds
        seed = settings.seed * 1_000_003 + number
        generator = torch.Generator().manual_seed(seed)
        served, spoilt = _as_served(before.compensation, self._decoder), before.spoilt.copy()
        parts = [] if before.labels is None else [before.labels]
        for batch in range(settings.batches):
            parts += self._label(before.network, served, spoilt, generator)
            done = number * settings.batches + batch + 1
            self._progress.batch(done, sum(len(part.damage) for part in parts))
        labels = Labels.joined(parts)
        del parts
        network = fit_damages(self._spec, labels, settings.fit, seed).network(self._by_block(spoilt.factors()))
        compensation = self._distilled(network, before.compensation, seed)
        self._progress.round(number, len(labels.damage), self._reached(network, compensation))
        return Checkpoint(number + 1, network, compensation, spoilt, labels)

    def _label(
        self, network: PolicyNetwork | None, compensate: Compensate, spoilt: SpoiltContext, generator: torch.Generator
    ) -> list[Labels]:
        """Labels one batch along the network's paths; without one, along full depth's."""
        settings, spec = self._settings, self._spec
        picked = torch.randint(len(self._token_ids), (settings.sequences,), generator=generator)
        text = self._decoder.text(self._token_ids[picked], settings.num_prompt_tokens)
        places = torch.rand(settings.sequences, generator=generator)
        log_price = self._by_token(torch.tensor([settings.log_price(place) for place in places.tolist()]), text)
        path = run_path(self._decoder, text, spec, compensate, self._choice(network, log_price))
        facts = [facts_of(own.last_actions, own.cost_spent, log_price, len(Action)) for own in path.observations]
        loss = Loss(self._decoder, text.full, settings.objective)
        labeller = Labeller(self._decoder, text, spec, compensate, path, facts, loss)
        labels: list[Labels] = []
        order = torch.randperm(len(spec.free_layers), generator=generator)[: settings.changes].tolist()
        for layer in (spec.free_layers[place] for place in order):
            # Most changes are skips: most of the damage is theirs, and most of what there is to learn.
            kernels = [action for action in spec.actions[:-1] if action is not Action.SKIP]
            draw = int(torch.randint(4 * max(1, len(kernels)), (1,), generator=generator))
            action = kernels[draw] if draw < len(kernels) else Action.SKIP
            others = labeller.others(layer, action)
            own, change = labeller.measure(layer, others)
            labels.append(own)
            if action is Action.SKIP and layer == spec.free_layers[order[-1]]:
                labeller.add_spoilt(spoilt, layer, others, change, generator)
        return labels

    def _choice(self, network: PolicyNetwork | None, log_price: Tensor) -> Choose:
        if network is None:
            precise = int(max(self._spec.actions))
            return lambda block, hidden, *_: torch.full((len(block), len(hidden)), precise)
        return greedy_choice(self._spec, network, log_price)

    def _by_token(self, log_prices: Tensor, text: Text) -> Tensor:
        return log_prices.repeat_interleave(text.token_ids.shape[1])

    def _by_block(self, factors: Tensor) -> Tensor:
        """Returns a factor of each layer, `[num_layers]`, as `[num_blocks, block_size]`."""
        blocks = torch.ones(len(self._spec.decision_blocks), self._spec.block_size)
        for number, block in enumerate(self._spec.decision_blocks):
            blocks[number, : len(block)] = factors[list(block)]
        return blocks

    def _distilled(self, network: PolicyNetwork, start: LowRank, seed: int) -> LowRank:
        """Distils the compensation along the policy's paths, at a price drawn for each sequence."""
        settings = self._settings
        if settings.distill_steps == 0:
            return start
        generator = torch.Generator().manual_seed(seed)

        def actions_for(text: Text, compensate: Compensate) -> Tensor:
            low, high = (settings.log_price(place) for place in _DISTILLED)
            prices = torch.empty(len(text.token_ids)).uniform_(low, high, generator=generator)
            choose = self._choice(network, self._by_token(prices, text))
            return run_path(self._decoder, text, self._spec, compensate, choose).actions

        def report(step: int, divergence: float) -> None:
            if step % 20 == 0:
                self._progress.note(f"distilling the compensation, step {step}: divergence {divergence:.3f}")

        distillation = DistillSettings(
            settings.distill_steps,
            settings.distill_sequences,
            seed=seed,
            num_prompt_tokens=settings.num_prompt_tokens,
        )
        return distill_compensation(
            self._decoder, start, self._sequences, actions_for, distillation, report, self._held_out, self._kernel
        )

    @torch.no_grad()
    def _reached(self, network: PolicyNetwork, compensation: LowRank) -> list[Reached]:
        """Returns the outcome on the held-out text at three prices."""
        settings, spec = self._settings, self._spec
        text = self._decoder.text(token_batch(self._held_out, settings.num_prompt_tokens), settings.num_prompt_tokens)
        loss = Loss(self._decoder, text.full, settings.objective)
        served, costs = _as_served(compensation, self._decoder), costs_by_action(spec.costs)
        reached: list[Reached] = []
        for place in _JUDGED:
            log_price = self._by_token(torch.full((len(text.token_ids),), settings.log_price(place)), text)
            path = run_path(self._decoder, text, spec, served, self._choice(network, log_price))
            layers = costs[path.actions].sum(0).mean()
            evaluations = len(spec.decision_blocks) * spec.costs.evaluation
            cost = float(layers) + spec.costs.head[spec.head] + spec.costs.fixed + evaluations
            reached.append(Reached(cost, float(loss(path.states[-1]).mean())))
        return reached

    def _signature(self) -> str:
        """Returns a text that differs between runs that must not resume from each other's checkpoints."""
        spec = self._spec
        settings = asdict(self._settings) | {"rounds": None}  # more rounds go on with what is there
        layers = [sorted(spec.pinned.items()), spec.head.name, spec.lookahead, spec.block_size]
        text = [len(self._token_ids), int(self._token_ids.sum())]
        return json.dumps([settings, [action.name for action in spec.actions], *layers, text])


def _as_served(compensation: LowRank, decoder: DenseDecoder) -> LowRank:
    """Returns the compensation, rounded as it is served: the packed form itself is slow for many rows."""
    served = packed(compensation, decoder.dtype)
    return served.to_low_rank() if isinstance(served, PackedLowRank) else served
