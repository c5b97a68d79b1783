"""The model families that can be read: one file each, and one line below. Imports no torch and no transformers."""

from dash_runtime.families.family import Family
from dash_runtime.families.gemma3 import Gemma3
from dash_runtime.families.granite import Granite
from dash_runtime.families.llama import Llama
from dash_runtime.families.ministral3 import Ministral3
from dash_runtime.families.mistral import Mistral
from dash_runtime.families.olmo2 import Olmo2
from dash_runtime.families.olmo3 import Olmo3
from dash_runtime.families.phi3 import Phi3
from dash_runtime.families.qwen2 import Qwen2
from dash_runtime.families.qwen3 import Qwen3
from dash_runtime.families.qwen3_moe import Qwen3Moe
from dash_runtime.families.smollm3 import SmolLm3

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Granite(),
    SmolLm3(),
    Phi3(),
    Olmo2(),
    Olmo3(),
    Ministral3(),
    Gemma3(),
    Qwen3Moe(),
)
