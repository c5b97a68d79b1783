"""Models on disk: from a name to a Hugging Face folder, and from there to a configuration and weights.

Every model, wherever it comes from, is opened from a folder in Hugging Face's layout. Importing this
package imports neither torch nor transformers; opening weights imports torch, reading a configuration
transformers, a tokenizer tokenizers, converting a GGUF file numpy, gguf and tokenizers.
"""

from dash_runtime.checkpoints.cache_folder import default_cache_folder
from dash_runtime.checkpoints.cached_config import cached_model_config
from dash_runtime.checkpoints.conversion_cache import Progress
from dash_runtime.checkpoints.hf_config import load_model_config
from dash_runtime.checkpoints.hf_folder import tokenizer_file
from dash_runtime.checkpoints.parameters import parameter_shapes
from dash_runtime.checkpoints.resolve import EMBEDDED, resolve_checkpoint
from dash_runtime.checkpoints.tokenizer_file import load_tokenizer
from dash_runtime.checkpoints.weights import Weights, check_weights, open_weights

__all__ = [
    "EMBEDDED",
    "Progress",
    "Weights",
    "cached_model_config",
    "check_weights",
    "default_cache_folder",
    "load_model_config",
    "load_tokenizer",
    "open_weights",
    "parameter_shapes",
    "resolve_checkpoint",
    "tokenizer_file",
]
