"""A policy knows its model again in another format, and neither another model nor a fine-tune of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from dash_runtime.checkpoints import load_model_config, open_weights, resolve_checkpoint
from dash_runtime.errors import PolicyFileError
from dash_runtime.policy.model_sketch import is_same_model, model_fingerprint
from dash_runtime.policy.policy_file import find_policies, load_policy
from dash_runtime.startup.build import SHIPPED_POLICIES
from tests.runtime.gguf_files import write_gguf
from tests.runtime.support import CPU
from tests.tiny_models import save_tiny_model

Change = Callable[[str, torch.Tensor], torch.Tensor]


def sketch_of(folder: Path) -> str:
    return model_fingerprint(load_model_config(folder), open_weights(folder))


def changed(folder: Path, out: Path, change: Change) -> str:
    """Returns the sketch of the model whose tensors are `change(name, tensor)`."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = {name: change(name, tensor.float()).contiguous() for name, tensor in open_weights(folder).items()}
    save_file(tensors, out / "model.safetensors")
    return sketch_of(out)


def rounded(kind: GGMLQuantizationType) -> Change:
    def change(_: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return tensor
        return torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind)).to(torch.bfloat16)

    return change


def tuned(share: float, part: str = "") -> Change:
    """Adds updates of rank 4 that are as large as this share of each matrix with `part` in its name."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1 or part not in name:
            return tensor
        generator = torch.Generator().manual_seed(len(name))
        update = torch.randn(len(tensor), 4, generator=generator) @ torch.randn(4, tensor.shape[1], generator=generator)
        return (tensor + update * (share * tensor.norm() / update.norm())).to(torch.bfloat16)

    return change


def as_it_is(_: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


Q4_0, Q4_1, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def sketch(tiny_folder: Path) -> str:
    return sketch_of(tiny_folder)


@pytest.mark.parametrize("change", [as_it_is, rounded(Q8_0), rounded(Q4_0), rounded(Q4_1)])
def test_the_same_model_rounded_is_the_same(change: Change, sketch: str, tiny_folder: Path, tmp_path: Path) -> None:
    other = changed(tiny_folder, tmp_path, change)
    assert is_same_model(sketch, other)
    assert is_same_model(other, sketch)


def test_two_roundings_of_one_model_are_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = (changed(tiny_folder, tmp_path / kind.name, rounded(kind)) for kind in (Q4_0, Q4_1))
    assert is_same_model(first, second)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, Q8_0])
def test_a_gguf_file_is_its_original(
    kind: GGMLQuantizationType, sketch: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_folder, kind=kind)
    assert is_same_model(sketch, sketch_of(resolve_checkpoint(str(file), None, tmp_path / "converted")))


def test_a_mixture_of_experts_is_known_again_and_told_from_one_with_other_experts(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "moe", "qwen3-moe", dtype="bfloat16")
    own = sketch_of(folder)
    file = write_gguf(tmp_path / "moe.gguf", folder, architecture="qwen3moe", kind=Q8_0)
    assert is_same_model(own, sketch_of(resolve_checkpoint(str(file), None, tmp_path / "converted")))
    for part in ("experts.3.up_proj", ".gate_proj.", "mlp.gate.weight"):
        assert not is_same_model(own, changed(folder, tmp_path / part, tuned(0.05, part)))
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_experts_per_tok": 3', '"num_experts_per_tok": 2'))
    assert not is_same_model(own, sketch_of(folder))
    assert len(own) < 4_000


@pytest.mark.parametrize(
    "change",
    [
        tuned(0.02),
        tuned(0.03, ".q_proj."),
        tuned(0.05, "layers.3."),
        tuned(0.02, "embed"),
        lambda name, tensor: tensor * 1.01 if tensor.dim() == 1 else tensor,
        lambda name, tensor: tensor * 1.03 if tensor.dim() == 2 else tensor,
        lambda name, tensor: torch.zeros_like(tensor) if "layers.2.mlp.down" in name else tensor,
    ],
)
def test_changed_weights_are_another_model(change: Change, sketch: str, tiny_folder: Path, tmp_path: Path) -> None:
    assert not is_same_model(sketch, changed(tiny_folder, tmp_path, change))


def test_a_change_on_top_of_a_rounding_is_another_model(tiny_folder: Path, tmp_path: Path) -> None:
    coarse = changed(tiny_folder, tmp_path / "coarse", rounded(Q4_1))
    assert not is_same_model(coarse, changed(tmp_path / "coarse", tmp_path / "tuned", tuned(0.01)))
    assert is_same_model(coarse, changed(tmp_path / "coarse", tmp_path / "finer", rounded(Q8_0)))


def test_other_models_are_others(sketch: str, tmp_path: Path) -> None:
    for number, (family, options) in enumerate(
        [
            ("llama", {"initializer_range": 0.14}),
            ("llama", {"num_hidden_layers": 5}),
            ("llama", {"intermediate_size": 192}),
            ("llama-untied-biased", {}),
            ("qwen3", {}),
        ]
    ):
        assert not is_same_model(sketch, sketch_of(save_tiny_model(tmp_path / str(number), family, **options)))


def test_the_text_depends_on_the_weights_alone(sketch: str, tiny_folder: Path) -> None:
    assert sketch == sketch_of(tiny_folder)
    assert sketch.isprintable()
    assert len(sketch) < 4_000


@pytest.mark.parametrize(
    "text", ["", "a model", "[]", "[1,[0],[],[]]", "[1,[6],[[1,0,[1]]],[]]", "[" * 100_000, "[1,[1e999],[],[]]", "null"]
)
def test_a_text_that_is_no_sketch_is_no_other_model(text: str, sketch: str) -> None:
    assert not is_same_model(text, sketch)
    assert not is_same_model(sketch, text)


@pytest.mark.embedded
def test_the_shipped_policies_serve_the_embedded_model_in_8_bits_and_no_change_of_it(
    embedded_folder: Path, tmp_path: Path
) -> None:
    config = load_model_config(embedded_folder)
    finer = changed(embedded_folder, tmp_path, rounded(Q8_0))
    files = find_policies(SHIPPED_POLICIES, finer)
    assert files == find_policies(SHIPPED_POLICIES, sketch_of(embedded_folder)) != []
    load_policy(files[0], config, finer, dtype=torch.bfloat16, device=CPU)
    perturbed = changed(embedded_folder, tmp_path, tuned(0.01))
    assert find_policies(SHIPPED_POLICIES, perturbed) == []
    with pytest.raises(PolicyFileError, match=r"was made for another model than .*\Z"):
        load_policy(files[0], config, perturbed, dtype=torch.bfloat16, device=CPU)
