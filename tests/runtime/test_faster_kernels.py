"""A rounded kernel that is no faster than FULL's is not offered where that can happen."""

import torch

from dash_runtime.actions import Action
from dash_runtime.startup.faster_kernels import faster_actions, product_seconds
from tests.runtime.support import ALL_ACTIONS, CPU


def test_a_kernel_that_takes_as_long_as_fulls_is_left_out_and_skip_stays() -> None:
    seconds = {Action.FULL: 2.0, Action.INT8: 2.0, Action.INT4: 1.9}
    assert faster_actions(ALL_ACTIONS, seconds.__getitem__) == (Action.SKIP, Action.INT4, Action.FULL)


def test_more_and_larger_matrices_take_longer() -> None:
    few = product_seconds(Action.FULL, {(64, 64)}, CPU, torch.bfloat16)
    many = product_seconds(Action.FULL, {(64, 64), (4096, 4096)}, CPU, torch.bfloat16)
    assert 0 < few < many
