"""Sequences in mode EXACT draft in step, and one pass verifies what pays together."""

from typing import cast

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.engine.draft_rounds import DraftRounds
from dash_runtime.engine.sequence import Sequence
from dash_runtime.engine.speculative import WantedDraft
from dash_runtime.policy.draft_costs import RoundCosts
from dash_runtime.policy.draft_length import DraftCosts

NOTHING = WantedDraft(0, 0, 1.0)
COSTS = RoundCosts(
    (LatencyTable((1, 64), {Action.INT4: (4.0, 8.0), Action.FULL: (10.0, 12.0)}),), 0.4, {3: 1.0, 4: 2.0, 63: 3.0}, 64
)
"""Up to four rows cost what one does, and a fifth as much again."""


class Fake:
    """A sequence that drafts what it is said to want."""

    def __init__(self, wanted: WantedDraft | None) -> None:
        self.wanted = wanted
        self.speculation = wanted and object()
        self.num_left = self.num_drafted = self.num_asked = 0
        self.began: list[int | None] = []

    @property
    def has_draft(self) -> bool:
        return bool(self.num_drafted or self.num_left)

    @property
    def is_drafting(self) -> bool:
        return bool(self.num_left)

    @property
    def num_rows_to_verify(self) -> int:
        return 1 + self.num_drafted

    def wanted_draft(self, costs: DraftCosts | None) -> WantedDraft:
        assert self.wanted is not None
        self.num_asked += 1
        return self.wanted

    def begin_draft(self, costs: DraftCosts | None, passes: int | None) -> None:
        assert self.wanted is not None
        self.began.append(passes)
        self.num_drafted = self.wanted.num_free
        self.num_left = self.wanted.num_by_model if passes is None else min(self.wanted.num_by_model, passes)

    def step(self) -> None:
        if self.num_left:
            self.num_left -= 1
            self.num_drafted += 1


def by_model(count: int) -> Fake:
    return Fake(WantedDraft(count, 0, 1.0))


def free(count: int, expected: float) -> Fake:
    return Fake(WantedDraft(0, count, expected))


def turns(rounds: DraftRounds, fakes: list[Fake]) -> list[tuple[str, list[str]]]:
    """Runs steps to the first verification, or the first step without drafts. Returns who was in each pass, and each
    verification's groups, as places in `fakes`."""
    sequences, seen = [cast(Sequence, fake) for fake in fakes], list[tuple[str, list[str]]]()

    def named(own: list[Sequence]) -> str:
        return "".join(str(sequences.index(sequence)) for sequence in own)

    while True:
        running = rounds.begin(sequences)
        drafts = any(fake.is_drafting for fake in fakes)
        for fake in fakes:
            fake.step()
        groups = rounds.complete(sequences)
        seen.append((named(running), [named(group) for group in groups]))
        if groups or not drafts:
            return seen


def test_sequences_draft_as_often_as_they_want_on_average_and_are_verified_together() -> None:
    fakes = [by_model(4), by_model(3), by_model(2)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("012", []), ("012", []), ("01", ["012"])]
    assert [fake.began for fake in fakes] == [[3], [3], [3]]


def test_whose_draft_is_complete_waits_and_who_drafts_nothing_is_verified_with_them() -> None:
    fakes = [by_model(3), free(1, 1.9), by_model(3), Fake(NOTHING)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("02", []), ("02", ["0123"])]


def test_other_modes_decode_in_every_pass() -> None:
    fakes = [by_model(2), Fake(None), by_model(2)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("012", []), ("012", ["02"])]
    assert turns(DraftRounds(COSTS, True), [Fake(None), Fake(None)]) == [("01", [])]


def test_a_lone_sequence_decides_for_itself() -> None:
    fakes = [by_model(2)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("0", []), ("0", ["0"])]
    assert fakes[0].began == [None]


def test_all_decode_where_no_draft_pays() -> None:
    fakes = [Fake(NOTHING), Fake(NOTHING)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("01", [])]
    # A third and a fourth row are free, more are not.
    fakes = [free(3, 1.9), free(3, 1.9)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("01", [])]


def test_of_drafts_without_the_model_those_are_verified_that_gain_most_together() -> None:
    fakes = [free(2, 1.5), free(2, 2.8), Fake(NOTHING)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("012", [])]
    fakes = [free(2, 1.5), free(2, 2.8)]
    assert turns(DraftRounds(COSTS, True), fakes) == [("", ["01"])]
    assert [fake.num_drafted for fake in fakes] == [0, 2]


def test_after_rounds_in_which_nothing_paid_some_tokens_pass_before_drafts_are_asked_for_again() -> None:
    rounds, fakes = DraftRounds(COSTS, True), [Fake(NOTHING), Fake(NOTHING)]
    num_asked = list[int]()
    for _ in range(20):
        assert turns(rounds, fakes) == [("01", [])]
        num_asked.append(fakes[0].num_asked)
    assert num_asked == [1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6]
    fakes[0].wanted = fakes[1].wanted = WantedDraft(0, 1, 1.9)
    assert [turns(rounds, fakes) for _ in range(4)] == [[("01", [])]] * 4
    assert turns(rounds, fakes) == [("", ["01"])]


def test_who_comes_meanwhile_joins_for_the_passes_that_are_left() -> None:
    rounds, fakes = DraftRounds(COSTS, True), [by_model(4), by_model(4)]
    sequences = [cast(Sequence, fake) for fake in fakes]
    assert rounds.begin(sequences) == sequences
    for fake in fakes:
        fake.step()
    fakes.append(by_model(4))
    assert [ran for ran, _ in turns(rounds, fakes)] == ["012", "012", "012"]
    assert fakes[2].began == [3]


def test_no_pass_verifies_more_rows_than_were_measured() -> None:
    fakes = [by_model(30), by_model(30), by_model(30)]
    assert turns(DraftRounds(COSTS, True), fakes)[-1] == ("012", ["01", "2"])


def test_sequences_that_share_nothing_neither_wait_nor_are_verified_together() -> None:
    fakes = [by_model(1), by_model(3), free(2, 2.0)]
    assert turns(DraftRounds(COSTS, False), fakes) == [("01", ["0", "2"])]
    assert [fake.began for fake in fakes] == [[None], [None], [None]]
