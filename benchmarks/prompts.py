"""The prompts for all contenders, in token ids. Knows a tokenizer; knows no contenders."""

import argparse
import logging
import pydoc
import subprocess
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks import exact_prompts

_TOPICS = (
    "bread is made, from the field to the oven", "a bicycle stays upright", "rain forms in the clouds",
    "a letter finds its way across the sea", "bees share the work in a hive", "glass is blown into a bottle",
    "a bridge carries its own weight", "cheese ripens in a cellar", "the moon moves the tides",
    "a book was printed in the year 1500", "birds find their way south", "paper is made from wood",
    "a clock keeps its time", "a forest grows back after a fire", "salt was taken from the sea",
    "a violin gets its sound",
)  # fmt: skip

# The beginning of a long prompt is cut off, so prompts differ at the end.
_MANNERS = ("", ", in short words", ", as to a child", ", step by step")


class Prompts:
    """Prompts in the token ids of one tokenizer."""

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer = tokenizer = Tokenizer.from_file(str(tokenizer_file))
        questions = (f"Tell me how {topic}{manner}." for manner in _MANNERS for topic in _TOPICS)
        self._chats = [self.encode(_chat(question)) for question in questions]
        own, *before = (pydoc.plain(pydoc.TextDoc().document(module)) for module in (argparse, logging, subprocess))
        text: list[int] = tokenizer.encode(own).ids
        self._text = [*tokenizer.encode("".join(before)).ids, *text[: len(text) // 2]]

        chats = [_chat(text) for text in (*exact_prompts.CHATS, *exact_prompts.WORD_PROBLEMS)]
        self.exact = [self.encode(text) for text in (*chats, *exact_prompts.TEXTS)]
        """The prompts for EXACT: conversations, word problems, texts to continue."""
        self.copying = [self.encode(_chat(text)) for text in exact_prompts.COPYING]
        """Those whose answers repeat much of the prompt."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    @property
    def single(self) -> list[int]:
        """The prompt of all measurements with one stream."""
        return self._chats[0]

    def streams(self, count: int) -> list[list[int]]:
        """Returns up to 64 different prompts, cut at the front to one length, so that no contender has to pad.

        Raises:
            ValueError: there are not as many.
        """
        if count > len(self._chats):
            raise ValueError(f"there are {len(self._chats)} prompts, not {count}")
        length = min(map(len, self._chats))
        return [ids[-length:] for ids in self._chats[:count]]

    def text(self, num_tokens: int) -> list[int]:
        """Returns `num_tokens` tokens of plain text. A shorter text is the end of a longer one."""
        if num_tokens > len(self._text):
            raise ValueError(f"the text has no {num_tokens} tokens")
        return self._text[len(self._text) - num_tokens :]


def _chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
