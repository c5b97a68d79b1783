"""Fetches a model from the Hugging Face hub: configuration, tokenizer and safetensors, nothing else.

The hub library keeps its own cache and reads its own settings (token, endpoint, offline mode).
"""

import re
from collections.abc import Callable
from pathlib import Path

from dash_runtime.errors import CheckpointError, CheckpointNotFound

ALLOWED_FILES = ["model*.safetensors", "*.json", "*.jinja"]
IGNORED_FILES = ["*/*"]  # patterns match across folders, and folders hold other formats

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(model: str) -> bool:
    """Returns True if `model` is spelled as `organisation/name`."""
    return _HUB_ID.fullmatch(model) is not None


def download_snapshot(hub_id: str, revision: str | None, snapshot_download: Callable[..., str] | None = None) -> Path:
    """Returns the local folder of `hub_id` at `revision` (None: the default branch), downloaded if needed.

    Raises:
        CheckpointNotFound: the hub does not have it, or the hub cannot be reached and its cache does not have it.
        CheckpointError: the download failed.
    """
    from huggingface_hub import snapshot_download as fetch_from_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = (snapshot_download or fetch_from_hub)(
            hub_id, revision=revision, allow_patterns=ALLOWED_FILES, ignore_patterns=IGNORED_FILES
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{hub_id} is gated: accept its licence on the hub and log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise CheckpointNotFound(f"{hub_id} has no revision {revision!r} on the hub.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointNotFound(f"Neither a local folder nor the hub has {hub_id}.") from None
    except LocalEntryNotFoundError:
        raise CheckpointNotFound(f"{hub_id} is not in the hub's local cache, and the hub cannot be reached.") from None
    except Exception as error:
        # The hub library lets the errors of its HTTP client through.
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{hub_id} cannot be downloaded: {reason}") from None
    return Path(folder)
