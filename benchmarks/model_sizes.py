"""Measures what a model of some size takes: its starts, memory and speed. `python -m benchmarks.model_sizes`.

Sizes that cannot be had here are random weights in the shapes of published models, written as a GGUF file in Q4_0.
Their text means nothing, and only the shapes decide what is measured. Knows the server and its client; no quality.
"""

import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from benchmarks.memory import Bandwidth, weight_bytes
from benchmarks.server_process import RunningServer, running_server
from dash_client.options import GenerationOptions
from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, resolve_checkpoint
from dash_runtime.checkpoints.embedded import embedded_gguf
from dash_runtime.files.disk_cache import default_cache_folder

_NEW_TOKENS, _PROMPT_TOKENS, _RUNS = 48, 256, 3
_BLOCK_BYTES, _BLOCK_WEIGHTS = 18, 32
_SCALE = 0.004


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model of Llama's kind, or with experts of Qwen3-MoE's."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    inner_size: int
    vocab_size: int
    is_tied: bool
    head_size: int | None = None
    """None: `hidden_size` divided by the heads."""
    num_experts: int = 0
    num_chosen: int = 0

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def architecture(self) -> str:
        return "qwen3moe" if self.num_experts else "llama"

    def layer_matrices(self) -> dict[str, tuple[int, ...]]:
        """Returns a layer's matrices by their names in a GGUF file: outputs and inputs, after experts if it has any."""
        query, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = {"attn_q": (query, self.hidden_size), "attn_output": (self.hidden_size, query)}
        attention |= dict.fromkeys(("attn_k", "attn_v"), (keys, self.hidden_size))
        inner, outer = (self.inner_size, self.hidden_size), (self.hidden_size, self.inner_size)
        mlp: dict[str, tuple[int, ...]] = {"ffn_gate": inner, "ffn_up": inner, "ffn_down": outer}
        if self.num_experts:
            mlp = {f"{name}_exps": (self.num_experts, *sizes) for name, sizes in mlp.items()}
        return attention | mlp

    def layer_floats(self) -> dict[str, tuple[int, ...]]:
        """Returns what a layer has in float32: norms, and a router."""
        norms: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_norm", "ffn_norm"), (self.hidden_size,))
        if self.num_experts:
            norms |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (self.head_dim,))
            norms["ffn_gate_inp"] = self.num_experts, self.hidden_size
        return norms


SHAPES = {
    "3b": Shape(3072, 28, 24, 8, 8192, 128256, True),  # Llama-3.2-3B
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, False),  # Llama-3.1-8B
    "30b-a3b": Shape(2048, 48, 32, 4, 768, 151936, False, 128, 128, 8),  # Qwen3-30B-A3B
}


def write_random_gguf(path: Path, shape: Shape) -> None:
    """Writes a model of this shape with the embedded model's tokenizer and random weights, one tensor at a time."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, arch=shape.architecture)
    fields = GGUFReader(str(embedded_gguf())).fields
    missing = shape.vocab_size - len(fields["tokenizer.ggml.tokens"].data)
    for name, field in fields.items():
        if not name.startswith("tokenizer."):
            continue
        value = field.contents()
        if name == "tokenizer.ggml.tokens":
            value = [*value, *(f"<|unused_{number}|>" for number in range(missing))]
        elif name == "tokenizer.ggml.token_type":
            value = [*value, *[3] * missing]
        kinds = field.types
        if kinds[0] is GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, kinds[0])
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.inner_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    if shape.num_experts:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.num_chosen)
        writer.add_expert_feed_forward_length(shape.inner_size)
    matrices: dict[str, tuple[int, ...]] = {"token_embd": (shape.vocab_size, shape.hidden_size)}
    if not shape.is_tied:
        matrices["output"] = shape.vocab_size, shape.hidden_size
    floats: dict[str, tuple[int, ...]] = {"output_norm": (shape.hidden_size,)}
    for layer in range(shape.num_layers):
        matrices |= {f"blk.{layer}.{name}": sizes for name, sizes in shape.layer_matrices().items()}
        floats |= {f"blk.{layer}.{name}": sizes for name, sizes in shape.layer_floats().items()}
    for name, (*rows, columns) in matrices.items():
        row_bytes = columns // _BLOCK_WEIGHTS * _BLOCK_BYTES
        num_bytes = math.prod(rows) * row_bytes
        writer.add_tensor_info(
            f"{name}.weight", (*rows, row_bytes), np.dtype(np.uint8), num_bytes, GGMLQuantizationType.Q4_0
        )
    for name, sizes in floats.items():
        writer.add_tensor_info(f"{name}.weight", sizes, np.dtype(np.float32), 4 * math.prod(sizes))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    scale = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    for sizes in matrices.values():
        blocks = generator.integers(0, 256, (math.prod(sizes) // _BLOCK_WEIGHTS, _BLOCK_BYTES), np.uint8)
        blocks[:, :2] = scale
        writer.write_tensor_data(blocks)
    for sizes in floats.values():
        is_norm = len(sizes) == 1
        writer.write_tensor_data(np.ones(sizes, np.float32) if is_norm else generator.normal(0, 1, sizes).astype("f4"))
    writer.close()


class _Watch:
    """The memory of this process's children, as Linux divides it among those that share it (PSS)."""

    def __init__(self) -> None:
        self.most = self.now = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._is_over.wait(0.2):
            self.look()

    def look(self) -> float:
        total = 0
        for child in psutil.Process().children(recursive=True):
            try:
                text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += 1024 * int(text.partition("\nPss:")[2].split()[0])
        self.now, self.most = total / 1e9, max(self.most, total / 1e9)
        return self.now

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()


@contextmanager
def _watched(**variables: str) -> Iterator[tuple[RunningServer, _Watch]]:
    watch = _Watch()
    try:
        with running_server(**variables) as server:
            yield server, watch
    finally:
        watch.end()


def _tokens_per_second(server: RunningServer, action: Action) -> tuple[float, float]:
    """Returns the speed of new tokens, and that of a prompt."""
    prompt = [100 + place for place in range(_PROMPT_TOKENS)]
    options: GenerationOptions = {"mode": "fixed", "fixed_action": action.name.lower(), "ignore_eos": True}
    answer = server.client.generate(prompt, max_new_tokens=_NEW_TOKENS, timeout=600, **options)
    usage = answer.usage
    return (_NEW_TOKENS - 1) / usage.decode_seconds, _PROMPT_TOKENS / usage.prefill_seconds


def measure(model: str, actions: str, cache_folder: Path) -> None:
    """Prints a row of docs/models.md."""
    variables = {
        "DASH_MODEL": model,
        "DASH_CACHE_FOLDER": str(cache_folder),
        "DASH_MEASURE_FIRST": "false",
        "DASH_CHECK_COSTS": "false",
        **({} if actions == "-" else {"DASH_ACTIONS": actions}),
    }
    with _watched(**variables) as (server, first):
        first_seconds = server.start_seconds
    command = [str(Path(sys.executable).with_name("dash-server")), "--prepare"]
    subprocess.run(command, env={**os.environ, **variables}, check=True, stderr=subprocess.DEVNULL)
    speeds: dict[Action, list[tuple[float, float]]] = {}
    with _watched(**variables) as (server, later):
        later_seconds, at_start = server.start_seconds, later.look()
        offered = [Action[own.name] for own in server.client.model_info().actions if own.name != "SKIP"]
        for _ in range(_RUNS):
            for action in offered:
                speeds.setdefault(action, []).append(_tokens_per_second(server, action))
        served = later.look()
    config = load_model_config(resolve_checkpoint(model, None, cache_folder))
    reader = Bandwidth()
    bandwidth = statistics.median(reader.bytes_per_second() for _ in range(5))
    print(
        f"{config.name}, {actions}: serves after {first_seconds:.0f} s (first) and {later_seconds:.1f} s (later); "
        f"memory at most {first.most:.2f} GB while it converts, {at_start:.2f} GB at the start, {served:.2f} GB after "
        f"{_RUNS * len(offered)} answers; the memory's speed is {bandwidth / 1e9:.1f} GB/s"
    )
    for action, taken in speeds.items():
        new, prompt = (statistics.median(own) for own in zip(*taken, strict=True))
        share = new * weight_bytes(config, bytes([action]) * config.num_layers, action) / bandwidth
        spread = f"{min(own[0] for own in taken):.1f} … {max(own[0] for own in taken):.1f}"
        print(
            f"  {action.name}: {new:.1f} new tokens/s ({spread}), {share:.2f} of the memory's speed; "
            f"prompt of {_PROMPT_TOKENS}: {prompt:.0f} tokens/s"
        )


def main() -> None:
    """Measures one model, or a random one of some shape."""
    parser = ArgumentParser("python -m benchmarks.model_sizes", description=__doc__)
    parser.add_argument("--model", default="embedded", help="a GGUF file, a folder, or embedded")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape instead")
    parser.add_argument("--layers", type=int, help="with --shape: only so many of its layers")
    parser.add_argument("--actions", default="-", help="as DASH_ACTIONS; - for what the server takes")
    parser.add_argument("--folder", type=Path, help="where to keep what is written; default: a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = options.model
        if options.shape is not None:
            shape = SHAPES[options.shape]
            shape = replace(shape, num_layers=options.layers or shape.num_layers)
            model = str(folder / f"random-{options.shape}-{shape.num_layers}.gguf")
            if not Path(model).exists():
                print(f"writing {model}", file=sys.stderr)
                write_random_gguf(Path(model), shape)
        native = default_cache_folder(os.environ) / "native"
        if native.exists():
            shutil.copytree(native, folder / "cache" / "native", dirs_exist_ok=True)
        started = time.monotonic()
        measure(model, options.actions, folder / "cache")
        print(f"measured in {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
