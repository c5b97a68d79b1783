"""The default folder of the disk cache. Reads no environment of its own."""

from collections.abc import Mapping
from pathlib import Path


def default_cache_folder(environment: Mapping[str, str]) -> Path:
    """Returns `dash-llm` in the user's cache folder, which is $XDG_CACHE_HOME or ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash-llm"
