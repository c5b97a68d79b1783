"""Randomly initialised models of each supported family, small enough for tests, in Hugging Face layout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NUM_LAYERS = 6
HIDDEN_SIZE = 96
VOCAB_SIZE = 260
EOS_TOKEN_ID = 256

CHAT_TEMPLATE = (
    "{% for tool in tools or () %}{{ tool.function.name }} <tool_call>\n{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or () %}{{ call.function | tojson }}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}

_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
_LONGROPE = _PARTIAL_ROPE | {
    "rope_type": "longrope",
    "short_factor": [round(1 + 0.1 * pair, 1) for pair in range(9)],
    "long_factor": [1.5 + pair for pair in range(9)],
}
"""A scaling for heads of 24 channels, of which 18 are rotated."""

_GROWING_ROPE = _YARN | {
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.3,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_GEMMA3 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7, "initializer_range": 0.05}

_QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}

_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-untied-biased": (
        "Llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama3-rope": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-sliding-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "granite": ("Granite", {**_GRANITE, "tie_word_embeddings": True}),
    "granite-untied-biased": ("Granite", {**_GRANITE, "attention_bias": True}),
    "phi3": ("Phi3", {"rope_parameters": _PARTIAL_ROPE, "tie_word_embeddings": True}),
    "phi3-longrope": ("Phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 32}),
    "phi3-longrope-sliding-window": (
        "Phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 7},
    ),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "olmo2-tied-biased": ("Olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3", {"sliding_window": 7}),
    "olmo3-yarn": (
        "Olmo3",
        {
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": _YARN | {"attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "ministral3": ("Ministral3", {"head_dim": 32, "rope_parameters": _GROWING_ROPE}),
    "ministral3-sliding-window": (
        "Ministral3",
        {"head_dim": 24, "rope_parameters": _GROWING_ROPE, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "gemma3": ("Gemma3Text", _GEMMA3),
    "gemma3-linear-rope-untied": (
        "Gemma3Text",
        _GEMMA3
        | {
            "tie_word_embeddings": False,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "qwen3-moe": ("Qwen3Moe", _QWEN3_MOE | {"mlp_only_layers": [1]}),
    "qwen3-moe-tied-unnormed": (
        "Qwen3Moe",
        _QWEN3_MOE | {"norm_topk_prob": False, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "smollm3-yarn": ("SmolLM3", {"rope_parameters": _YARN | {"beta_fast": 16.0, "attention_factor": 1.1}}),
    "smollm3-yarn-sliding-window": (
        "SmolLM3",
        {"rope_parameters": _YARN, "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": False},
    ),
}


def save_tiny_model(folder: Path, family: str, **overrides: Any) -> Path:
    """Saves a model of this family in `folder`, with `overrides` in its configuration."""
    import torch
    import transformers

    prefix, options = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 160,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": EOS_TOKEN_ID,
            "pad_token_id": None,
            **options,
            **overrides,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():  # norms and biases start at ones and zeros, which would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def save_byte_tokenizer(folder: Path) -> None:
    """Saves a byte tokenizer with a few special tokens after the bytes, and a chat template."""
    byte_tokenizer("<|end|>", "<|user|>", "<|assistant|>", "<|system|>").save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def byte_tokenizer(*special_tokens: str) -> "Tokenizer":
    """Returns a tokenizer with one token per byte, whose id is the byte. Special tokens follow from 256 on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The byte-level alphabet in the order of its bytes (GPT-2's table).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={names[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special_tokens])
    return tokenizer
