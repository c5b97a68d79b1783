"""Reads tokenizer.json, with errors that name it.

The `tokenizers` library turns text into tokens; it is imported when a file is read. Imports no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dash_runtime.errors import CheckpointNotFound, CorruptCheckpoint
from dash_runtime.files.atomic_file import require_regular_file
from dash_runtime.files.wording import one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 256 * 2**20
"""Several times the largest known file (some 35 MB)."""


def load_tokenizer(file: Path) -> "Tokenizer":
    """Returns the tokenizer in a tokenizer.json, without the truncation and padding that some files ask for.

    Raises:
        CheckpointNotFound: there is no such file.
        CorruptCheckpoint: it cannot be used.
    """
    from tokenizers import Tokenizer

    try:
        size_bytes = require_regular_file(file)
        if size_bytes > MAX_TOKENIZER_BYTES:
            limit = f"more than the {MAX_TOKENIZER_BYTES} that are read"
            raise CorruptCheckpoint(f"{file} has {size_bytes} bytes, {limit}.")
        tokenizer = Tokenizer.from_file(str(file))
    except FileNotFoundError:
        raise CheckpointNotFound(f"There is no file {file}.") from None
    except OSError as error:
        raise CorruptCheckpoint(f"{file} cannot be read: {error.strerror}.") from None
    except CorruptCheckpoint:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise CorruptCheckpoint(f"{file} is not a tokenizer: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
