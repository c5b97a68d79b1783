"""Runs small work in one thread. Knows nothing of the work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs what torch's kernels do in one thread. Two spin while they wait for each other; beside a busy process that
    takes many times as long, and this takes seconds in any case."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
