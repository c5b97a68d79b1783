"""Building an engine from a folder: calibrations are made once, kept, and made again if damaged."""

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.decoder.full_path import full_path
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import ConfigError, CorruptCheckpoint, PolicyFileError
from dash_runtime.layers.weight_loader import WeightLoader
from dash_runtime.linears.grouped_matrix import quantize_grouped
from dash_runtime.linears.rounding_file import rounding_file, save_rounding
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.startup.build import BuildOptions, build_engine, suited
from dash_runtime.startup.default_text import default_token_sequences
from dash_runtime.startup.fit_compensation import fit_compensation
from tests.runtime.random_policy import random_policy, save_random_policy
from tests.runtime.support import drain, load_decoder, tokens
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("short_measurements")


def build(folder: Path, cache_folder: Path, said: list[str] | None = None, **options: object) -> Engine:
    messages: list[str] = [] if said is None else said
    # The tests beside this one keep the machine busy, and so contradict what was measured before.
    own = BuildOptions(checks_kept_costs=False, **options)  # type: ignore[arg-type]
    return build_engine(folder, cache_folder, own, EngineConfig(), messages.append)


@dataclass(frozen=True)
class Started:
    """A first start: its engine, its cache folder with all calibrations, and what it said."""

    engine: Engine
    cache_folder: Path
    said: list[str]


@pytest.fixture(scope="module")
def started(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    folder, said = tmp_path_factory.mktemp("cache"), list[str]()
    return Started(build(tiny_folder, folder, said), folder, said)


def test_calibrations_are_made_once_and_read_by_later_starts(tiny_folder: Path, started: Started) -> None:
    assert any("fitting" in message for message in started.said)
    assert any("measuring" in message for message in started.said)
    said: list[str] = []
    second = build(tiny_folder, started.cache_folder, said)
    assert not any("kept for later" in message for message in said)
    assert started.engine.facts == second.facts
    assert not [path for path in (started.cache_folder / "calibration").iterdir() if path.name.startswith(".")]


def test_damaged_calibrations_are_made_again(tiny_folder: Path, started: Started, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(started.cache_folder, tmp_path / "cache"))
    damages = [b"", b"{", b'{"layer": {"FULL": "x"}}', b"[]", b'{"plans": [{}]}']
    files = sorted((cache / "calibration").iterdir())
    for others in range(2):
        for number, path in enumerate(files, 2 * others):
            path.write_bytes(damages[number % len(damages)])
        said: list[str] = []
        build(tiny_folder, cache, said)
        assert sum("kept for later" in message for message in said) == len(files)


def test_a_cache_folder_that_cannot_be_written_does_not_stop_a_start(tiny_folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    assert not build(tiny_folder, blocked / "cache").has_work


def test_a_start_computes_with_int4_weights_that_were_kept_and_searches_plans_anew(
    tiny_folder: Path, started: Started, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(started.cache_folder, tmp_path / "cache"))
    config, weights = load_model_config(tiny_folder), open_weights(tiny_folder)
    fingerprint = model_fingerprint(config, weights)
    output = WeightLoader(config, weights, torch.bfloat16, torch.device("cpu")).layer(2).linears.output
    place = 2, 3  # in the order of `Linears.mapped`
    save_rounding(
        rounding_file(cache, fingerprint), {Action.INT4: {place: quantize_grouped(-output.weight, 4)}}, fingerprint
    )
    policy = save_random_policy(tmp_path / "policy.safetensors", tiny_folder)
    said: list[str] = []
    engine = build(tiny_folder, cache, said)
    assert any("dash-policy quantize" in message for message in said)
    assert [message for message in said if "kept for later" in message] == [
        message for message in started.said if "searching" in message
    ]
    for action in (Action.FULL, Action.INT4):
        pair = [fixed_tokens(own, action) for own in (engine, started.engine)]
        assert (pair[0] == pair[1]) is (action is Action.FULL)
    build(tiny_folder, cache, said, policy_file=policy)
    assert any("other rounded weights" in message for message in said)


def fixed_tokens(engine: Engine, action: Action) -> list[int]:
    stopping = StoppingParameters(24, ignore_eos=True)
    engine.submit(GenerationRequest("one", [1, 2, 3], stopping, skip=SkipOptions(Mode.FIXED, fixed_action=action)))
    return tokens(drain(engine)["one"])


def test_warming_up_leaves_nothing_for_requests_to_reuse(started: Started) -> None:
    assert started.engine.num_kept_prompt_tokens == 0


def test_facts_name_what_is_served(started: Started) -> None:
    facts = started.engine.facts
    assert facts.name == "tiny-llama"
    assert facts.num_layers == 6
    assert facts.actions == (Action.SKIP, Action.INT4, Action.INT8, Action.FULL)
    # Only measuring tells which kernel is the cheapest here, and if any is cheaper than FULL.
    assert [policy.name for policy in facts.policies if not policy.is_drafter] == ["frontier"]
    assert facts.policies[0].compensation == "affine"
    costs = facts.policies[0].action_costs
    assert costs[Action.FULL] == 1
    assert all(cost > 0 for cost in costs.values())


def test_a_model_that_native_code_cannot_decode_says_so_in_a_line_and_runs_every_action_eagerly(tmp_path: Path) -> None:
    said: list[str] = []
    engine = build(save_tiny_model(tmp_path / "model", "llama-untied-biased", vocab_size=272), tmp_path, said)
    assert "layers run eagerly: native code has no biases of outputs" in said
    assert engine.facts.actions == (Action.SKIP, Action.INT4, Action.INT8, Action.FULL)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"devices": ["warp"]}, ConfigError, "device"),
        ({"devices": ["cuda:99"]}, ConfigError, "device"),
        ({"precision": "float8"}, ConfigError, "precision"),
        ({"policy_file": Path("/nowhere/p.safetensors")}, PolicyFileError, "/nowhere/p.safetensors"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(
    tiny_folder: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build(tiny_folder, tmp_path, **options)


def test_a_model_whose_tensors_have_other_shapes_is_refused_by_file(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 160', '"intermediate_size": 192'))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        build(folder, tmp_path)


def test_a_fitted_compensation_is_nearer_to_the_layer_than_passing_the_input_on(tiny_folder: Path) -> None:
    decoder = load_decoder(tiny_folder, actions=(Action.SKIP, Action.FULL))
    sequences = default_token_sequences(tiny_folder / "tokenizer.json", 4, 64)
    fitted = fit_compensation(decoder, sequences)
    (held_out,) = default_token_sequences(tiny_folder / "tokenizer.json", 5, 64)[4:]
    states = pairwise(full_path(decoder, [held_out]))
    errors = torch.zeros(3)
    for layer, (inputs, outputs) in enumerate(states):
        for rung, guess in enumerate((inputs, fitted.scale(layer, inputs), fitted.affine(layer, inputs))):
            errors[rung] += ((guess - outputs)[1:].norm(dim=-1) / inputs[1:].norm(dim=-1)).mean()
    assert errors[2] < errors[1] < errors[0]


def test_default_text_needs_no_file_but_the_tokenizer(tiny_folder: Path) -> None:
    sequences = default_token_sequences(tiny_folder / "tokenizer.json", 3, 50)
    assert [len(sequence) for sequence in sequences] == [50, 50, 50]
    assert sequences == default_token_sequences(tiny_folder / "tokenizer.json", 3, 50)


def test_a_policy_that_decides_further_ahead_comes_first_where_evaluations_run_beside_layers(tiny_folder: Path) -> None:
    near, far = (random_policy(tiny_folder, lookahead=lookahead) for lookahead in (1, 4))
    assert suited([near, far], has_streams=True) == [far, near]
    assert suited([near, far], has_streams=False) == [near]
