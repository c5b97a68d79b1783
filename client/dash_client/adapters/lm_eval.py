"""A model of lm-evaluation-harness that asks a dash server, over gRPC. Needs the package `lm_eval`.

    import lm_eval
    from dash_client.adapters.lm_eval import DashServedModel

    model = DashServedModel("localhost:50051", prefix_token_id=0, mode="adaptive")
    lm_eval.simple_evaluate(model=model, tasks=["piqa"])

The server scores and generates; this module only words the questions. Knows the harness and the client.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any, TypeVar, Unpack

from lm_eval.api.instance import Instance  # type: ignore[import-not-found,import-untyped,unused-ignore]
from lm_eval.api.model import LM  # type: ignore[import-not-found,import-untyped,unused-ignore]
from lm_eval.utils import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    get_rolling_token_windows,
    make_disjoint_window,
)

from dash_client.client import DashClient
from dash_client.errors import invalid_argument
from dash_client.score import ScoreOptions

_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_TOKENS = 256
_PATH = ("mode", "compute_budget", "policy_name", "fixed_action")

R = TypeVar("R")


class DashServedModel(LM):  # type: ignore[misc,unused-ignore]
    """A served model, in one mode and at one budget.

    Args:
        target: as for `DashClient`, or a client.
        prefix_token_id: the token before a text without a context, such as the model's BOS token.
        max_concurrency: requests at a time.
        options: mode, budget and policy of all requests; see `ScoreOptions`.
    """

    def __init__(
        self,
        target: str | DashClient | None = None,
        *,
        prefix_token_id: int,
        max_concurrency: int = 8,
        **options: Unpack[ScoreOptions],
    ) -> None:
        super().__init__()
        self._client = target if isinstance(target, DashClient) else DashClient(target)
        self._prefix_token_id = prefix_token_id
        self._max_concurrency = max_concurrency
        self._options = options
        info = self._client.model_info()
        self._context_length = min(info.context_length, info.cache_tokens)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood in nats, and True if greedy decoding would have given it."""
        return self._each(requests, "loglikelihood", lambda arguments: self._likelihood(*arguments))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns each text's log-likelihood in nats, in windows as long as the context; each token counts once."""
        return self._each(requests, "loglikelihood_rolling", lambda arguments: self._rolling(*arguments))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns greedy continuations up to the request's stop strings.

        Raises:
            InvalidArgumentError: a request asks for sampling, or leaves no room for a prompt.
        """
        return self._each(requests, "generate_until", lambda arguments: self._generated(*arguments))

    def _each(self, requests: Sequence[Instance], kind: str, answer: Callable[[Any], R]) -> list[R]:
        with ThreadPoolExecutor(self._max_concurrency) as threads:
            answers = list(threads.map(answer, [request.args for request in requests]))
        for request, own in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, own)
        return answers

    def _likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        given, together = self._tokens(context), self._tokens(context + continuation)
        pairs = zip(given, together, strict=False)
        num_given = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not num_given:
            together, num_given = [self._prefix_token_id, *together], 1
        # A context that is too long loses its beginning; the server refuses a continuation that is.
        surplus = min(max(0, len(together) - self._context_length), num_given - 1)
        score = self._client.score(together[surplus:num_given], together[num_given:], **self._options)
        return score.log_probability, score.is_greedy

    def _rolling(self, text: str) -> float:
        windows = map(
            make_disjoint_window,
            get_rolling_token_windows(list(self._tokens(text)), self._prefix_token_id, self._context_length - 1, 1),
        )
        scores = (self._client.score(given, scored, **self._options) for given, scored in windows)
        return sum(score.log_probability for score in scores)

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        if options.get("do_sample") or (options.get("temperature") and options.get("do_sample") is None):
            raise invalid_argument("generation_kwargs", "ask for sampling; only greedy generation is compared here")
        limits = [options[name] for name in _MAX_TOKENS_NAMES if options.get(name) is not None]
        max_new_tokens = int(limits[0]) if limits else _DEFAULT_MAX_TOKENS
        room = self._context_length - max_new_tokens
        if room < 1:
            raise invalid_argument(
                "max_gen_toks", f"{max_new_tokens} leaves no prompt in {self._context_length} tokens"
            )
        until: str | Iterable[str] = options.get("until") or ()
        stop = [until] if isinstance(until, str) else list(until)
        prompt = list(self._tokens(context))[-room:] or [self._prefix_token_id]
        how: dict[str, Any] = {name: self._options.get(name) for name in _PATH}
        return self._client.generate(prompt, max_new_tokens=max_new_tokens, stop=stop or None, **how).text

    def _tokens(self, text: str) -> Sequence[int]:
        return self._client.tokenize(text) if text else ()
