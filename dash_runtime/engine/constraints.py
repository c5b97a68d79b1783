"""Keeps outputs to a schema, a pattern, a grammar or a choice: llguidance says which tokens may come next.

Knows one sequence's tokens and the tokenizer; knows no logits' origin, no batch and no transport.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark
from torch import Tensor

from dash_runtime.constraint import Constraint, ConstraintKind
from dash_runtime.errors import InvalidRequest
from dash_runtime.files.wording import one_line

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_WHITESPACE: "JsonCompileOptions" = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written as Python writes it. Free to choose, a small model may write blanks for ever; and what is forced need
not be chosen."""
_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
"""Bounds a grammar that was made to explode: to about 100 ms for its start, 15 ms for a token, and 40 MB."""
_MOST_SUBSCHEMAS = 200
"""Parts of a refused schema that are tried alone, to find which one is wrong."""


class ConstraintCompiler:
    """Makes the constraints of one model's sequences. Reading a large vocabulary takes a tenth of a second.

    Args:
        tokenizer_file: the model's tokenizer.json.
        vocab_size: the model's number of logits.
    """

    def __init__(
        self,
        tokenizer_file: Path,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        limits: LLParserLimits = _LIMITS,
    ) -> None:
        self._limits = limits
        text = tokenizer_file.read_text(encoding="utf-8")
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer = LLTokenizer(text, n_vocab=vocab_size, eos_token=self._eos_token_ids)

    def compile(self, constraint: Constraint) -> "TextConstraint":
        """Returns a constraint for one sequence.

        Raises:
            InvalidRequest: it cannot be used; the description says why and, in a schema, where.
        """
        matcher = self._matcher(constraint.kind, constraint.text)
        if matcher.is_error():
            reason = one_line(matcher.get_error())
            if constraint.kind is ConstraintKind.JSON_SCHEMA:
                reason = f"{self._place_of_error(constraint.json())}: {reason}"
            raise constraint.refusal(reason)
        return TextConstraint(constraint, matcher, self._tokenizer.vocab_size, self._eos_token_ids)

    def _matcher(self, kind: ConstraintKind, text: str) -> LLMatcher:
        match kind:
            case ConstraintKind.JSON_SCHEMA:
                has_options = text.lstrip().startswith("{")  # the other schemas are true and false
                grammar = LLMatcher.grammar_from_json_schema(text, _WHITESPACE if has_options else None)
            case ConstraintKind.REGEX:
                pattern = regex_to_lark(text, use_ascii="d")
                grammar = LLMatcher.grammar_from_lark(f"start: /{pattern}/")
            case ConstraintKind.LARK_GRAMMAR:
                grammar = LLMatcher.grammar_from_lark(text)
            case ConstraintKind.CHOICES:
                grammar = grammar_from("choice", text)
        return LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)

    def _place_of_error(self, schema: Any) -> str:
        """Returns the innermost part of a schema that is refused by itself, as a JSON pointer; `#` is the whole."""
        shared = {
            name: schema[name] for name in ("$defs", "definitions") if isinstance(schema, dict) and name in schema
        }
        place, tried = "#", 0
        parts = list(_subschemas(schema))
        while parts:
            name, part = parts.pop(0)
            tried += 1
            if tried > _MOST_SUBSCHEMAS:
                break
            text = json.dumps(part if isinstance(part, bool) else {**shared, **part})
            if self._matcher(ConstraintKind.JSON_SCHEMA, text).is_error():
                place += f"/{name}"
                parts = list(_subschemas(part))
        return place


def _subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yields the schemas directly inside a schema, each with the way to it."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            inner: Iterable[tuple[Any, Any]] = value.items()
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            inner = enumerate(value)
        elif key in ("items", "additionalProperties", "not"):
            inner = [("", value)]
        else:
            continue
        for name, part in inner:
            if isinstance(part, (dict, bool)):
                escaped = str(name).replace("~", "~0").replace("/", "~1")
                yield (f"{key}/{escaped}" if name != "" else key), part


class TextConstraint:
    """One sequence's constraint; a `LogitsProcessor`.

    Tokens that it does not allow are counted only: a draft may hold some, and they are taken back. So are those after
    the end.
    """

    def __init__(
        self, constraint: Constraint, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._constraint = constraint
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._num_followed = 0
        self._num_ignored = 0

    @property
    def failure(self) -> InvalidRequest | None:
        """The error that ends the request if the constraint cannot go on, because it has grown too complex."""
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
        if self._num_ignored or self._matcher.is_stopped():
            return []
        return self._matcher.compute_ff_tokens()[:count]

    def process(self, logits: Tensor) -> Tensor:
        if self._is_complete:
            ends = logits[self._eos_token_ids]
            logits.fill_(-torch.inf)
            logits[self._eos_token_ids] = ends
            return logits
        allowed = numpy.frombuffer(self._matcher.compute_bitmask(), numpy.uint8)
        if self._matcher.is_error():
            return logits
        forbidden = numpy.unpackbits(~allowed, bitorder="little", count=self._vocab_size).view(bool)
        return logits.masked_fill_(torch.from_numpy(forbidden), -torch.inf)

    def accept(self, token_id: int) -> None:
        can_follow = not self._num_ignored and not self._matcher.is_stopped()
        if can_follow and self._matcher.try_consume_tokens([token_id]):
            self._num_followed += 1
        else:
            self._num_ignored += 1

    def rollback(self, token_ids: Sequence[int]) -> None:
        num_ignored = min(self._num_ignored, len(token_ids))
        self._num_ignored -= num_ignored
        num_followed = len(token_ids) - num_ignored
        if num_followed:
            self._matcher.rollback(num_followed)
            self._num_followed -= num_followed
