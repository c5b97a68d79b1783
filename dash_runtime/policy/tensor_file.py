"""Reading and writing safetensors files of one's own: whole or not at all, and with errors that name the file.

Knows files; knows nothing of what is in them.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dash_runtime.errors import PolicyFileError
from dash_runtime.whole_file import replacing


def save_tensors(path: Path, what: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file in one rename, so that a reader never sees half of it.

    Raises:
        PolicyFileError: it cannot be written, naming `what` it is; what was there before is intact.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(contiguous, partial, metadata=dict(metadata))
    except (OSError, SafetensorError) as error:
        raise PolicyFileError(f"{what} {path} cannot be written ({error}); what was there before is intact") from None


def load_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors, on the CPU, and its metadata.

    Raises:
        PolicyFileError: it is missing or cannot be read, naming `what` it is.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise PolicyFileError(f"{what} {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise PolicyFileError(f"{what} {path} cannot be read: {error}") from None
