"""Guesses: tokens that a pass runs beside a sequence's last one, because its output likely goes on with them.

A row of such a pass has the bits that it has alone, and each token is chosen from the row before it as ever. So the
output of a plan stays what it was: a right guess saves a pass, and a wrong one costs its row. A constraint says what it
forces. The model may still split that into other tokens, and is asked, as it is not by jump-forward decoding (SGLang,
Zheng et al. 2024). Where nothing is forced, the text may have had the last tokens before (prompt lookup, Saxena 2023).
Knows tokens, counts and seconds; knows no sequences and no passes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple

import numpy

from dash_runtime.actions import Action, LatencyTable
from dash_runtime.engine.speculative import ForcedText, follow
from dash_runtime.engine.text_drafts import TextDrafts
from dash_runtime.events import SpeculationStatistics
from dash_runtime.passes import LONGEST_MATCH, MOST_GUESSES
from dash_runtime.policy.draft_length import FORCED_MATCH, MATCHES, DraftLength

_LEAST_GAIN, _GAIN_BY_SEQUENCE = 1.03, 0.02
"""The least gain that guesses must promise, and how much more for each sequence: the seconds leave out that new rows
are made ready, and that each token is chosen by itself."""
_GUESSING_SECONDS = 2e-4
"""Seconds that a pass with guesses takes beside its layers and heads."""
_USUAL_CHANCE = 0.4
"""Probability of a guess from the text, by which it is known whether several sequences ask at all: that takes each of
them a hundredth of a step."""
_TOKENS_OF_A_RULE = 32
"""Tokens after which it is asked again which guesses of a lone sequence pay."""


class PassSeconds:
    """The seconds that a pass takes whose rows all run one plan.

    Args:
        beside: what all but the layers takes. A head reads its weights once for all rows.
        saved: the seconds that a pass of so many sequences saves where it has no guesses, by its policy's skips.
    """

    def __init__(
        self,
        latencies: LatencyTable,
        plan: Iterable[Action],
        beside: float = 0.0,
        saved: Callable[[int], float] = lambda num_rows: 0.0,
    ) -> None:
        self._latencies = latencies
        self._beside = beside
        self._counts = Counter(plan)
        self._saved = saved
        self._least_paces: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._text_may_pay: dict[int, bool] = {}

    def of(self, num_rows: int) -> float:
        if num_rows not in self._seconds:
            layers = (count * self._latencies.cost(action, num_rows) for action, count in self._counts.items())
            self._seconds[num_rows] = self._beside + sum(layers)
        return self._seconds[num_rows]

    def least_pace(self, num_sequences: int) -> float:
        """Returns the tokens a second from which on guesses of so many sequences pay."""
        if num_sequences not in self._least_paces:
            seconds = self.of(num_sequences) - self._saved(num_sequences)
            least_gain = _LEAST_GAIN + _GAIN_BY_SEQUENCE * num_sequences
            self._least_paces[num_sequences] = least_gain * num_sequences / seconds
        return self._least_paces[num_sequences]

    def may_pay(self, num_sequences: int) -> bool:
        """Returns False if guesses of so many sequences would not even pay if all were right. To ask the constraints of
        sixteen takes a twentieth of a step."""
        most = num_sequences * (1 + MOST_GUESSES)
        return most / self.of(most) > self.least_pace(num_sequences)

    def text_may_pay(self, num_sequences: int) -> bool:
        """Returns False if usual guesses from the texts of so many sequences would not pay."""
        if num_sequences not in self._text_may_pay:
            usual = {place: [_USUAL_CHANCE] for place in range(num_sequences)}
            self._text_may_pay[num_sequences] = bool(self.numbers_that_pay(usual, num_sequences))
        return self._text_may_pay[num_sequences]

    def numbers_that_pay(self, chances: Mapping[int, Sequence[float]], num_sequences: int) -> Counter[int]:
        """Returns how many guesses each sequence should have in the next pass, by place, so that the pass puts out most
        tokens a second; nothing if guesses hardly help.

        Args:
            chances: the probability of each guess that all are right up to this one, by place.
        """
        ordered = sorted(((own, place) for place, each in chances.items() for own in each), key=lambda one: -one[0])
        output, best, best_pace = float(num_sequences), 0, self.least_pace(num_sequences)
        for count, (chance, _) in enumerate(ordered, start=1):
            output += chance
            if (pace := output / (_GUESSING_SECONDS + self.of(num_sequences + count))) > best_pace:
                best, best_pace = count, pace
        return Counter(place for _, place in ordered[:best])


class Wanted(NamedTuple):
    """The tokens that a sequence may guess, and the probability of each that all are right up to it."""

    token_ids: list[int]
    chances: list[float]


class Guesses:
    """The guesses of one sequence.

    How many tokens of the text are worth a guess is asked every so many tokens, and no matter how many come together.
    So what a sequence that runs alone guesses depends on its tokens only.

    Args:
        prompt: the prompt, where the text may be asked; None: constraints only.
        num_more: tokens that may follow it.
    """

    def __init__(
        self, seconds: PassSeconds, forced: ForcedText | None, prompt: Sequence[int] | None = None, num_more: int = 0
    ) -> None:
        self.seconds = seconds
        self._forced = forced
        self._prompt, self._num_more = prompt, num_more
        self._text: TextDrafts | None = None
        """Made when it is first asked: among many sequences nobody asks."""
        self._num_followed = 0
        self._lengths = DraftLength(0.0, {})
        self._numbers: Sequence[int] = ()
        """Numbers of tokens of the text that a lone sequence guesses, by match."""
        self._rule_ends = 0
        """The length of the output from which on that is asked again."""
        self._matches: Sequence[int] = ()
        self._num_guessed = 0
        self._num_right: list[int] = []
        """The number of right guesses of each pass with guesses."""

    def wanted(self, output_ids: Sequence[int], num_tokens_left: int, num_sequences: int) -> Wanted:
        """Returns what the next pass, of so many sequences, may run. It puts out one token more."""
        room = min(MOST_GUESSES, num_tokens_left - 1)
        token_ids = self._forced.forced(room) if self._forced is not None and room > 0 else []
        self._matches = [FORCED_MATCH] * len(token_ids)
        looks_up = num_sequences == 1 or self.seconds.text_may_pay(num_sequences)
        self._follow(output_ids, looks_up)
        if looks_up and not token_ids and room > 0 and self._text is not None:
            token_ids, match = self._text.propose((), room)
            self._matches = range(match, match + len(token_ids))
        return Wanted(token_ids, self._chances(self._matches))

    def wanted_alone(self, output_ids: Sequence[int], num_tokens_left: int) -> list[int]:
        """Returns what the next pass of a lone sequence runs."""
        token_ids, chances = self.wanted(output_ids, num_tokens_left, 1)
        numbers = self._rule()
        if token_ids and self._matches[0] == FORCED_MATCH:
            return token_ids[: self.seconds.numbers_that_pay({0: chances}, 1)[0]]
        return token_ids[: numbers[self._matches[0]]] if token_ids else []

    def wanted_in_burst(self, output_ids: Sequence[int]) -> tuple[tuple[numpy.ndarray, Sequence[int]] | None, int]:
        """Returns the text and the numbers of `TextGuesses`, if a burst may guess; and the tokens until that
        changes."""
        self._follow(output_ids, looks_up=True)
        numbers, num_tokens = self._rule(), self._rule_ends - self._num_followed
        if self._text is None or not any(numbers):
            return None, num_tokens
        return (self._text.tokens, numbers), num_tokens

    def cost(self, num_guesses: int) -> float:
        """Returns the cost of a pass of this sequence alone with so many guesses, as a multiple of one without."""
        return self.seconds.of(1 + num_guesses) / self.seconds.of(1)

    def checked(self, num_guesses: int, num_right: int) -> None:
        """Counts a pass with so many of the wanted guesses, of which the first `num_right` were right."""
        self._lengths.checked(self._matches[:num_guesses], num_right)

    def ran(self, num_guesses: int) -> None:
        """Counts a pass with so many guesses."""
        self._num_guessed += num_guesses
        self._num_right.append(0)

    def was_right(self) -> None:
        """Counts one more right guess of the last pass."""
        self._num_right[-1] += 1

    def statistics(self) -> SpeculationStatistics | None:
        """Returns the counts so far; None if nothing was guessed."""
        if not self._num_right:
            return None
        lengths = [self._num_right.count(length) for length in range(max(self._num_right) + 1)]
        return SpeculationStatistics(self._num_guessed, self._num_guessed, sum(self._num_right), lengths, 0, 0)

    def _follow(self, output_ids: Sequence[int], looks_up: bool) -> None:
        """Takes in the output since it was last told; its text too, if somebody is to look it up."""
        new = output_ids[self._num_followed :]
        if looks_up and self._prompt is not None:
            text = self._text = self._text or TextDrafts(self._prompt, self._num_more)
            for token_id in output_ids[text.num_tokens - len(self._prompt) : self._num_followed]:
                text.append(token_id)
            for token_id in new:
                follow(text, token_id, self._lengths)
                self._lengths.put_out(1)
        else:
            self._lengths.put_out(len(new))
        self._num_followed = len(output_ids)

    def _rule(self) -> Sequence[int]:
        if self._num_followed >= self._rule_ends:
            self._rule_ends = self._num_followed + _TOKENS_OF_A_RULE
            numbers = [0] * (LONGEST_MATCH + 1)
            for match, next_match in pairwise((*MATCHES, LONGEST_MATCH + 1)):
                chances = self._chances(range(match, match + MOST_GUESSES))
                numbers[match:next_match] = [self.seconds.numbers_that_pay({0: chances}, 1)[0]] * (next_match - match)
            self._numbers = numbers
        return self._numbers

    def _chances(self, matches: Iterable[int]) -> list[float]:
        return list(accumulate(map(self._lengths.acceptance, matches), mul))
