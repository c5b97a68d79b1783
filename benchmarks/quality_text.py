"""`python -m benchmarks.quality_text`: prepares the text and questions behind the quality figures of the docs.

Takes files as they are published: WikiText-2's validation split (one line a paragraph, tokenised), GSM8K's training
problems, and PIQA's validation questions with their labels. Writes HELD_OUT/, text that no training saw: GSM8K's
problems 6,000 to 6,080, and as much of the last quarter of WikiText-2, with its tokenisation undone; and TASKS/: the
first 800 of PIQA's questions, and the paragraphs whose last words are asked for.
"""

import argparse
import json
import re
from itertools import accumulate
from pathlib import Path

from dash_runtime.files.atomic_file import replacing

_PROBLEMS = slice(6000, 6080)
_NUM_QUESTIONS = 800
_CHAT_FRAME = 150
"""Characters that a chat template adds to a problem and its answer, or so."""


def plain_text(line: str) -> str:
    """Returns a line of WikiText-2 without its tokenisation."""
    text = re.sub(r" @([-,.])@ ", r"\1", line)
    text = re.sub(r" ([,.;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    text = re.sub(r' " (.+?) "', r' "\1"', text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    return text.replace(" <unk>", "").strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_text", description=__doc__)
    parser.add_argument("folder", type=Path, help="where HELD_OUT and TASKS are written")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2's validation split")
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--piqa", type=Path, help="PIQA's valid.jsonl; without it there are no questions")
    parser.add_argument("--piqa-labels", type=Path, help="PIQA's valid-labels.lst")
    options = parser.parse_args()
    lines = options.wikitext.read_text(encoding="utf-8").splitlines()
    paragraphs = [text for line in lines if len(text := plain_text(line)) > 1 and not text.startswith("=")]
    late = paragraphs[len(paragraphs) * 3 // 4 :]
    problems = options.gsm8k.read_text(encoding="utf-8").splitlines()[_PROBLEMS]
    answers = [json.loads(line) for line in problems]
    records = [{**own, "answer": re.sub(r"<<.*?>>", "", own["answer"])} for own in answers]
    num_characters = sum(len(own["question"]) + len(own["answer"]) + _CHAT_FRAME for own in records)
    ends = accumulate(map(len, late))
    as_much = [text for text, end in zip(late, ends, strict=True) if end <= num_characters]
    _write(options.folder / "HELD_OUT" / "wikitext.txt", as_much)
    _write(options.folder / "HELD_OUT" / "gsm8k.jsonl", [json.dumps(record) for record in records])
    _write(options.folder / "TASKS" / "paragraphs.txt", late)
    if options.piqa is not None:
        asked = [json.loads(line) for line in options.piqa.read_text(encoding="utf-8").splitlines()]
        labels = options.piqa_labels.read_text(encoding="utf-8").split()
        questions = [
            {"question": own["goal"], "choices": [own["sol1"], own["sol2"]], "answer": int(label)}
            for own, label in zip(asked, labels, strict=True)
        ]
        _write(options.folder / "TASKS" / "piqa.jsonl", [json.dumps(own) for own in questions[:_NUM_QUESTIONS]])


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{path}: {len(lines)} lines")


if __name__ == "__main__":
    main()
