"""States what an engine tells its callers about the model on its decoder. Knows no policies and no requests."""

from collections.abc import Sequence

from dash_runtime.config import EngineConfig, ModelFacts, PolicyFacts
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import describe_devices


def model_facts(
    decoder: Decoder,
    config: EngineConfig,
    policies: Sequence[PolicyFacts],
    context_length: int,
    eos_token_ids: frozenset[int] | None = None,
) -> ModelFacts:
    """Returns the facts. Sequences end at `eos_token_ids`; None means the model's own."""
    model = decoder.config
    return ModelFacts(
        name=model.name,
        architecture=model.architecture,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        context_length=context_length,
        cache_tokens=config.cache_tokens,
        num_slots=config.num_slots,
        eos_token_ids=model.eos_token_ids if eos_token_ids is None else eos_token_ids,
        actions=decoder.actions,
        policies=tuple(policies),
        device=describe_devices(own.device for own in decoder.placed_on),
    )
