"""The straight-through control: serving's state and costs, gradients to all of the router, and a problem to learn."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.errors import ConfigError
from dash_runtime.training.differentiable_decoder import DifferentiableDecoder, pass_on
from dash_runtime.training.ppo import TrainingDiverged
from dash_runtime.training.straight_through import Draw, RouterGates, StraightThroughSettings, train_router
from tests.runtime.support import some_costs
from tests.tiny_models import VOCAB_SIZE

LENGTH, PROMPT = 20, 4
BLOCKS = ((1, 2), (3,), (4,))
COSTS = some_costs()
SETTINGS = StraightThroughSettings(
    iterations=40,
    sequences_per_iteration=4,
    learning_rate=3e-2,
    final_learning_rate=1e-2,
    num_prompt_tokens=PROMPT,
    price_range=(0.02, 50.0),
)


class TinyRouter(nn.Module):
    """A router with one hidden layer over the normalised state and the facts, and an output for each block."""

    def __init__(self, hidden_size: int, blocks: Sequence[tuple[int, ...]] = BLOCKS, seed: int = 0) -> None:
        super().__init__()
        self.decision_blocks = blocks
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Parameter(torch.randn(16, hidden_size + 3, generator=generator) * hidden_size**-0.5)
        self.outer = nn.ParameterList(
            nn.Parameter(torch.randn(2 * len(block), 16, generator=generator) * 0.1) for block in blocks
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(2 * len(block))) for block in blocks)
        self.seen: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def scores(self, block: int, hidden: Tensor, last_actions: Tensor, cost_spent: Tensor, log_price: Tensor) -> Tensor:
        self.seen.append((block, hidden, last_actions, cost_spent, log_price))
        facts = torch.stack((last_actions.float() / 4, cost_spent, log_price), dim=-1)
        state = functional.rms_norm(hidden.float(), hidden.shape[-1:])
        inner = torch.tanh(functional.linear(torch.cat((state, facts), dim=-1), self.inner))
        return functional.linear(inner, self.outer[block], self.biases[block]).view(len(hidden), -1, 2)


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> DifferentiableDecoder:
    return DifferentiableDecoder(load_model_config(tiny_folder), open_weights(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return torch.randint(VOCAB_SIZE, (12, LENGTH), generator=torch.Generator().manual_seed(8)).tolist()


def make_router(decoder: DifferentiableDecoder, seed: int = 0) -> TinyRouter:
    return TinyRouter(decoder.config.hidden_size, seed=seed)


def make_gates(
    decoder: DifferentiableDecoder, router: TinyRouter, log_price: Tensor, lookahead: int = 1, seed: int | None = 1
) -> RouterGates:
    draw = Draw(1.0, None if seed is None else torch.Generator().manual_seed(seed))
    return RouterGates(router, COSTS, log_price, PROMPT, lookahead, decoder.num_layers, draw)


def ignore(*_: object) -> None:
    """Ignores progress."""


def test_draws_are_hard_with_the_slope_of_the_soft_gate() -> None:
    margins = torch.tensor([-2.0, -0.1, 0.1, 3.0]).requires_grad_()
    gates = Draw(0.5)(margins)
    assert gates.tolist() == [0, 0, 1, 1]
    (slopes,) = torch.autograd.grad(gates.sum(), margins)
    soft = torch.sigmoid(margins / 0.5)
    torch.testing.assert_close(slopes, soft * (1 - soft) / 0.5)


def test_draws_are_full_as_often_as_a_categorical_actor_would_be() -> None:
    drawn = Draw(0.3, torch.Generator().manual_seed(0))(torch.full((20_000,), 1.2))
    assert sorted(drawn.unique().tolist()) == [0, 1]
    assert float(drawn.mean()) == pytest.approx(1 / (1 + math.exp(-1.2)), abs=0.01)


@pytest.mark.parametrize("lookahead", [1, 2])
@torch.no_grad()
def test_a_block_sees_the_lookahead_layers_input_last_action_and_cost(
    decoder: DifferentiableDecoder, sequences: list[list[int]], lookahead: int
) -> None:
    blocks = ((2, 3), (4,))
    router = TinyRouter(decoder.config.hidden_size, blocks)
    log_price = torch.tensor([0.5, -0.5])
    gates = make_gates(decoder, router, log_price, lookahead)
    inputs: list[Tensor] = []

    def recorded(layer: int, hidden: Tensor) -> Tensor | None:
        inputs.append(hidden)
        return gates(layer, hidden)

    decoder.run(torch.tensor(sequences[:2]), recorded, pass_on)
    ran = torch.ones(decoder.num_layers, 2, LENGTH - PROMPT)
    for layer, gate in gates.gates.items():
        ran[layer] = gate
    assert sorted(gates.gates) == [2, 3, 4]
    assert 0 < float(ran[2:5].mean()) < 1
    skip, full = COSTS.layer[Action.SKIP], COSTS.layer[Action.FULL]
    spent = (skip + ran * (full - skip)).cumsum(dim=0)
    torch.testing.assert_close(gates.spent, spent[-1])
    assert [seen[0] for seen in router.seen] == [0, 1]
    for block, hidden, last_actions, cost_spent, prices in router.seen:
        observed = blocks[block][0] - lookahead
        torch.testing.assert_close(hidden, inputs[observed][:, PROMPT:].flatten(0, 1))
        numbers = torch.where(ran[observed].flatten() > 0, int(Action.FULL), int(Action.SKIP))
        assert torch.equal(last_actions, numbers)
        assert last_actions.dtype is torch.int64
        torch.testing.assert_close(cost_spent, spent[observed].flatten())
        torch.testing.assert_close(prices, log_price.repeat_interleave(LENGTH - PROMPT))


def test_prompt_rows_run_in_full_and_gates_are_exactly_hard(
    decoder: DifferentiableDecoder, sequences: list[list[int]]
) -> None:
    gates = make_gates(decoder, make_router(decoder), torch.zeros(2))
    returned: list[Tensor | None] = []

    def recorded(layer: int, hidden: Tensor) -> Tensor | None:
        returned.append(gates(layer, hidden))
        return returned[-1]

    decoder.run(torch.tensor(sequences[:2]), recorded, pass_on)
    assert returned[0] is None
    assert returned[5] is None
    for gate in returned[1:5]:
        assert gate is not None
        assert (gate[:, :PROMPT] == 1).all()
        assert ((gate == 0) | (gate == 1)).all()


@pytest.mark.parametrize("is_state_detached", [True, False])
def test_one_step_reaches_every_parameter_of_the_router(
    decoder: DifferentiableDecoder, sequences: list[list[int]], is_state_detached: bool
) -> None:
    router = make_router(decoder)
    before = [parameter.detach().clone() for parameter in router.parameters()]
    settings = replace(SETTINGS, iterations=1, is_state_detached=is_state_detached)
    train_router(decoder, router, sequences, pass_on, COSTS, settings, ignore)
    for old, parameter in zip(before, router.parameters(), strict=True):
        assert parameter.grad is not None
        assert (old != parameter).float().mean() > 0.9


def test_detaching_the_state_changes_the_gradient(decoder: DifferentiableDecoder, sequences: list[list[int]]) -> None:
    slopes = []
    for is_state_detached in (True, False):
        router = make_router(decoder)
        settings = replace(SETTINGS, iterations=1, is_state_detached=is_state_detached)
        train_router(decoder, router, sequences, pass_on, COSTS, settings, ignore)
        assert router.inner.grad is not None
        slopes.append(router.inner.grad)
    assert not torch.allclose(*slopes)


def test_a_trained_router_skips_everything_at_a_huge_price_and_less_at_a_tiny_one(
    decoder: DifferentiableDecoder, sequences: list[list[int]]
) -> None:
    router = make_router(decoder)
    train_router(decoder, router, sequences, pass_on, COSTS, SETTINGS, ignore)
    shares = {}
    for price in (0.02, 50.0):
        gates = make_gates(decoder, router, torch.full((4,), math.log(price)), seed=None)
        with torch.no_grad():
            decoder.run(torch.tensor(sequences[:4]), gates, pass_on)
        shares[price] = float(torch.stack(list(gates.gates.values())).mean())
    assert shares[50.0] < 0.02
    assert shares[0.02] > 0.6


def test_the_same_seed_gives_the_same_router_and_progress(
    decoder: DifferentiableDecoder, sequences: list[list[int]]
) -> None:
    runs = []
    for seed in (0, 0, 1):
        router, told = make_router(decoder), []
        settings = replace(SETTINGS, iterations=3, seed=seed)
        train_router(decoder, router, sequences, pass_on, COSTS, settings, lambda *row, told=told: told.append(row))
        runs.append((told, router.inner.detach()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]
    assert [row[0] for row in runs[0][0]] == [0, 1, 2]
    assert all(0 < cost <= 1.001 and divergence >= 0 for _, _, cost, divergence in runs[0][0])


def test_what_is_not_a_number_stops_the_training_before_it_reaches_the_router(
    decoder: DifferentiableDecoder, sequences: list[list[int]]
) -> None:
    router = make_router(decoder)
    before = router.inner.detach().clone()
    with pytest.raises(TrainingDiverged, match="not a number"):
        train_router(decoder, router, sequences, lambda layer, hidden: hidden * torch.nan, COSTS, SETTINGS, ignore)
    assert torch.equal(router.inner, before)


@pytest.mark.parametrize("blocks", [(), ((),), ((0, 1),), ((2, 1),), ((1, 2), (2, 3)), ((5, 6),)])
def test_blocks_that_cannot_be_decided_are_refused(
    decoder: DifferentiableDecoder, sequences: list[list[int]], blocks: Sequence[tuple[int, ...]]
) -> None:
    router = TinyRouter(decoder.config.hidden_size, blocks)
    with pytest.raises(ConfigError, match="blocks"):
        train_router(decoder, router, sequences, pass_on, COSTS, SETTINGS, ignore)


def test_unusable_settings_and_costs_are_refused(decoder: DifferentiableDecoder, sequences: list[list[int]]) -> None:
    wrong: Iterable[tuple[str, object]] = (
        ("iterations", 0),
        ("lookahead", 0),
        ("temperature_end", 0.0),
        ("final_learning_rate", -1.0),
        ("price_range", (2.0, 1.0)),
        ("num_prompt_tokens", -1),
    )
    for field, value in wrong:
        with pytest.raises(ConfigError, match=field):
            StraightThroughSettings(**{field: value})  # type: ignore[arg-type]
    costs = replace(COSTS, layer={Action.FULL: COSTS.layer[Action.FULL]})
    with pytest.raises(ConfigError, match="SKIP"):
        train_router(decoder, make_router(decoder), sequences, pass_on, costs, SETTINGS, ignore)
