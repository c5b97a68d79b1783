"""Models on disk: finds a model's Hugging Face folder by name, and reads its configuration, tokenizer and weights.

Every model is opened from a folder in Hugging Face's layout; other formats are converted first. Importing this package
imports no library of models. Opening weights imports torch, reading a configuration transformers, reading a tokenizer
tokenizers, and converting a GGUF file numpy, gguf and tokenizers.
"""

from dash_runtime.checkpoints.cached_config import cached_model_config
from dash_runtime.checkpoints.hf_config import load_model_config
from dash_runtime.checkpoints.hf_folder import tokenizer_file
from dash_runtime.checkpoints.parameters import Parameter, parameter_shapes, parameters
from dash_runtime.checkpoints.resolve import EMBEDDED, described_model, resolve_checkpoint
from dash_runtime.checkpoints.tokenizer_file import load_tokenizer
from dash_runtime.checkpoints.weights import Weights, check_weights, open_weights
from dash_runtime.files.disk_cache import default_cache_folder

__all__ = [
    "EMBEDDED",
    "Parameter",
    "Weights",
    "cached_model_config",
    "check_weights",
    "default_cache_folder",
    "described_model",
    "load_model_config",
    "load_tokenizer",
    "open_weights",
    "parameter_shapes",
    "parameters",
    "resolve_checkpoint",
    "tokenizer_file",
]
