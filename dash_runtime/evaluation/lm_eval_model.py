"""A model of lm-evaluation-harness (the extra `eval`) that runs our decoder with a policy:

    lm_eval.simple_evaluate(model=DashModel(...), tasks=["arc_easy"])

Knows the harness; knows no layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance  # type: ignore[import-not-found,import-untyped,unused-ignore]
from lm_eval.api.model import LM  # type: ignore[import-not-found,import-untyped,unused-ignore]
from lm_eval.utils import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    get_rolling_token_windows,
    make_disjoint_window,
)

from dash_runtime.engine.engine import Engine
from dash_runtime.errors import ConfigError
from dash_runtime.evaluation.likelihood import Encode, Passage, Run, passage_of
from dash_runtime.evaluation.open_answers import Decode, generate, skip_options

_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_TOKENS = 256


class DashModel(LM):
    """One path: full depth, or a policy at a budget.

    Args:
        run: scores the log-likelihood requests (`rollout_runner`, `full_depth_runner`).
        engine: serves the generation requests, at `budget` (None: full depth) with the policy called `policy_name`.
        prefix_token_id: the token before a text without a context: the model's BOS or end-of-text token.
        context_length: tokens that `run` and `engine` take; a longer context loses its beginning.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        encode: Encode,
        decode: Decode,
        *,
        budget: float | None,
        prefix_token_id: int,
        context_length: int,
        policy_name: str | None = None,
    ) -> None:
        super().__init__()
        self._run = run
        self._engine = engine
        self._encode = encode
        self._decode = decode
        self._skip = skip_options(budget, policy_name)
        self._prefix_token_id = prefix_token_id
        self._context_length = context_length

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood in nats, and True if greedy decoding would have given it."""
        scores = self._run([self._passage(*request.args) for request in requests])
        likelihoods = [(float(score.log_probs.double().sum()), score.is_greedy) for score in scores]
        for request, own in zip(requests, likelihoods, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, own)
        return likelihoods

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns each text's log-likelihood in nats, in windows as long as the context; each token counts once."""
        likelihoods = []
        for request in requests:
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(list(self._encode(text)), self._prefix_token_id, self._context_length, 1),
            )
            scores = self._run([Passage([*given, *scored], len(given)) for given, scored in windows])
            likelihoods.append(sum(float(score.log_probs.double().sum()) for score in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, likelihoods[-1])
        return likelihoods

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns greedy continuations up to the request's stop strings.

        Raises:
            ConfigError: a request asks for sampling.
        """
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(_stopping(request.args[1]), []).append(place)
        texts: dict[int, str] = {}
        for (stop, max_new_tokens), places in groups.items():
            room = self._context_length - max_new_tokens
            if room < 1:
                raise ConfigError("max_gen_toks", f"{max_new_tokens} leaves no prompt in {self._context_length} tokens")
            prompts = [list(self._encode(requests[place].args[0]))[-room:] for place in places]
            prompts = [prompt or [self._prefix_token_id] for prompt in prompts]
            outputs = generate(self._engine, self._decode, prompts, self._skip, max_new_tokens, stop)
            texts |= {place: output.text for place, output in zip(places, outputs, strict=True)}
        for place, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[place])
        return [texts[place] for place in range(len(requests))]

    def _passage(self, context: str, continuation: str) -> Passage:
        if context:
            passage = passage_of(self._encode, context, continuation)
        else:
            passage = Passage([self._prefix_token_id, *self._encode(continuation)], 1)
        # At least one given token must stay; the runner refuses a passage that is still too long.
        surplus = min(len(passage.token_ids) - 1 - self._context_length, passage.num_given - 1)
        if surplus <= 0:
            return passage
        return Passage(passage.token_ids[surplus:], passage.num_given - surplus)


def _stopping(options: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Returns the stop strings and the number of tokens that a generation request asks for."""
    if options.get("do_sample") or (options.get("temperature") and options.get("do_sample") is None):
        raise ConfigError("generation_kwargs", "ask for sampling; only greedy generation is compared here")
    until: str | Sequence[str] = options.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    limits = [options[name] for name in _MAX_TOKENS_NAMES if options.get(name) is not None]
    return tuple(string for string in stop if string), int(limits[0]) if limits else _DEFAULT_MAX_TOKENS
