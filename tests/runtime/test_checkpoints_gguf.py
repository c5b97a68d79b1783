"""A GGUF file becomes the Hugging Face folder it was made from, or is refused in one sentence."""

import resource
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from dash_runtime.checkpoints import check_weights, load_model_config, open_weights, resolve_checkpoint
from dash_runtime.checkpoints.gguf_conversion import convert_gguf
from dash_runtime.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedArchitecture
from dash_runtime.model_config import RopeConfig, RopeKind
from tests.runtime.gguf_files import write_gguf
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, save_tiny_model

SMALL = {"num_hidden_layers": 2, "dtype": "bfloat16"}
FAMILIES = [
    ("llama", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("mistral", "llama"),
    ("granite", "granite"),
    ("granite-untied-biased", "granite"),
    ("smollm3", "smollm3"),
    ("smollm3-yarn", "smollm3"),
    ("phi3", "phi3"),
    ("olmo2", "olmo2"),
    ("olmo3", "olmo2"),
    ("ministral3", "mistral3"),
    ("gemma3", "gemma3"),
    ("gemma3-linear-rope-untied", "gemma3"),
    ("olmo3-yarn", "olmo2"),
    ("phi3-longrope", "phi3"),
    ("phi3-longrope-sliding-window", "phi3"),
    ("qwen3-moe", "qwen3moe"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", **SMALL)


@pytest.fixture(scope="module")
def llama_gguf(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", llama)


def converted(gguf: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(gguf, folder)
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 200, 3, 3, 77]])).logits


@pytest.mark.parametrize(("family", "architecture"), FAMILIES)
@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.BF16])
def test_a_model_survives_the_way_to_gguf_and_back(
    tmp_path: Path, family: str, architecture: str, kind: GGMLQuantizationType
) -> None:
    original = save_tiny_model(tmp_path / "original", family, dtype="bfloat16")
    with torch.no_grad():  # only values that bfloat16 can hold can be compared exactly
        model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).to(torch.bfloat16)
        model.save_pretrained(original)
    gguf = write_gguf(tmp_path / "model.gguf", original, architecture=architecture, kind=kind)

    folder = converted(gguf, tmp_path / "converted")

    before, after = load_model_config(original, "same"), load_model_config(folder, "same")
    assert before.architecture == after.architecture or (family, architecture) == ("mistral", "llama")
    assert after.eos_token_ids == before.eos_token_ids
    assert (after.block, after.sliding_window) == (before.block, before.sliding_window)
    assert after.mixture == before.mixture
    assert rounded(after.ropes) == rounded(before.ropes)
    weights = open_weights(folder)
    check_weights(weights, after)
    for name, tensor in open_weights(original).items():
        assert torch.equal(weights[name], tensor.to(torch.bfloat16)), name
    torch.testing.assert_close(logits_of(folder), logits_of(original), atol=1e-5, rtol=0)


def rounded(ropes: tuple[RopeConfig | None, ...]) -> list[RopeConfig | None]:
    """Returns them with attention factors that survive float32."""
    factors = [None if rope is None else round(rope.attention_factor, 5) for rope in ropes]
    return [rope and replace(rope, attention_factor=factor) for rope, factor in zip(ropes, factors, strict=True)]


def test_quantised_tensors_are_dequantised(llama: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "q8.gguf", llama, kind=GGMLQuantizationType.Q8_0)

    weights = open_weights(converted(gguf, tmp_path / "converted"))

    for name, tensor in open_weights(llama).items():
        assert weights[name].dtype == torch.bfloat16
        torch.testing.assert_close(weights[name].float(), tensor.float(), atol=0.01, rtol=0.02)


def test_an_output_tensor_makes_the_head_untied(llama: Path, tmp_path: Path) -> None:
    head = np.random.default_rng(0).normal(size=(VOCAB_SIZE, HIDDEN_SIZE))
    gguf = write_gguf(tmp_path / "untied.gguf", llama, tensors={"output.weight": head})

    folder = converted(gguf, tmp_path / "converted")

    assert not load_model_config(folder).has_tied_head
    expected = torch.from_numpy(head).float().to(torch.bfloat16)
    assert torch.equal(open_weights(folder)["lm_head.weight"], expected)


def test_llama3_rotary_factors_become_llama3_parameters(llama: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    factors = llama3_factors_of_transformers(rope, head_dim=HIDDEN_SIZE // 4)
    metadata = {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}
    gguf = write_gguf(tmp_path / "l3.gguf", llama, metadata=metadata, tensors={"rope_freqs.weight": factors})

    config = load_model_config(converted(gguf, tmp_path / "converted"))

    assert set(config.ropes) == {RopeConfig(500000.0, RopeKind.LLAMA3, 32.0, 1.0, 4.0, 8192)}


def llama3_factors_of_transformers(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Returns the factors by which transformers slows rotary frequencies down."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    return (plain / frequencies).numpy()


def test_linear_scaling_is_kept(llama: Path, tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    gguf = write_gguf(tmp_path / "linear.gguf", llama, metadata=metadata)

    config = load_model_config(converted(gguf, tmp_path / "converted"))

    assert set(config.ropes) == {RopeConfig(10000.0, RopeKind.LINEAR, 4.0)}


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "gemma4"}, "'gemma4' is not supported; supported: llama, qwen2, qwen3, granite, s"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.rope.scaling.type": "other"}, "'other' is not supported; supported: none, linear, yarn, longrope"),
        ({"llama.rope.dimension_count": 8}, "partial rotary"),
        ({"llama.attention.value_length": 8}, "keys and values of different sizes"),
        ({"llama.attention.sliding_window": 64}, "sliding window"),
        ({"tokenizer.ggml.model": "t5"}, "'t5' tokenizer"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    llama: Path, tmp_path: Path, metadata: dict[str, Any], named: str
) -> None:
    gguf = write_gguf(tmp_path / "other.gguf", llama, metadata=metadata)
    with pytest.raises(UnsupportedArchitecture, match=named) as caught:
        converted(gguf, tmp_path / "converted")
    assert str(gguf) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"rope_freqs.weight": np.linspace(1, 3, 8)}, "rotary factors"),
        ({"blk.0.attn_sinks.weight": np.ones(4)}, "attn_sinks"),
    ],
)
def test_tensors_that_would_be_ignored_are_refused(
    llama: Path, tmp_path: Path, tensors: dict[str, np.ndarray], named: str
) -> None:
    gguf = write_gguf(tmp_path / "other.gguf", llama, tensors=tensors)
    with pytest.raises(UnsupportedArchitecture, match=named):
        converted(gguf, tmp_path / "converted")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"without": "blk.1.ffn_up.weight"}, "no tensor blk.1.ffn_up.weight"),
        ({"without": "token_embd.weight"}, "no tensor token_embd.weight"),
        ({"without": "llama.block_count"}, "lacks 'llama.block_count'"),
        ({"metadata": {"llama.block_count": 2**31}}, "2147483648 layers"),
        ({"metadata": {"llama.block_count": "two"}}, "'llama.block_count' is no int"),
        ({"metadata": {"llama.feed_forward_length": 128}}, "shape"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "3 key-value heads"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 260}}, "outside its vocabulary"),
        ({"metadata": {"tokenizer.ggml.tokens": ["a", "b"]}}, "2 different tokens, not 260"),
        ({"metadata": {"tokenizer.ggml.merges": ["no thing"]}}, "merges do not fit"),
    ],
)
def test_a_file_that_contradicts_itself_is_corrupt(
    llama: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    gguf = write_gguf(tmp_path / "odd.gguf", llama, **change)
    with pytest.raises(CorruptCheckpoint, match=named) as caught:
        converted(gguf, tmp_path / "converted")
    assert str(gguf) in str(caught.value)


def test_metadata_that_a_family_needs_are_named_if_they_are_missing(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "granite", "granite", **SMALL)
    gguf = write_gguf(tmp_path / "odd.gguf", folder, architecture="granite", without="granite.residual_scale")
    with pytest.raises(CorruptCheckpoint, match=r"odd\.gguf is incomplete: its metadata lacks 'granite\.residual"):
        converted(gguf, tmp_path / "converted")


def test_a_gguf_path_is_converted_once_and_again_when_it_changes(llama: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "Tiny[1].Q8_0.gguf", llama)
    messages: list[str] = []
    first = resolve_checkpoint(str(gguf), None, tmp_path / "cache", messages.append)
    assert resolve_checkpoint(str(gguf), None, tmp_path / "cache", messages.append) == first
    assert messages == []
    assert load_model_config(first).name == "Tiny[1].Q8_0"

    write_gguf(gguf, llama, metadata={"llama.context_length": 256})
    second = resolve_checkpoint(str(gguf), None, tmp_path / "cache", messages.append)
    assert load_model_config(second).context_length == 256


@pytest.mark.parametrize("room", [0, 1_000, 5_000])
def test_a_conversion_without_room_is_told_in_one_sentence_and_leaves_nothing(
    llama: Path, tmp_path: Path, room: int
) -> None:
    gguf, cache = write_gguf(tmp_path / "tiny.gguf", llama), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"tiny cannot be converted into .*: File too large\."):
            resolve_checkpoint(str(gguf), None, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    resolve_checkpoint(str(gguf), None, cache)


def test_a_missing_gguf_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no/such\.gguf"):
        resolve_checkpoint("no/such.gguf", None, tmp_path)


@pytest.fixture(scope="module")
def shards(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    first = write_gguf(tmp_path_factory.mktemp("split") / "llama.gguf", llama, most_tensors=6)
    found = sorted(first.parent.iterdir())
    assert len(found) > 2
    return found


def test_a_split_model_is_converted_like_a_whole_one_whichever_part_is_named(
    llama_gguf: Path, shards: list[Path], tmp_path: Path
) -> None:
    whole, folders = converted(llama_gguf, tmp_path / "whole"), set()
    for part in (shards[0], shards[-1]):
        folder = resolve_checkpoint(str(part), None, tmp_path / "cache")
        folders.add(folder)
        assert folder.name.startswith("llama-")
        assert "-of-" not in folder.name
    (folder,) = folders
    for file in ("tokenizer.json", "config.json"):
        assert (folder / file).read_bytes() == (whole / file).read_bytes()
    weights = open_weights(folder)
    for name, tensor in open_weights(whole).items():
        assert torch.equal(weights[name], tensor), name


def test_a_split_model_with_a_missing_or_a_wrong_part_is_refused_by_its_name(
    shards: list[Path], tmp_path: Path
) -> None:
    copies = [tmp_path / own.name for own in shards]
    for own, copy in zip(shards, copies, strict=True):
        copy.write_bytes(own.read_bytes())
    copies[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(CorruptCheckpoint, match=rf"{copies[1].name} .*part 2 of {len(shards)}, .* part 1 of"):
        converted(copies[0], tmp_path / "wrong")
    copies[1].unlink()
    with pytest.raises(CheckpointNotFound, match=rf"no file .*{copies[1].name}.* in {len(shards)} files"):
        resolve_checkpoint(str(copies[2]), None, tmp_path / "cache")
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(shards[0].read_bytes())
    with pytest.raises(CorruptCheckpoint, match=f"part 0 of {len(shards)}"):
        converted(alone, tmp_path / "part")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(
        tmp_path_factory.mktemp("models") / "moe", "qwen3-moe", num_experts=64, num_hidden_layers=2, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"without": "qwen3moe.expert_count"}, "lacks 'qwen3moe.expert_count'"),
        ({"without": "qwen3moe.expert_used_count"}, "lacks 'qwen3moe.expert_used_count'"),
        ({"without": "qwen3moe.expert_feed_forward_length"}, "lacks 'qwen3moe.expert_feed_forward_length'"),
        ({"metadata": {"qwen3moe.expert_used_count": 65}}, "num_experts_per_tok must be at most 64, got 65"),
        ({"metadata": {"qwen3moe.expert_count": 63}}, r"ffn_gate_inp.weight has the shape \[64, 96\]"),
        ({"without": "blk.0.ffn_up_exps.weight"}, "no tensor blk.0.ffn_up_exps.weight"),
        ({"without": "blk.0.ffn_gate_inp.weight"}, "no tensor blk.0.ffn_gate_inp.weight"),
    ],
)
def test_experts_that_contradict_the_metadata_are_corrupt(
    mixture: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    gguf = write_gguf(tmp_path / "odd.gguf", mixture, architecture="qwen3moe", **change)
    with pytest.raises(CorruptCheckpoint, match=named):
        convert_gguf(gguf, tmp_path)


def test_stacked_experts_are_converted_one_at_a_time_and_keep_their_numbers(mixture: Path, tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    gguf = write_gguf(tmp_path / "moe.gguf", mixture, architecture="qwen3moe", kind=kind)
    convert_gguf(gguf, tmp_path)  # imports what a first conversion imports
    tracemalloc.start()
    convert_gguf(gguf, tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    config, weights = load_model_config(tmp_path), open_weights(tmp_path)
    assert config.mixture is not None
    assert peak_bytes < 4 * config.mixture.num_experts * config.mixture.expert_size * config.hidden_size
    for name, tensor in open_weights(mixture).items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), atol=0.01, rtol=0.02)
