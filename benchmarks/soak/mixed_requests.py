"""Generates a busy server's requests from a seed: all modes, short and long, sampled and greedy, some with a schema."""

import json
import random

from dash_api.v1 import common_pb2, generation_pb2

_QUESTIONS = (
    "What is the capital of France?",
    "A farmer has 17 sheep and buys 25 more, then sells a third of them. How many are left?",
    "Write two sentences about the sea.",
    "Name three metals, and say what each is used for.",
    "Why is the sky blue?",
    "Translate 'good morning' into French, Spanish and German.",
    "Explain what a hash table is to somebody who knows arrays.",
    "List the planets of the solar system, from the sun outwards.",
)
_LONG_TEXT = (
    "The river rises in the hills to the north and runs for ninety miles through farmland before it reaches the sea. "
    "In spring it floods the meadows beside the old mill, and the road to the village is closed for a week or two. "
)
_RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "kind_of_answer": {"enum": ["short", "long"]}},
    "required": ["name", "kind_of_answer"],
    "additionalProperties": False,
}
_SYSTEM = "You are a helpful assistant. Answer in plain words, and briefly, unless you are asked for more. "


def mixed_request(rng: random.Random, *, is_tiny: bool = False) -> generation_pb2.GenerationParameters:
    """Returns a request for the embedded model, or for a tiny model with little context."""
    parameters = generation_pb2.GenerationParameters()
    question = rng.choice(_QUESTIONS)
    if rng.random() < 0.7:
        system = _SYSTEM * (1 if is_tiny else rng.choice((1, 1, 4, 12)))
        messages = [("system", system), ("user", question)] if rng.random() < 0.5 else [("user", question)]
        for role, content in messages:
            parameters.chat.messages.append(common_pb2.ChatMessage(role=role, content=content))
    else:
        parameters.text = ("" if is_tiny else _LONG_TEXT * rng.randint(1, 6)) + question
    parameters.stopping.max_new_tokens = rng.choice((1, 4, 16, 32, 64, 96))
    parameters.stopping.ignore_eos = rng.random() < 0.3
    if rng.random() < 0.2:
        parameters.stopping.stop_strings.extend(rng.sample((".", "\n\n", "the", "and then"), 2))
    if rng.random() < 0.5:
        parameters.sampling.temperature = rng.choice((0.3, 0.8, 1.0))
        parameters.sampling.top_p = rng.choice((0.9, 1.0))
        parameters.sampling.repetition_penalty = rng.choice((1.0, 1.1))
    parameters.sampling.seed = rng.getrandbits(63)
    mode = rng.choice(("FULL_DEPTH", "ADAPTIVE", "ADAPTIVE", "EXACT", "FIXED"))
    parameters.skip.mode = common_pb2.Mode.Value(f"MODE_{mode}")
    if mode == "FIXED":
        parameters.skip.fixed_action = common_pb2.Action.Value(f"ACTION_{rng.choice(('INT4', 'INT8'))}")
    if mode == "ADAPTIVE" and rng.random() < 0.5:
        parameters.skip.compute_budget = 0.95 if is_tiny else rng.choice((0.6, 0.8, 0.95))
    if rng.random() < 0.15:
        parameters.constraint.json_schema = json.dumps(_RECORD)
    parameters.output.return_decisions = rng.random() < 0.3
    if rng.random() < 0.2:
        parameters.output.logprobs = 3
    return parameters
