"""Parities: what must be equal on the device, and by how much bf16 may differ.

Bounds are on the largest difference as a share of the largest number. On a CPU, with the shapes tiny and 135m, bf16
gave a layer an error of 0.008 beside float32, and logits 0.03; with the whole step's attention instead, bf16 logits
differed by 0.04. Mistakes in a layer gave 0.05 and more, but INT8 where FULL should run may stay below the bound. In
float32 the two largest logits never were nearer than 0.0004, so that no rounding turns a token. In bf16 rounding turns
one every few steps, since random weights leave many near-ties.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from benchmarks.gpu_once.decoding import TokenIds, contexts, generate, prefill, refusing_waits, rolled_back
from benchmarks.gpu_once.graphs import decoder_with_graphs, eager_over
from benchmarks.gpu_once.live_report import LiveReport
from benchmarks.gpu_once.model import Model
from benchmarks.gpu_once.random_models import SHAPES, RandomWeights, random_compensation
from dash_runtime.actions import Action
from dash_runtime.config import LaneKind
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.batch import PassKind
from dash_runtime.passes import PassPlan
from dash_runtime.policy.policy import FixedPlan, cheapest_kernel, full_depth

PROMPT_LENGTH = 37
_SHORT_CONTEXT = 5
"""Positions of the first row where single layers are compared: among many, a missing one would hardly count."""
FLOAT_BOUND = "≤ 0.001"
LAYER_BOUND = "≤ 0.03"
LOGITS_BOUND = "≤ 0.15"
_VERIFIED_ROWS = (2, 5, 8)
_Logits = list[Tensor]


def float_parity(report: LiveReport, name: str, device: torch.device, num_tokens: int) -> None:
    """Compares eager decoding in float32 on the CPU and on the device: full depth, and skipping every other layer."""
    config = SHAPES[name]
    weights = RandomWeights(config, torch.float32, torch.device("cpu"))
    prompt = [place * 31 % config.vocab_size for place in range(PROMPT_LENGTH)]
    tokens: dict[str, list[list[TokenIds]]] = {}
    logits: dict[str, list[_Logits]] = {}
    for place in (torch.device("cpu"), device):
        actions, room = (Action.SKIP, Action.FULL), PROMPT_LENGTH + num_tokens + 1
        decoder = eager_over(decoder_with_graphs(config, weights, actions, torch.float32, place, room))
        compensation = random_compensation(config, torch.float32, place)
        lane = InlineLane(decoder.placed_on[0])
        plan = tuple(Action.SKIP if layer % 2 else Action.FULL for layer in range(config.num_layers))
        policies = {
            "full": full_depth(config.num_layers),
            "skip": FixedPlan(plan, "every-other", Action.FULL, compensation),
        }
        (cache,) = decoder.caches([room])
        first = prefill(decoder, cache, prompt)
        for policy_name, policy in policies.items():
            report.check_time()
            steps: _Logits = []
            forced = tokens[policy_name][0] if policy_name in tokens else None
            run = generate(
                decoder, lane, policy, [cache], [first], num_tokens, forced=forced, on_logits=_keeping(steps)
            )
            free = run if forced is None else generate(decoder, lane, policy, [cache], [first], num_tokens)
            tokens.setdefault(policy_name, []).append(free.tokens)
            logits.setdefault(policy_name, []).append(steps)
    for policy_name in tokens:
        prefix = f"{name}_fp32_cpu_vs_device_{policy_name}"
        report.require(f"{prefix}_logits_error", _largest(*logits[policy_name]), FLOAT_BOUND)
        report.require(f"{prefix}_equal_tokens", equal_steps(*tokens[policy_name]), f"≥ {num_tokens}")


@torch.inference_mode()
def layer_parity(report: LiveReport, model: Model, rows: Sequence[int]) -> None:
    """Compares each layer with graphs and eagerly, on the same input: outputs, keys and values."""
    report.note("layers: the largest error of any layer's output, key or value, graphs against eager, bf16")
    for num_rows in rows:
        for label, actions, kv_action in _batches(model.decoder.actions, num_rows):
            report.check_time()
            error = _layer_error(model, actions, kv_action)
            report.require(f"{model.name}_layer_error_{label}_rows{num_rows}", error, LAYER_BOUND)


def token_parity(report: LiveReport, model: Model, rows: Sequence[int], num_tokens: int) -> None:
    """Compares tokens and logits with graphs and eagerly, and the graphs with themselves."""
    lane = model.lane(LaneKind.INLINE)
    for num_rows in rows:
        lengths = [PROMPT_LENGTH + row for row in range(num_rows)]
        first_ids = [row + 1 for row in range(num_rows)]
        with contexts(model.pool, lengths, num_tokens + 1) as caches:
            decode = partial(generate, lane=lane, caches=caches, first_ids=first_ids, num_steps=num_tokens)
            for action in model.decoder.actions:
                report.check_time()
                policy, prefix = model.fixed(action), f"{model.name}_{action.name.lower()}_rows{num_rows}"
                eager: _Logits = []
                graphs: _Logits = []
                again: _Logits = []
                expected = decode(model.eager, policy=policy, on_logits=_keeping(eager)).tokens
                own = decode(model.decoder, policy=policy, forced=expected, on_logits=_keeping(graphs)).tokens
                decode(model.decoder, policy=policy, forced=expected, on_logits=_keeping(again))
                report.require(f"{prefix}_logits_error", _largest(eager, graphs), LOGITS_BOUND)
                is_same = all(torch.equal(one, other) for one, other in zip(graphs, again, strict=True))
                report.require(f"{prefix}_twice_bit_equal", is_same, "≥ 1")
                # Each step has the eager way's tokens before it. A near-tie may turn in bf16.
                agreeing = sum(one == other for one, other in zip(expected, own, strict=True))
                report.add(f"{prefix}_steps_with_equal_tokens", [agreeing], f"{num_tokens}, near-ties aside")


def lane_parity(report: LiveReport, model: Model, num_tokens: int) -> None:
    """Compares a policy's plans and tokens on the lane beside the decoder's with those inline."""
    lengths, first_ids = [PROMPT_LENGTH, PROMPT_LENGTH + 9, 5], [1, 2, 3]
    inline, beside = model.lane(LaneKind.INLINE), model.lane(model.concurrent_lane_kind)
    for policy in model.policies:
        report.check_time()
        with contexts(model.pool, lengths, num_tokens + 1) as caches:
            one, other = (
                generate(model.decoder, lane, policy, caches, first_ids, num_tokens) for lane in (inline, beside)
            )
        prefix = f"{model.name}_lookahead{policy.lookahead}_{model.concurrent_lane_kind}_vs_inline"
        report.require(f"{prefix}_equal_plans", equal_steps(one.plans, other.plans), f"≥ {num_tokens}")
        report.require(f"{prefix}_equal_tokens", equal_steps(one.tokens, other.tokens), f"≥ {num_tokens}")
    beside.close()


@torch.inference_mode()
def verification_parity(report: LiveReport, model: Model) -> None:
    """Compares the rows of EXACT's verification with the same rows decoded alone, at full depth."""
    policy, lane = model.fixed(Action.FULL), model.lane(LaneKind.INLINE)
    token_ids = [place * 17 % model.config.vocab_size for place in range(max(_VERIFIED_ROWS))]
    with contexts(model.pool, [PROMPT_LENGTH], len(token_ids) + 1) as caches:
        alone: _Logits = []
        forced = [[own] for own in token_ids[1:]] + [[0]]
        generate(model.decoder, lane, policy, caches, token_ids[:1], len(token_ids), forced=forced,
                 on_logits=_keeping(alone))  # fmt: skip
        for num_rows in _VERIFIED_ROWS:
            report.check_time()
            with rolled_back(caches):
                batch = model.decoder.batch(PassKind.VERIFY, caches, [num_rows], [policy.compensation])
                plan = PassPlan.of((Action.FULL,) * model.decoder.num_layers)
                states = model.decoder.run_pass(plan, token_ids[:num_rows], batch).states
                assert states is not None
                together = model.decoder.logits(states, (Action.FULL,) * num_rows).cpu()
            pairs = [(own[0], row) for own, row in zip(alone, together, strict=False)]
            prefix = f"{model.name}_verify_rows{num_rows}"
            report.require(f"{prefix}_logits_error", _largest(*map(list, zip(*pairs, strict=True))), LOGITS_BOUND)
            equal = sum(torch.equal(own, row) for own, row in pairs)
            report.add(f"{prefix}_bit_equal", [equal], f"{num_rows} on a CPU")
            same = sum(bool(own.argmax() == row.argmax()) for own, row in pairs)
            report.add(f"{prefix}_equal_tokens", [same], f"{num_rows}, near-ties aside")


def check_waits(report: LiveReport, model: Model) -> None:
    """Decodes steps in which the host may wait for events only, which decisions and tokens arrive with.

    Raises RuntimeError where it waits for the device otherwise.
    """
    lane = model.lane(model.concurrent_lane_kind)
    with contexts(model.pool, [PROMPT_LENGTH], 4) as caches:
        for policy in (model.fixed(Action.FULL), *model.policies):
            report.check_time()
            decode = partial(generate, model.decoder, lane, policy, caches, [1], 3)
            decode()  # captures
            decode(guard=partial(refusing_waits, model.device))
    lane.close()


def equal_steps(expected: Sequence[object], actual: Sequence[object]) -> int:
    """Returns the number of equal steps before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(expected, actual, strict=True)))


def _batches(offered: Sequence[Action], num_rows: int) -> Iterator[tuple[str, list[Action], Action]]:
    """Yields rows that all take one action; and rows of which every other skips, beside FULL. Each with the action that
    projects skipped rows' keys and values.

    A graph runs one action for all rows, the highest, so other mixtures differ from the eager way by design.
    """
    for action in offered:
        yield action.name.lower(), [action] * num_rows, cheapest_kernel(offered)
    if num_rows > 1:
        yield "mixed", [Action.SKIP if row % 2 else Action.FULL for row in range(num_rows)], Action.FULL


def _layer_error(model: Model, actions: Sequence[Action], kv_action: Action) -> float:
    num_rows = len(actions)
    with contexts(model.pool, [_SHORT_CONTEXT + row for row in range(num_rows)], 1) as caches:
        compensations, kernels = [model.compensation] * num_rows, [kv_action] * num_rows
        with_graphs, eagerly = (
            own.batch(PassKind.DECODE, caches, [1] * num_rows, compensations, kernels)
            for own in (model.decoder, model.eager)
        )
        hidden = model.decoder.embed([row + 1 for row in range(num_rows)])
        errors: list[Tensor] = []

        def cached(layer: int) -> Tensor:
            rows = [(cache.keys[layer][cache.length], cache.values[layer][cache.length]) for cache in caches]
            return torch.stack([torch.stack(pair) for pair in rows])

        for layer in range(model.config.num_layers):
            given = hidden.clone()  # a backend may know its own state again by its memory
            hidden = model.decoder.run_layer(layer, actions, hidden, with_graphs)
            own = cached(layer)
            expected = model.eager.run_layer(layer, actions, given, eagerly)
            pairs = (expected, hidden), (cached(layer), own)
            errors += [(one.float() - other.float()).abs().max() / one.float().abs().max() for one, other in pairs]
        return float(torch.stack(errors).max())


def _keeping(logits: _Logits) -> Callable[[Tensor], None]:
    """Returns a function that keeps logits on the host."""
    return lambda own: logits.append(own.cpu())


def _largest(expected: _Logits, actual: _Logits) -> float:
    errors = [relative_error(one, other) for one, other in zip(expected, actual, strict=True)]
    return float(torch.tensor(errors).max())  # Python's own would pass over what is no number


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Returns the largest difference as a share of the largest number."""
    return float((expected - actual).abs().max() / expected.abs().max())
