"""Holds native code that was built elsewhere to torch: a tiny model of random weights, by both.

Knows decoders; knows no files.
"""

from functools import cache

import torch
from torch import Tensor

from dash_runtime.actions import Action
from dash_runtime.checkpoints.parameters import parameter_shapes
from dash_runtime.decoder.backends.native import NativeBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.decoder.loading import make_decoder, make_native_decoder, pack_in_memory
from dash_runtime.layers.batch import PassKind
from dash_runtime.layers.compensation import Identity
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.model_config import BlockConfig, ModelConfig, RopeConfig
from dash_runtime.native.library import NativeLibrary
from dash_runtime.passes import PassPlan

_ACTIONS = (Action.INT3, Action.INT4, Action.INT8, Action.FULL)
_MODEL = ModelConfig(
    name="check",
    architecture="",
    num_layers=1,
    hidden_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=96,
    vocab_size=272,
    rms_norm_eps=1e-5,
    context_length=64,
    block=BlockConfig(),
    ropes=(RopeConfig(1e4),),
    sliding_window=(None,),
    has_tied_head=True,
    eos_token_ids=frozenset((0,)),
)
_PROMPT = tuple(range(3, 200, 11))
_MOST = 0.05
"""The difference of states, as a share of their size: bytes for inputs make a tenth of it, a wrong product all."""


def check_native_code(library: NativeLibrary) -> None:
    """Raises ValueError if native code's products of a prompt, or of a token after it, are not torch's."""
    loader = WeightLoader(_MODEL, _weights(), torch.bfloat16, torch.device("cpu"))
    native = NativeBackend(_MODEL, library, _ACTIONS, 1, shares_heads=False)
    packed, length = pack_in_memory(loader, _ACTIONS), _MODEL.context_length
    own = make_native_decoder(_MODEL, packed, native, _ACTIONS, context_length=length)
    for action in _ACTIONS:
        mine = _states(own, action)
        for kind, expected in _expected()[action].items():
            difference = float((mine[kind] - expected).norm() / expected.norm())
            if not difference <= _MOST:
                raise ValueError(f"its products in {action.name} differ from torch's by {difference:.2g} ({kind.name})")


@cache
def _expected() -> dict[Action, dict[PassKind, Tensor]]:
    length, device = _MODEL.context_length, torch.device("cpu")
    eager = make_decoder(_MODEL, _weights(), _ACTIONS, dtype=torch.bfloat16, device=device, context_length=length)
    return {action: _states(eager, action) for action in _ACTIONS}


@torch.inference_mode()
def _states(decoder: Decoder, action: Action) -> dict[PassKind, Tensor]:
    """Returns the states after the layer, in float32: of a prompt, and of one more token."""
    plan = PassPlan.of([action] * decoder.num_layers)
    (cache,) = decoder.caches([len(_PROMPT) + 1])
    states: dict[PassKind, Tensor] = {}
    for kind, tokens in ((PassKind.PREFILL, _PROMPT), (PassKind.DECODE, _PROMPT[:1])):
        batch = decoder.batch(kind, [cache], [len(tokens)], [Identity()], [action])
        result = decoder.run_pass(plan, tokens, batch)
        batch.commit()
        assert result.states is not None
        states[kind] = result.states.float()
    return states


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(_MODEL).items()
    return {name: torch.randn(shape, generator=generator).bfloat16() / 8 for name, shape in shapes}
