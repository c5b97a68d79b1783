"""Without a CUDA device nothing imports Triton."""

import sys

import pytest
import torch
from transformers import LlamaForCausalLM


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_models_and_optimizers_do_without_triton() -> None:
    assert LlamaForCausalLM is not None
    torch.optim.Adam([torch.zeros(1, requires_grad=True)]).step()
    assert not [name for name, module in sys.modules.items() if name.split(".")[0] == "triton" and module is not None]
