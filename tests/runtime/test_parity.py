"""The decoder agrees with transformers, the reference."""

from pathlib import Path

import pytest
import torch
import transformers

from dash_runtime.actions import Action
from dash_runtime.decoder.decoder import Decoder
from tests.runtime.support import full_plan, load_decoder, new_cache, run_rows
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    ",
    "12 + 7 = 19. 25 + 8 =",
    "Once upon a time, in a village by the sea,",
]
NUM_TOKENS = 32


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[transformers.PreTrainedModel, Decoder]:
    """A family's tiny model in transformers and in our decoder."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return reference, load_decoder(folder, actions=(Action.SKIP, Action.FULL))


@torch.inference_mode()
def test_logits_agree_with_transformers_in_prefill_and_decode(
    pair: tuple[transformers.PreTrainedModel, Decoder],
) -> None:
    reference, decoder = pair
    some_ids = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    plan = full_plan(decoder)
    for token_ids in (some_ids, some_ids[:32]):  # longer than the context that some ropes were made for, and not
        cache = new_cache(decoder, len(token_ids))
        expected = reference(torch.tensor([token_ids])).logits[0]
        pieces = [token_ids[:13], token_ids[13:30], *([token_id] for token_id in token_ids[30:])]
        logits = torch.cat([run_rows(decoder, [cache], [piece], [plan]) for piece in pieces])
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
        assert (logits.argmax(-1) == expected.argmax(-1)).all()


@torch.inference_mode()
def test_greedy_tokens_decoded_in_a_batch_equal_those_of_transformers(
    pair: tuple[transformers.PreTrainedModel, Decoder],
) -> None:
    reference, decoder = pair
    generator = torch.Generator().manual_seed(4)
    # Answers that pass 16, 32 and 64 tokens, for which some ropes were made, and a prompt that has passed all.
    prompts = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (3, 20, 50, 77)]
    for prompt, output in zip(prompts, decode_greedily(decoder, prompts, 32), strict=True):
        assert most_probable_tokens(reference, prompt, output) == output


def most_probable_tokens(reference: transformers.PreTrainedModel, prompt: list[int], output: list[int]) -> list[int]:
    """Returns the token that the reference writes at each place of the output: all, if the output is its greedy one."""
    token_ids: list[int] = reference(torch.tensor([prompt + output])).logits[0].argmax(-1).tolist()
    return token_ids[len(prompt) - 1 : -1]


@pytest.mark.embedded
@torch.inference_mode()
def test_greedy_tokens_of_the_embedded_model_equal_those_of_transformers(embedded_folder: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_folder)
    decoder = load_decoder(embedded_folder, actions=(Action.FULL,))
    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    outputs = decode_greedily(decoder, prompts, NUM_TOKENS)
    for prompt, prompt_ids, output in zip(PROMPTS, prompts, outputs, strict=True):
        assert most_probable_tokens(reference, prompt_ids, output) == output, prompt


def decode_greedily(decoder: Decoder, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Returns `num_tokens` tokens after each prompt, decoded at full depth in one batch."""
    plans = [full_plan(decoder)] * len(prompts)
    caches = [new_cache(decoder) for _ in prompts]
    outputs = [
        [int(run_rows(decoder, [cache], [prompt], [plan])[-1].argmax())]
        for cache, prompt, plan in zip(caches, prompts, plans, strict=True)
    ]
    while len(outputs[0]) < num_tokens:
        logits = run_rows(decoder, caches, [output[-1:] for output in outputs], plans)
        for output, token_id in zip(outputs, logits.argmax(-1).tolist(), strict=True):
            output.append(token_id)
    return outputs
