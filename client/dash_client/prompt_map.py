"""Many prompts, some at a time: which is next, what became of each, and the progress. Shared by both clients.

Takes a prompt only when there is room for it, so a generator of millions is never held. Sends nothing.
"""

import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

from dash_client.calls import Call
from dash_client.errors import DashError, invalid_argument
from dash_client.types import Generation, Prompt


class PromptMap:
    """One `map`. Results are in the order of the prompts, and so are errors, unless they are to be raised."""

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
        """The next call and its place, None after the last.

        Raises:
            DashError: a prompt cannot be sent, and errors are to be raised.
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
        """What became of the call with this place.

        Raises:
            DashError: that, where errors are to be raised.
        """
        if self._raises and isinstance(result, DashError):
            raise result
        self._results[place] = result
        if self._bar is not None:
            self._bar.update()

    def results(self) -> list[Any]:
        """All of them, when all are done."""
        return self._results

    def close(self) -> None:
        """Leaves the progress bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _progress_bar(total: int | None) -> Any:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        warnings.warn("there is no progress bar without tqdm: pip install 'dash-llm[cli]'", stacklevel=4)
        return None
    return tqdm(total=total, unit="prompt")
