"""Trains a budget-conditioned policy with its compensation: fitted cost-to-go, around the policy's own paths.

Each step runs some text along the present policy's paths, at a price drawn for each sequence, and carries the
divergence's curvature and slope back through the layers. The one gives labels of all actions (labels.py), to which the
network is fitted (damage_model.py), the other the gradient of the compensation of what was skipped. A stopped run
resumes to the same result. Knows the loop; knows no command line.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.errors import ConfigError
from dash_runtime.layers.compensation import LowRank, packed, unpacked
from dash_runtime.policy.network import PolicyNetwork
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.rollout.choices import action_rates, greedy_choice
from dash_runtime.rollout.rollout import Choose, costs_by_action
from dash_runtime.training.checkpoint import Trainee, load_checkpoint, save_checkpoint
from dash_runtime.training.damage_model import DamageFit, DamageModel, FitSettings, harm_slope
from dash_runtime.training.dense_decoder import DenseDecoder, token_batch
from dash_runtime.training.labels import measure_labels
from dash_runtime.training.loss import Judged, TrainingDiverged, divergences, judge
from dash_runtime.training.paths import Path as TokenPath
from dash_runtime.training.paths import decided_rows, run_path
from dash_runtime.training.trained_compensation import CompensationTraining

_JUDGED = (0.25, 0.5, 0.75)
"""The prices by which progress is shown, as places in the logarithmic range."""
_JUDGED_SEQUENCES = 8
_PLACES = tuple(1 - step / 12 for step in range(12))
_USEFUL_DIVERGENCES = (0.1, 0.02)
"""Nats a token; a policy that diverges more than the first is hardly asked for."""
_EVENNESS = 1.5
"""Divergence grows by about this power of the price, or a little more."""
_FIRST_STEPS = 3
"""Steps along the most precise path, before the network knows anything."""
_MOST_KEPT = 1200
"""Sequences whose full-depth outputs are kept: 0.15 GB of the embedded model's."""
_WARMUP_SHARE = 0.05
_FINAL_RATE = 0.05


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """A round has `batches` steps of `sequences` sequences each.

    `price_range` bounds λ, the price of a whole token's cost, which is drawn for each sequence. `kernel_share` of the
    layers are measured with another kernel in each step.
    """

    rounds: int = 10
    batches: int = 24
    sequences: int = 8
    num_prompt_tokens: int = 16
    price_range: tuple[float, float] = (0.35, 4.2)
    kernel_share: float = 0.3
    seed: int = 0
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self) -> None:
        for name in ("rounds", "batches", "sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"must be at least 1, got {getattr(self, name)}")

    def log_price(self, place: float) -> float:
        """Returns log λ at a place of the range, 0 to 1."""
        low, high = (math.log(price) for price in self.price_range)
        return low + place * (high - low)

    def rate(self, step: int) -> float:
        """Returns the share of the learning rates in a step: up for a twentieth of the run, then down a cosine."""
        share = step / (self.rounds * self.batches)
        warmth = min(1.0, (share + 1e-3) / _WARMUP_SHARE)
        return warmth * (_FINAL_RATE + (1 - _FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2)


@dataclass(frozen=True, slots=True)
class Reached:
    """The means of the policy at one price: `cost` as a share of full depth, `divergence` in nats a token."""

    cost: float
    divergence: float


class TrainProgress(Protocol):
    """Is told how far training is."""

    def batch(self, done: int, num_labels: int) -> None:
        """Receives the numbers of steps and of labels so far, in all rounds."""

    def round(self, number: int, num_labels: int, reached: Sequence[Reached]) -> None:
        """Receives a finished round, and the policy's outcome at three prices."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of training: a network, the compensation that it runs with, and how often each layer runs with each
    action at prices that are of use, `[num_layers, number of actions]`."""

    network: PolicyNetwork
    compensation: LowRank
    rates: Tensor


class Trainer:
    """One run of training.

    Args:
        spec: the terms of the policy.
        decoder: the model, with the spec's kernels.
        sequences: the text, all of one length.
        held_out: text by which progress is shown.
        start: the compensation to begin with.
    """

    def __init__(
        self,
        spec: PlanSpec,
        decoder: DenseDecoder,
        sequences: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
        start: LowRank,
        settings: TrainSettings,
        progress: TrainProgress,
    ) -> None:
        self._spec = spec
        self._decoder = decoder
        self._token_ids = token_batch(sequences, settings.num_prompt_tokens)
        self._held_out = token_batch(held_out[:_JUDGED_SEQUENCES], settings.num_prompt_tokens)
        self._settings = settings
        self._progress = progress
        self._full: dict[int, Tensor] = {}
        self._num_labels = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = DamageModel(spec, decoder.config.hidden_size, settings.fit)
        self._fit = DamageFit(model, settings.fit)
        self._compensation = CompensationTraining(decoder, start, self._token_ids[: settings.sequences])
        self._trainees = {
            "network": Trainee(model, self._fit.optimizer),
            "compensation": Trainee(self._compensation.trained, self._compensation.optimizer),
        }

    def run(self, checkpoint_file: Path) -> Trained:
        """Trains. The state is written after each round. A run that finds it goes on there and ends as without the
        stop, since each step draws from its own seed.

        Raises:
            TrainingDiverged: a loss is not a number; the last checkpoint is intact.
            PolicyFileError: the checkpoint is damaged or of another run, or cannot be written.
        """
        settings, signature, done = self._settings, self._signature(), 0
        if checkpoint_file.exists():
            done = load_checkpoint(checkpoint_file, signature, self._trainees)
        for number in range(done, settings.rounds):
            for step in range(number * settings.batches, (number + 1) * settings.batches):
                self._step(step)
                self._progress.batch(step + 1, self._num_labels)
            self._progress.round(number, self._num_labels, self._reached())
            save_checkpoint(checkpoint_file, signature, number + 1, self._trainees)
        return Trained(self._fit.model.network(), self._compensation.trained.copy(), self._rates())

    def _step(self, step: int) -> None:
        settings = self._settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        picked = torch.randint(len(self._token_ids), (settings.sequences,), generator=generator)
        log_prices = self._by_token([settings.log_price(place) for place in _uniform(settings.sequences, generator)])
        choose = self._choice(log_prices) if step >= _FIRST_STEPS else self._precise
        compensation = self._compensation.trained.compensation()
        path = self._path(self._token_ids[picked], compensation, choose)
        judged = judge(self._decoder, self._full_depth(picked), path.decided(path.states[-1]), generator)
        if not judged.divergence.isfinite().all():
            raise TrainingDiverged(f"the divergence in step {step} is not a number")
        curvatures = self._carry_back(path, judged, log_prices, settings.rate(step))
        kernels = [self._kernel(generator) for _ in range(self._spec.num_layers)]
        served = _as_served(compensation, self._decoder)
        labels = measure_labels(self._decoder, self._spec, served, path, curvatures, log_prices, kernels)
        self._num_labels += len(labels.damage)
        self._fit.add(labels, settings.rate(step), generator)

    def _carry_back(self, path: TokenPath, judged: Judged, log_prices: Tensor, rate: float) -> Sequence[Tensor]:
        """Returns the curvature at each layer's output, and takes a step of the compensation along the slope."""
        last = path.decided(path.states[-1])
        curvatures = torch.autograd.grad(last, path.states[1:], judged.curvature, retain_graph=True)
        weights = price_weights(log_prices) * harm_slope(judged.divergence.cpu(), self._settings.fit.tail)
        self._compensation.step(last, weights.to(judged.slope).unsqueeze(1) * judged.slope, rate)
        return curvatures

    def _path(self, token_ids: Tensor, compensation: LowRank, choose: Choose) -> TokenPath:
        prompt = self._settings.num_prompt_tokens
        return run_path(self._decoder, token_ids, prompt, self._spec, compensation, choose)

    def _full_depth(self, picked: Tensor) -> Tensor:
        """Returns full depth's last-layer outputs of the decided tokens, `[rows, hidden_size]`; kept for a while."""
        if len(self._full) > _MOST_KEPT:
            self._full.clear()
        missing = [number for number in dict.fromkeys(picked.tolist()) if number not in self._full]
        if missing:
            last = self._decoder.full_states(self._token_ids[missing])[-1]
            kept = last[:, self._settings.num_prompt_tokens :]
            self._full.update((number, own.clone()) for number, own in zip(missing, kept, strict=True))
        return torch.cat([self._full[number] for number in picked.tolist()])

    def _choice(self, log_prices: Tensor) -> Choose:
        return greedy_choice(self._spec, self._fit.model.network(), log_prices)

    def _precise(self, block: tuple[int, ...], hidden: Tensor, *_: Tensor) -> Tensor:
        return torch.full((len(block), len(hidden)), int(max(self._spec.actions)))

    def _kernel(self, generator: torch.Generator) -> Action:
        """Draws the kernel by which a layer is measured; FULL for none."""
        kernels = [action for action in self._spec.actions if action not in (Action.SKIP, Action.FULL)]
        share, place = torch.rand(2, generator=generator).tolist()
        return kernels[int(place * len(kernels))] if kernels and share < self._settings.kernel_share else Action.FULL

    def _by_token(self, log_prices: Sequence[float]) -> Tensor:
        length = self._token_ids.shape[1] - self._settings.num_prompt_tokens
        return torch.tensor(log_prices).repeat_interleave(length)

    @torch.no_grad()
    def _held_out_path(self, place: float) -> TokenPath:
        """Runs the held-out text, as serving would, at a place of the prices."""
        served = _as_served(self._compensation.trained.copy(), self._decoder)
        log_prices = self._by_token([self._settings.log_price(place)] * len(self._held_out))
        return self._path(self._held_out, served, self._choice(log_prices))

    def _reached(self) -> list[Reached]:
        """Returns the outcome on the held-out text at three prices."""
        return [self._outcome(self._held_out_path(place)) for place in _JUDGED]

    def _rates(self) -> Tensor:
        """Returns how often each layer runs with each action, in the mean over the dearest price of each usefulness."""
        reached: list[tuple[float, Tensor]] = []
        for place in _PLACES:
            path = self._held_out_path(place)
            reached.append((self._outcome(path).divergence, action_rates(path.decided_actions)))
            if reached[-1][0] <= min(_USEFUL_DIVERGENCES):
                break
        useful = [
            next((rates for divergence, rates in reached if divergence <= most), reached[-1][1])
            for most in _USEFUL_DIVERGENCES
        ]
        return torch.stack(useful).mean(0)

    def _outcome(self, path: TokenPath) -> Reached:
        spec = self._spec
        layers = costs_by_action(spec.costs)[path.decided_actions].sum(0).mean()
        cost = float(layers) + spec.costs.token_cost((), spec.head, spec.num_evaluations)
        divergence = divergences(self._decoder, self._full_held_out, path.decided(path.states[-1])).mean()
        return Reached(cost, float(divergence))

    @cached_property
    def _full_held_out(self) -> Tensor:
        last = self._decoder.full_states(self._held_out)[-1]
        return decided_rows(last, self._settings.num_prompt_tokens)

    def _signature(self) -> str:
        """Returns a text that differs between runs that must not resume from each other's checkpoints."""
        spec = self._spec
        layers = [sorted(spec.pinned.items()), spec.head.name, spec.lookahead, spec.block_size]
        text = [len(self._token_ids), int(self._token_ids.sum())]
        return json.dumps([asdict(self._settings), [action.name for action in spec.actions], *layers, text])


def price_weights(log_prices: Tensor) -> Tensor:
    """Returns the weight of each token in the compensation's training, `[rows]`, 1 in the mean, by its log λ.

    With them paths at all prices count about alike. Without, those at the dearest, whose divergence is ten times that
    of the prices that are asked for, would teach it nearly everything.
    """
    return torch.softmax(-_EVENNESS * log_prices, dim=0) * len(log_prices)


def _uniform(count: int, generator: torch.Generator) -> list[float]:
    """Draws numbers from 0 to 1, one from each of `count` equal parts, in random order: every step sees all prices."""
    order = torch.randperm(count, generator=generator)
    places: list[float] = ((order + torch.rand(count, generator=generator)) / count).tolist()
    return places


def _as_served(compensation: LowRank, decoder: DenseDecoder) -> LowRank:
    """Returns the compensation, rounded as it is served: the packed form itself is slow for many rows."""
    with torch.no_grad():
        served = unpacked(packed(compensation, decoder.dtype))
        assert isinstance(served, LowRank)
        return served
