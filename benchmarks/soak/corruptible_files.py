"""The valid files to damage, kind by kind, and their loaders: those of the server and its worker.

A loader describes its result part by part. So a damage that changed nothing can be told from one that was accepted,
and the changed part can be named. Knows no classification.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.soak import loaders
from benchmarks.soak.container_corruptions import SAFETENSORS, gguf_corruptions, wrong_facts
from benchmarks.soak.corruptions import ANY_FILE, ANY_JSON, HUGE_NUMBERS, Corruption
from benchmarks.soak.loaders import FINGERPRINT, Loaded
from dash_runtime.actions import Action
from dash_runtime.policy.compensation_file import save_compensation
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.plan_spec import PlanSpec
from dash_runtime.policy.policy_file import save_policy
from tests.runtime.gguf_files import write_gguf
from tests.runtime.support import load_decoder, some_affine, some_calibration, some_costs, some_network, some_plans
from tests.tiny_models import HIDDEN_SIZE, save_tiny_model

NUM_LAYERS = 4

_AUTHORS = "one value is as good as another; only the model's author knows it"
_NO_CHECKSUM = "the files of others have no checksum, and any finite number may be a weight"
_OPTIONAL = "an optional file, or an optional value in it: without it the default holds"
_OLD_POLICY = "a policy file from before there were checksums"


@dataclass(frozen=True)
class FileKind:
    """A kind of file: a case gets a copy of the folder `original` and damages one of `files` in it.

    `unknowable` names the loaded parts that may differ after an accepted damage, and says why the file cannot show it.
    A name that ends in `*` stands for all names that begin like it.
    """

    name: str
    original: str
    files: Sequence[str]
    load: Callable[[Path], Loaded]
    unknowable: Mapping[str, str]
    share: int = 1
    more: Sequence[Corruption] = ()
    """Damages of this kind alone, beside those that any file of such a name gets."""

    def corruptions(self, file: str) -> Sequence[Corruption]:
        """Returns the damages for `file`."""
        if file.endswith(".gguf"):
            return gguf_corruptions(_wrong_gguf_metadata)
        usual = {".json": ANY_JSON, ".safetensors": SAFETENSORS}.get(Path(file).suffix, ANY_FILE)
        return (*usual, *self.more)


def make_originals(folder: Path) -> None:
    """Writes the valid files below `folder`, one folder per kind."""
    model = save_tiny_model(folder / "model", "llama", num_hidden_layers=NUM_LAYERS, dtype="bfloat16")
    (model / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|user|>"}}))
    _make_sharded(model, folder / "sharded")
    in_config = Path(shutil.copytree(model, folder / "template-in-config"))
    template = (in_config / "chat_template.jinja").read_text()
    (in_config / "chat_template.jinja").unlink()
    tokenizer_config = json.loads((in_config / "tokenizer_config.json").read_text())
    tokenizer_config["chat_template"] = [{"name": "default", "template": template}]
    (in_config / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for name in ("gguf", "cache", "policy", "plain-policy", "compensation"):
        (folder / name).mkdir()
    shutil.copytree(model, folder / "gguf" / "model")
    write_gguf(folder / "gguf" / "tiny.gguf", model, tensors={"rope_freqs.weight": np.ones(HIDDEN_SIZE // 8)})
    shutil.copy(folder / "gguf" / "tiny.gguf", folder / "cache")
    loaders.load_conversion(folder / "cache")
    _make_policies(folder, model)


def _make_sharded(model: Path, folder: Path) -> None:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}, indent=1))


def _make_policies(folder: Path, model: Path) -> None:
    compensation = some_affine(load_decoder(model))
    spec = PlanSpec(
        actions=(Action.SKIP, Action.INT4, Action.FULL),
        pinned=dict.fromkeys((0, NUM_LAYERS - 1), Action.FULL),
        lookahead=1,
        block_size=2,
        head=Action.INT8,
        costs=some_costs(NUM_LAYERS),
    )
    policy = LearnedPolicy(
        name="tiny",
        network=some_network(spec, HIDDEN_SIZE, seed=5),
        spec=spec,
        compensation=compensation,
        calibration=some_calibration(spec, (0.5, 1.0, 0.4), (0.6, 0.0, 0.1), (0.7, -1.0, 0.02)),
        plans=some_plans(NUM_LAYERS),
    )
    file = folder / "policy" / "tiny.safetensors"
    save_policy(file, policy, FINGERPRINT)
    save_compensation(folder / "compensation" / "tiny.safetensors", compensation, FINGERPRINT)
    with safe_open(file, framework="pt") as opened:
        metadata = {"dash_policy": opened.metadata()["dash_policy"]}
    save_file(load_file(file), folder / "plain-policy" / "tiny.safetensors", metadata=metadata)


_GGUF_KEYS = (
    *("general.architecture", "general.alignment", "llama.block_count", "llama.context_length"),
    *("llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count", "llama.expert_count"),
    *("llama.attention.head_count_kv", "llama.attention.key_length", "llama.attention.value_length", "split.count"),
    *("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "llama.rope.scaling.type"),
    *("llama.rope.dimension_count", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"),
    *("tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id"),
    *("tokenizer.ggml.bos_token_id", "tokenizer.chat_template", "tokenizer.ggml.add_bos_token"),
)
_GGUF_VALUES = (
    *(0, 1, 3, 7, *(number for number in HUGE_NUMBERS if number < 2**32), True, False, "", "text", "x" * 5_000),
    *(0.0, -1.0, 1e30, float("nan"), float("inf"), [1, 2], ["a", "a"], [0.5], "{% if", "{{ 1 +", "two\nlines"),
)


def _wrong_gguf_metadata(path: Path, rng: random.Random) -> str:
    """Writes the file anew with one value wrong or left out."""
    key, value = rng.choice(_GGUF_KEYS), rng.choice(_GGUF_VALUES)
    model = path.parent / "model"
    if rng.random() < 0.2:
        write_gguf(path, model, without=key)
        return f"without {key}"
    if key == "general.alignment" and type(value) is int:
        value = 3  # the writer itself uses it for alignment
    if key == "general.architecture" and not isinstance(value, str):
        value = "l" * 5_000
    write_gguf(path, model, metadata={key: value})
    return f"{key} is {ascii(value)[:40]}"


_CONFIG_UNKNOWABLE = {
    "config.rms_norm_eps": _AUTHORS,
    "config.rope": _AUTHORS,
    "config.context_length": _AUTHORS,
    "config.eos_token_ids": _AUTHORS,
}
_TOKENIZER_UNKNOWABLE = {"tokenizer": _AUTHORS, "token ids": _AUTHORS, "special token ids": _AUTHORS}
_TEMPLATE_UNKNOWABLE = {"chat template": _AUTHORS, "conversation": _AUTHORS}
_SPECIAL_TOKENS = {"special tokens": _OPTIONAL}
_CACHED_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "dash_manifest.json"),
)

KINDS: Sequence[FileKind] = (
    FileKind("policy", "policy", ["tiny.safetensors"], loaders.load_policies, {}, 2, (wrong_facts,) * 16),
    FileKind(
        "policy without checksum",
        "plain-policy",
        ["tiny.safetensors"],
        loaders.load_policies,
        {"*": _OLD_POLICY},
        2,
        (wrong_facts,) * 24,
    ),
    FileKind("compensation", "compensation", ["tiny.safetensors"], loaders.load_fit, {}),
    FileKind(
        "GGUF",
        "gguf",
        ["tiny.gguf"],
        loaders.load_gguf,
        {"weights": _NO_CHECKSUM} | _CONFIG_UNKNOWABLE | _TOKENIZER_UNKNOWABLE | _TEMPLATE_UNKNOWABLE | _SPECIAL_TOKENS,
        3,
    ),
    FileKind("config.json", "model", ["config.json"], loaders.load_folder, _CONFIG_UNKNOWABLE, 3),
    FileKind(
        "generation_config.json",
        "model",
        ["generation_config.json"],
        loaders.load_folder,
        {"config.eos_token_ids": _OPTIONAL},
    ),
    FileKind("tokenizer.json", "model", ["tokenizer.json"], loaders.load_folder, _TOKENIZER_UNKNOWABLE),
    FileKind(
        "tokenizer_config.json",
        "template-in-config",
        ["tokenizer_config.json", "special_tokens_map.json"],
        loaders.load_folder,
        _TEMPLATE_UNKNOWABLE | _SPECIAL_TOKENS,
    ),
    FileKind("chat_template.jinja", "model", ["chat_template.jinja"], loaders.load_folder, _TEMPLATE_UNKNOWABLE),
    FileKind("model.safetensors", "model", ["model.safetensors"], loaders.load_folder, {"weights": _NO_CHECKSUM}, 2),
    FileKind(
        "sharded weights",
        "sharded",
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        loaders.load_folder,
        {"weights": _NO_CHECKSUM},
    ),
    FileKind(
        "cached conversion",
        "cache",
        [f"kept/{loaders.CONVERSION}/{file}" for file in _CACHED_FILES],
        loaders.load_conversion,
        {},
    ),
    FileKind(
        "cached conversion, by path",
        "cache",
        [f"kept/{loaders.CONVERSION}/{file}" for file in _CACHED_FILES],
        loaders.load_converted_folder,
        {},
    ),
)
