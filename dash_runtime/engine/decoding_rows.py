"""The rows of decoding passes: who decides for which, and where their sequences stand.

Knows sequences and their policies; runs nothing.
"""

from collections.abc import Sequence as Several
from functools import cached_property, partial
from itertools import accumulate
from operator import is_

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.decider import Decider, plan_of
from dash_runtime.engine.guesses import PassSeconds
from dash_runtime.engine.lanes import Lane
from dash_runtime.engine.planner import GroupPlanner, HighestAction
from dash_runtime.engine.sequence import Sequence
from dash_runtime.layers.batch import PassKind
from dash_runtime.passes import MOST_GUESSES, PassPlan, Planner
from dash_runtime.policy.catalog import Assignment
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.policy import Policy, Token

_MOST_RECENT = 1 + MOST_GUESSES
"""Steps that are kept: one for each number of guesses of a lone sequence."""


class DecodingRows:
    """The rows of each sequence: its last token's, and one for each guess. Kept from step to step while the same rows
    decode.

    Args:
        assignments: what decides for each sequence.
        lengths: the number of rows of each. More than one needs a plan that serves all rows.
    """

    def __init__(
        self,
        decoder: Decoder,
        lane: Lane,
        sequences: Several[Sequence],
        assignments: Several[Assignment],
        lengths: Several[int],
        planner: Planner | None,
    ) -> None:
        self._lane = lane
        self._sequences, self._assignments = sequences, assignments
        self._places = [place for place, length in enumerate(lengths) for _ in range(length)]
        """Each row's sequence."""
        self.firsts = list(accumulate(lengths[:-1], initial=0))
        """Each sequence's first row."""
        self._pool = sequences[0].cache.pool
        self._num_moves = self._pool.num_moves
        self._has_guesses = len(self._places) > len(sequences)
        policies = [sequence.assignment.policy for sequence in sequences]
        self.batch = decoder.batch(
            PassKind.VERIFY if self._has_guesses else PassKind.DECODE,
            [sequence.cache for sequence in sequences],
            lengths,
            [policy.compensation for policy in policies],
            [policy.kv_action for policy in policies],
        )
        self.deciders = self._make_deciders(planner)
        self.plan = plan_of(self.deciders, planner, any(sequence.wants_logits for sequence in sequences))
        self.decider_of = {row: decider for decider in self.deciders for row in decider.rows}
        self.token_seconds: float | None = None
        """Seconds that the last step took for a token of each row; None before the first."""
        self.may_burst = True
        """False once several tokens could not be decoded in one call."""

    @cached_property
    def plan_of_guesses(self) -> PassPlan:
        """The plan of a lone sequence's passes with guesses."""
        if self.deciders[0].is_blind:
            return self.plan
        assignment = self._assignments[0]
        policy = unasked(assignment)
        assert policy is not None
        decider = Decider(policy, self._lane, [0], self._tokens([0]), assignment.state_costs, 1)
        return plan_of([decider], None, self._sequences[0].wants_logits)

    def are_of(self, sequences: Several[Sequence], assignments: Several[Assignment]) -> bool:
        """Returns True if these sequences are still the same, and lie where they lay."""
        return (
            len(sequences) == len(self._sequences)
            and self._num_moves == self._pool.num_moves
            and all(map(is_, sequences, self._sequences))
            and all(map(is_, assignments, self._assignments))
        )

    def move_on(self) -> None:
        """Begins the next step of the same rows."""
        self.batch.move_on()
        for decider in self.deciders:
            decider.begin(self._tokens(decider.rows))

    def _tokens(self, rows: Several[int]) -> list[Token]:
        return [self._sequences[self._places[row]].next_token() for row in rows]

    def _make_deciders(self, planner: Planner | None) -> list[Decider]:
        """Returns one decider per policy."""
        rows_by_policy: dict[int, list[int]] = {}
        for row, place in enumerate(self._places):
            rows_by_policy.setdefault(id(self._assignments[place].policy), []).append(row)
        of_rows = [self._assignments[place] for place in self._places]
        deciders: list[Decider] = []
        for rows in rows_by_policy.values():
            assignment = of_rows[rows[0]]
            arguments = rows, self._tokens(rows), assignment.state_costs, len(self._places)
            own = unasked(assignment) if self._has_guesses else None
            policy = own or _asked(assignment, len(rows), of_rows, planner)
            deciders.append(Decider(policy, self._lane, *arguments))
        return deciders


class RecentRows:
    """The rows of recent steps, which the next one may have again."""

    def __init__(self, decoder: Decoder, lane: Lane) -> None:
        self._decoder, self._lane = decoder, lane
        self._by_lengths: dict[tuple[int, ...], DecodingRows] = {}

    def next(
        self,
        sequences: Several[Sequence],
        assignments: Several[Assignment],
        lengths: Several[int],
        planner: Planner | None,
    ) -> DecodingRows:
        """Returns the rows of the next step (`DecodingRows`)."""
        rows = self._by_lengths.get(key := tuple(lengths))
        if rows is not None and rows.are_of(sequences, assignments):
            rows.move_on()
            return rows
        if rows is not None or len(self._by_lengths) == _MOST_RECENT:
            self._by_lengths.clear()
        self._by_lengths[key] = own = DecodingRows(self._decoder, self._lane, sequences, assignments, lengths, planner)
        return own


def unasked(assignment: Assignment) -> Policy | None:
    """Returns the plan that rows of an assignment run where its policy is not asked; None if it has to be."""
    policy = assignment.policy
    if assignment.is_planned:
        return policy
    return policy.unasked(assignment.price) if isinstance(policy, LearnedPolicy) else None


def pass_seconds(assignment: Assignment, planner: Planner | None) -> PassSeconds | None:
    """Returns what passes of its plan take by their number of rows; None if they may have no guesses: what decides has
    to know the token, or rows may not share products."""
    plan = unasked(assignment)
    if plan is None or not isinstance(planner, GroupPlanner):
        return None
    policy, plans = assignment.policy, (planner.latencies, plan.pinned.values())
    beside = assignment.costs.token_cost((), policy.head) * _token_seconds(assignment, planner)
    if not isinstance(policy, LearnedPolicy):
        return PassSeconds(*plans, beside)
    return PassSeconds(*plans, beside, partial(_seconds_saved, policy, assignment.price, planner))


def next_guesses(sequences: Several[Sequence]) -> list[list[int]]:
    """Returns the tokens that are worth running beside each sequence's last one in their next pass: that of a lone
    draft, or what constraints force and what the text had before, where all sequences run one plan."""
    if len(sequences) == 1 and sequences[0].is_drafting:
        return [sequences[0].guess_beside_draft()]
    nothing: list[list[int]] = [[] for _ in sequences]
    one = next((own.guesses for own in sequences if own.guesses is not None), None)
    policy = sequences[0].assignment.policy
    if one is None or any(own.assignment.policy is not policy or own.speculation is not None for own in sequences):
        return nothing
    if not one.seconds.may_pay(len(sequences)):
        return nothing
    if len(sequences) == 1:
        return [one.wanted_alone(sequences[0].output_ids, sequences[0].num_tokens_left)]
    wanted = {
        place: own.guesses.wanted(own.output_ids, own.num_tokens_left, len(sequences))
        for place, own in enumerate(sequences)
        if own.guesses is not None
    }
    numbers = one.seconds.numbers_that_pay({place: own.chances for place, own in wanted.items()}, len(sequences))
    return [wanted[place].token_ids[: numbers[place]] if place in wanted else [] for place in range(len(sequences))]


def _asked(assignment: Assignment, num_rows: int, of_pass: Several[Assignment], planner: Planner | None) -> Policy:
    """Returns the policy of some rows of a pass; or the plan that they run without it, if all that their skips can be
    expected to save is less than asking takes. The price is the first row's: rows of a policy mostly share one.

    Few rows share the reading of a layer's weights, so that it takes as long until all of them skip it. A layer's graph
    runs all rows of the pass, `of_pass`, or none of them, and one evaluation serves all rows of a policy.
    """
    policy, costs = assignment.policy, assignment.costs
    if not isinstance(policy, LearnedPolicy) or not _may_skip(policy):
        return policy
    if isinstance(planner, GroupPlanner) and num_rows > 1:
        asking = num_rows * policy.num_evaluations * costs.evaluation * _token_seconds(assignment, planner)
        pays = _seconds_saved(policy, assignment.price, planner, num_rows) >= asking
    elif isinstance(planner, HighestAction) and len(of_pass) > 1:
        pays = _cost_saved(policy, assignment, of_pass, planner) > policy.num_evaluations * costs.evaluation
    else:
        return policy
    return policy if pays else policy.unasked(assignment.price)


def _cost_saved(
    policy: LearnedPolicy, assignment: Assignment, of_pass: Several[Assignment], planner: HighestAction
) -> float:
    """Returns what the policy's skips can be expected to save a pass that graphs run, as a share of a token."""
    if not all(_may_skip(own.policy) for own in of_pass):
        return 0.0
    free, price = policy.spec.free_layers, assignment.price
    usual, share = policy.unasked(price).plan[free[0]], policy.skip_share(price)
    return len(free) * planner.cost_saved(assignment.costs, usual, len(of_pass), share)


def _may_skip(policy: Policy) -> bool:
    if isinstance(policy, LearnedPolicy):
        return Action.SKIP in policy.spec.actions and bool(policy.spec.free_layers)
    return Action.SKIP in policy.pinned.values()


def _seconds_saved(policy: LearnedPolicy, price: float, planner: GroupPlanner, num_rows: int) -> float:
    """Returns the seconds that the policy's skips can be expected to save so many rows, beside what they run where it
    is not asked."""
    if not _may_skip(policy):
        return 0.0
    usual, share = policy.unasked(price).plan[policy.spec.free_layers[0]], policy.skip_share(price)
    return len(policy.spec.free_layers) * planner.seconds_saved(usual, num_rows, share)


def _token_seconds(assignment: Assignment, planner: GroupPlanner) -> float:
    """Returns the seconds of a full-depth token, the unit of the costs."""
    highest = assignment.costs.highest
    return planner.latencies.cost(highest, 1) / assignment.costs.layer[highest]
