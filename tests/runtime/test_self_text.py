"""The model's own text: its answers in order, the same every time, written once and kept."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dash_runtime.actions import Action
from dash_runtime.checkpoints import resolve_checkpoint, tokenizer_file
from dash_runtime.checkpoints.chat_template import ChatTemplate
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.errors import ConfigError, InvalidRequest
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.training.data import load_tokenizer
from dash_runtime.training.self_text import (
    SelfTextSettings,
    default_training_sequences,
    self_generated_sequences,
    shipped_prompts,
)
from tests.runtime.support import full_plan, load_decoder, new_cache, run_rows
from tests.tiny_models import EOS_TOKEN_ID

USER, ASSISTANT = 257, 258
LENGTH = 16
SETTINGS = SelfTextSettings(("one", "two?", "three!"), max_new_tokens=12, num_slots=4)


class Run:
    """Calls with the tiny model, and the progress that they reported."""

    def __init__(self, decoder: Decoder, folder: Path, cache_file: Path) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer_file(folder)
        self.template = ChatTemplate.load(folder)
        self.cache_file = cache_file
        self.reports: list[str] = []
        self.eos_ids = frozenset((EOS_TOKEN_ID,))
        self.fingerprint = "tiny"

    def __call__(
        self, number: int = 6, length: int = LENGTH, settings: SelfTextSettings | None = SETTINGS
    ) -> list[list[int]]:
        self.reports.clear()
        return self_generated_sequences(
            self.decoder,
            self.tokenizer,
            self.template,
            self.eos_ids,
            number,
            length,
            self.cache_file,
            self.reports.append,
            fingerprint=self.fingerprint,
            settings=settings,
        )

    @property
    def was_kept(self) -> bool:
        return not self.reports

    def forget(self) -> None:
        self.cache_file.unlink()


@pytest.fixture
def run(decoder: Decoder, tiny_folder: Path, tmp_path: Path) -> Run:
    return Run(decoder, tiny_folder, tmp_path / "cache" / "own.safetensors")


def rendered(prompt: str) -> list[int]:
    return [USER, *f"{prompt}\n".encode(), ASSISTANT]


def conversations(sequences: list[list[int]], prompts: tuple[str, ...] = SETTINGS.prompts) -> list[list[int]]:
    """Returns the whole conversations: from one prompt to the next."""
    flat = [token for ids in sequences for token in ids]
    starts = [
        place for place in range(len(flat)) for ids in map(rendered, prompts) if flat[place : place + len(ids)] == ids
    ]
    assert starts[0] == 0
    return [flat[start:end] for start, end in pairwise(starts)]


def test_every_prompt_is_answered_through_the_chat_template_by_the_model_itself(run: Run, decoder: Decoder) -> None:
    run.eos_ids = frozenset()
    sequences = run(12, settings=replace(SETTINGS, temperature=0.0))
    assert [len(ids) for ids in sequences] == [LENGTH] * 12
    seen = set()
    for own in conversations(sequences)[:3]:
        text, prompt = next((text, ids) for text in SETTINGS.prompts if own[: len(ids := rendered(text))] == ids)
        answer = own[len(prompt) :]
        seen.add(text)
        assert len(answer) == SETTINGS.max_new_tokens
        for place, token in enumerate(answer):
            ids = prompt + answer[:place]
            logits = run_rows(decoder, [new_cache(decoder)], [ids], [full_plan(decoder)])
            assert logits[-1, token] >= logits[-1].max() - 0.1, "the likeliest token, but for bfloat16's rounding"
    assert len(seen) == 3, "each prompt once before any comes again"


def test_an_answer_ends_with_its_end_token(run: Run) -> None:
    run.eos_ids = frozenset(range(200))
    for own in conversations(run(4)):
        answer = own[own.index(ASSISTANT) + 1 :]
        assert [token < 200 for token in answer[:-1]] == [False] * (len(answer) - 1)
        assert answer[-1] < 200 or len(answer) == SETTINGS.max_new_tokens


def test_the_same_seed_gives_the_same_text_and_prompts_get_several_answers(run: Run) -> None:
    first = run(20)
    run.forget()
    assert run(20) == first
    own = conversations(first)
    assert len(own) > len(SETTINGS.prompts)
    assert len({tuple(ids) for ids in own}) == len(own)
    run.forget()
    assert run(20, settings=replace(SETTINGS, seed=-1)) != first


def test_text_depends_neither_on_the_batch_nor_on_how_much_is_wanted(run: Run) -> None:
    expected = run(10)
    for number, num_slots in ((10, 1), (10, 3), (4, 4), (1, 7)):
        run.forget()
        assert run(number, settings=replace(SETTINGS, num_slots=num_slots)) == expected[:number]


def test_what_was_written_is_kept_and_fewer_are_read_from_it(run: Run) -> None:
    written = run(6)
    assert not run.was_kept
    assert run.reports[0].startswith("letting the model write 6 sequences")
    assert run.reports[-1] == "the model has written 6 of 6 sequences"
    assert run(6, settings=replace(SETTINGS, num_slots=2)) == written
    assert run.was_kept
    assert run(2) == written[:2]
    assert run.was_kept
    assert run(7)[:6] == written
    assert not run.was_kept
    assert run(7)
    assert run.was_kept
    assert [path.name for path in run.cache_file.parent.iterdir()] == ["own.safetensors"]


def test_another_model_template_or_setting_is_written_anew(run: Run) -> None:
    run()
    for settings in (
        replace(SETTINGS, seed=1),
        replace(SETTINGS, temperature=0.8),
        replace(SETTINGS, top_p=0.5),
        replace(SETTINGS, max_new_tokens=11),
        replace(SETTINGS, prompts=("one", "two?")),
    ):
        run(settings=settings)
        assert not run.was_kept, settings
    run(length=LENGTH + 1)
    assert not run.was_kept
    run.fingerprint = "another"
    run(length=LENGTH + 1)
    assert not run.was_kept
    run.template = ChatTemplate(f"{run.template.source} ", {})
    run(length=LENGTH + 1)
    assert not run.was_kept
    run(length=LENGTH + 1)
    assert run.was_kept


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "one bit":
        file.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    elif kind == "text":
        file.write_text("not a file of tensors")
    else:
        with safe_open(file, framework="pt") as kept:
            metadata = kept.metadata()
            ids = kept.get_tensor("token_ids")
        tensors = {"token_ids": ids.long()} if kind == "type" else {"others": ids}
        save_file(tensors, file, metadata=metadata if kind != "no metadata" else None)


@pytest.mark.parametrize("kind", ["truncated", "one bit", "text", "type", "name", "no metadata"])
def test_a_damaged_file_is_made_anew(run: Run, kind: str) -> None:
    written = run()
    damage(run.cache_file, kind)
    assert run() == written
    assert not run.was_kept
    run()
    assert run.was_kept


def test_a_place_that_cannot_be_written_costs_only_time(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run.cache_file = tmp_path / "file" / "own.safetensors"
    assert run() == run()
    assert not run.was_kept
    run.cache_file = tmp_path
    assert len(run()) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_without_a_template_goes_on_from_the_prompts_line(run: Run) -> None:
    run.template = ChatTemplate(None, {})
    text = bytes(token for ids in run(4) for token in ids if token < 256)
    assert any(f"{prompt}\n".encode() in text for prompt in SETTINGS.prompts)


def test_prompts_that_leave_no_room_are_left_out_and_answers_end_with_the_context(run: Run) -> None:
    settings = replace(SETTINGS, prompts=("x" * 40, "y"), context_length=9, max_new_tokens=200)
    own = conversations(run(4, settings=settings), ("y",))
    assert {tuple(ids[:4]) for ids in own} == {(USER, *b"y\n", ASSISTANT)}
    assert max(len(ids) for ids in own) == 9


@pytest.mark.parametrize("prompts", [(), ("x" * 600,)])
def test_prompts_that_cannot_be_used_are_refused(run: Run, prompts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        run(settings=replace(SETTINGS, prompts=prompts))
    assert refusal.value.field == "prompts"


def test_a_template_that_refuses_a_prompt_is_told(run: Run) -> None:
    run.template = ChatTemplate("{{ raise_exception('no') }}", {})
    with pytest.raises(InvalidRequest, match="refuses it: no"):
        run()


def test_the_default_is_one_third_help_and_two_thirds_own_text_all_along(run: Run) -> None:
    settings = replace(SETTINGS, num_slots=8)

    def default() -> list[list[int]]:
        return default_training_sequences(
            run.decoder,
            run.tokenizer,
            run.template,
            run.eos_ids,
            30,
            LENGTH,
            run.cache_file,
            run.reports.append,
            fingerprint=run.fingerprint,
            settings=settings,
        )

    sequences = default()
    assert default() == sequences
    own = run(20, settings=settings)
    assert run.was_kept
    help_text = default_token_sequences(run.tokenizer, 10, LENGTH)
    assert sorted(sequences) == sorted(help_text + own)
    for number in range(1, 31):
        assert abs(sum(ids in help_text for ids in sequences[:number]) - number / 3) < 2


def test_the_shipped_prompts_are_many_short_and_different() -> None:
    prompts = shipped_prompts()
    assert len(set(prompts)) == len(prompts) >= 150
    assert max(len(prompt) for prompt in prompts) <= 125
    assert all(prompt == prompt.strip() for prompt in prompts)


@pytest.mark.embedded
def test_the_embedded_model_answers_in_its_own_tokens(embedded_cache: Path, tmp_path: Path) -> None:
    folder = resolve_checkpoint("embedded", None, embedded_cache)
    # Its two best first tokens tie in bf16, and machines break the tie differently.
    run = Run(load_decoder(folder, torch.float32, actions=(Action.FULL,)), folder, tmp_path / "own.safetensors")
    run.eos_ids = run.decoder.config.eos_token_ids
    settings = SelfTextSettings(("What is the capital of France?",), temperature=0.0)
    (ids,) = run(1, 46, settings)
    text = load_tokenizer(run.tokenizer).decode(ids, skip_special_tokens=False)
    question = run.template.render([("user", "What is the capital of France?")])
    assert text.startswith(f"{question}The capital of France is Paris.<|im_end|>")
