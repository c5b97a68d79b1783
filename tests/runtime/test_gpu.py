"""What only a GPU can show: real graphs, kernels and streams compute what eager layers and the CPU do."""

import gc
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.config import SkipOptions
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices.cuda_graphs import CaptureFailed, CudaCapture
from dash_runtime.layers.compensation import Affine
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import load_policy
from tests.runtime.random_policy import save_random_policy
from tests.runtime.support import CPU, load_decoder, some_affine
from tests.runtime.test_cuda_backend import ADAPTIVE, FULL_DEPTH, decoded, engine_of, generated, prepare, sampled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda", 0)


def cuda_decoder(folder: Path, dtype: torch.dtype = torch.float32, has_graphs: bool = True) -> Decoder:
    return load_decoder(folder, dtype, (Action.SKIP, Action.FULL), CUDA, has_graphs)


def policy_on(device: torch.device, folder: Path, tmp_path: Path) -> LearnedPolicy:
    """Returns the same policy, with SKIP and FULL, on any device."""
    path = save_random_policy(tmp_path / "policy.safetensors", folder)
    config = load_model_config(folder)
    fingerprint = model_fingerprint(config, open_weights(folder))
    policy = load_policy(path, config, fingerprint, dtype=torch.float32, device=device)
    return policy.without({Action.INT8, Action.INT4})


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_graphs_compute_what_eager_layers_do(
    tiny_folder: Path, num_rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    eager = cuda_decoder(tiny_folder, dtype, has_graphs=False)
    affine = some_affine(eager)
    own = Affine(affine.factors.to(CUDA), affine.offsets.to(CUDA))
    expected = decoded(eager, num_rows, own, running=(Action.FULL,))
    actual = decoded(cuda_decoder(tiny_folder, dtype), num_rows, own, running=(Action.FULL,))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("skip", [FULL_DEPTH, ADAPTIVE], ids=["full", "adaptive"])
def test_an_engine_gives_the_cpus_tokens_twice(
    tiny_folder: Path, tmp_path: Path, num_rows: int, skip: SkipOptions
) -> None:
    expected = generated(engine_of(load_decoder(tiny_folder), policy_on(CPU, tiny_folder, tmp_path)), num_rows, skip)
    policy = policy_on(CUDA, tiny_folder, tmp_path)
    engine = engine_of(cuda_decoder(tiny_folder), policy)
    prepare(engine, policy)
    assert [generated(engine, num_rows, skip) for _ in range(2)] == [expected] * 2


def test_sampled_rows_get_the_cpus_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    expected = sampled(engine_of(load_decoder(tiny_folder), policy_on(CPU, tiny_folder, tmp_path)))
    assert sampled(engine_of(cuda_decoder(tiny_folder), policy_on(CUDA, tiny_folder, tmp_path))) == expected


def test_a_capture_that_fails_says_so_and_garbage_is_collected_again() -> None:
    with pytest.raises(CaptureFailed, match="cannot be captured"):
        CudaCapture(CUDA)(lambda: torch.cuda.synchronize())
    assert gc.isenabled()
