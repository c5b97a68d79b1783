"""Keeps outputs to a schema, a pattern, a grammar or a choice: llguidance says which tokens may come next.

Knows one sequence's tokens and the tokenizer; knows no logits' origin, no batch and no transport.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from dash_runtime.constraint import Constraint
from dash_runtime.devices import device_of
from dash_runtime.errors import InvalidRequest
from dash_runtime.files.wording import one_line
from dash_runtime.grammar import LIMITS, check_grammar, grammar_of

logger = logging.getLogger(__name__)


class ConstraintCompiler:
    """Makes the constraints of one model's sequences. The first one reads the vocabulary: 150,000 tokens take a second,
    and 140 MB.

    Args:
        tokenizer_file: the model's tokenizer.json.
        vocab_size: the model's number of logits.
        executor: what compiles one after another; None: a thread, since one may take a tenth of a second.
    """

    def __init__(
        self,
        tokenizer_file: Path,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        limits: LLParserLimits = LIMITS,
        executor: Executor | None = None,
    ) -> None:
        self._executor = executor or ThreadPoolExecutor(1, "constraints")
        self._limits = limits
        self._tokenizer_file, self._vocab_size = tokenizer_file, vocab_size
        self._eos_token_ids = sorted(eos_token_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        text = self._tokenizer_file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)

    def begin(self, constraint: Constraint) -> Future["TextConstraint"]:
        """Begins to compile a constraint, beside those who decode; the result is `compile`'s."""
        return self._executor.submit(self.compile, constraint)

    def compile(self, constraint: Constraint) -> "TextConstraint":
        """Returns a constraint for one sequence.

        Raises:
            InvalidRequest: it cannot be used; the description says why.
        """
        matcher = LLMatcher(self._tokenizer, grammar_of(constraint), limits=self._limits, log_level=0)
        if matcher.is_error():
            check_grammar(constraint)  # whose words are better, if it finds the error too
            raise constraint.refusal(one_line(matcher.get_error()))
        return TextConstraint(constraint, matcher, self._tokenizer.vocab_size, self._eos_token_ids)


class TextConstraint:
    """One sequence's constraint; a `LogitsProcessor`.

    Tokens that it does not allow are counted only: a draft may hold some, and they are taken back. So are those after
    the end.
    """

    mostly_leaves_first = True  # a model that was asked for such a text mostly begins it by itself

    def __init__(
        self, constraint: Constraint, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._constraint = constraint
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._num_followed = 0
        self._num_ignored = 0
        self._is_broken = False

    @contextmanager
    def _own_failure(self) -> Iterator[None]:
        """Keeps what the library raises from the other sequences of a batch. A panic of it is no Exception."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:
            logger.exception("the grammar library failed")
            self._is_broken = True

    @property
    def failure(self) -> InvalidRequest | None:
        """The error that ends the request if the constraint cannot go on, because it has grown too complex."""
        if self._is_broken:
            return self._constraint.refusal(f"after {self._num_followed} tokens: the grammar library failed")
        if not self._matcher.is_error():
            return None
        return self._constraint.refusal(f"after {self._num_followed} tokens: {one_line(self._matcher.get_error())}")

    def is_complete_after(self, num_tokens: int) -> bool:
        """True if the sequence's first `num_tokens` tokens are a whole output, after which nothing may come."""
        return num_tokens == self._num_followed and self._is_complete

    @property
    def _is_complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def forced(self, count: int) -> list[int]:
        """Returns at most `count` tokens that the text has to go on with, by its usual tokenisation."""
        with self._own_failure():
            if not (self._is_broken or self._num_ignored or self._matcher.is_stopped()):
                return self._matcher.compute_ff_tokens()[:count]
        return []

    def process(self, logits: Tensor) -> None:
        if not self._is_broken:
            with self._own_failure():
                self._process(logits)

    def _process(self, logits: Tensor) -> None:
        upload = device_of(logits.device).upload
        if self._is_complete:
            ids = upload(torch.tensor(self._eos_token_ids))
            ends = logits[ids]
            logits.fill_(-torch.inf)
            logits[ids] = ends
            return
        allowed = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        if self._matcher.is_error():
            return
        forbidden = numpy.unpackbits(~allowed, bitorder="little", count=self._vocab_size).view(bool)
        logits.masked_fill_(upload(torch.from_numpy(forbidden)), -torch.inf)

    def leaves_first(self, token_id: int) -> bool:
        with self._own_failure():
            if self._is_complete:
                return token_id in self._eos_token_ids
            return not (self._is_broken or self._num_ignored) and self._matcher.validate_tokens([token_id]) == 1
        return False

    def accept(self, token_id: int) -> None:
        can_follow = False
        with self._own_failure():
            if not (self._is_broken or self._num_ignored or self._matcher.is_stopped()):
                can_follow = self._matcher.try_consume_tokens([token_id]) == 1
        if can_follow:
            self._num_followed += 1
        else:
            self._num_ignored += 1

    def rollback(self, token_ids: Sequence[int]) -> None:
        num_ignored = min(self._num_ignored, len(token_ids))
        self._num_ignored -= num_ignored
        num_followed = len(token_ids) - num_ignored
        if num_followed:
            with self._own_failure():
                self._matcher.rollback(num_followed)
            self._num_followed -= num_followed
