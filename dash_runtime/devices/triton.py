"""Keeps Triton, which pip brings with torch's CUDA build, out of processes that have no CUDA device."""

import sys

import torch


def leave_triton_out() -> None:
    """Makes `import triton` fail here if there is no CUDA device; torch and transformers then do without it.

    Wherever it can be imported, torch's compiler imports it, and optimizers and transformers' models import that. It
    takes a second, and fills standard error with `nanobind: leaked …` as the process ends.
    """
    if not torch.cuda.is_available():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
