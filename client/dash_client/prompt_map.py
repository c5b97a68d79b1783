"""The state of a `map` over many prompts: hands out calls, keeps results, shows progress. Shared by both clients.

Takes a prompt only when it can be sent, so a generator of millions is never held in memory. Sends nothing.
"""

import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

from dash_client.calls import Call
from dash_client.errors import DashError, invalid_argument
from dash_client.options import Prompt
from dash_client.types import Generation


class PromptMap:
    """One `map`. Results and errors are in the order of the prompts, unless errors are raised."""

    def __init__(
        self,
        prompts: Iterable[Prompt],
        generate: Callable[[Prompt], Call[Generation]],
        *,
        max_concurrency: int,
        progress: bool,
        raise_errors: bool,
    ) -> None:
        if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise invalid_argument("max_concurrency", f"must be an integer of 1 or more, not {max_concurrency!r}")
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise invalid_argument("prompts", f"must be several prompts, not {type(prompts).__name__}")
        self.max_concurrency = max_concurrency
        self._prompts = iter(prompts)
        self._generate = generate
        self._raises = raise_errors
        self._results: list[Generation | DashError | None] = []
        self._bar = _progress_bar(len(prompts) if isinstance(prompts, Sized) else None) if progress else None

    def next(self) -> tuple[int, Call[Generation]] | None:
        """Returns the next call and its place, or None after the last.

        Raises:
            DashError: a prompt cannot be sent, and `raise_errors` is set.
        """
        for prompt in self._prompts:
            place = len(self._results)
            self._results.append(None)
            try:
                return place, self._generate(prompt)
            except DashError as error:
                self.done(place, error)
        return None

    def done(self, place: int, result: Generation | DashError) -> None:
        """Takes the result of the call with this place.

        Raises:
            DashError: the result is an error, and `raise_errors` is set.
        """
        if self._raises and isinstance(result, DashError):
            raise result
        self._results[place] = result
        if self._bar is not None:
            self._bar.update()

    def results(self) -> list[Any]:
        """Returns all results, once all calls are done."""
        return self._results

    def close(self) -> None:
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _progress_bar(total: int | None) -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        warnings.warn("there is no progress bar without tqdm: pip install 'dash-llm[cli]'", stacklevel=4)
        return None
    return tqdm(total=total, unit="prompt")
