"""A policy with a narrow head is trained, calibrated, and served."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, open_weights
from dash_runtime.commands.cli import main
from dash_runtime.config import EngineConfig, GenerationRequest, Mode, SkipOptions, StoppingParameters
from dash_runtime.engine.engine import Engine
from dash_runtime.errors import PolicyFileError
from dash_runtime.layers.narrow_head import HeadMap
from dash_runtime.policy.learned import LearnedPolicy
from dash_runtime.policy.model_sketch import model_fingerprint
from dash_runtime.policy.policy_file import load_policy, save_policy
from dash_runtime.startup.build import BuildOptions, build_engine
from tests.runtime.support import drain, policy_arguments, tokens
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.usefixtures("short_measurements")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that native code decodes, head included. Training may skip two of its layers."""
    sizes = {"num_hidden_layers": 4, "vocab_size": 272, "num_attention_heads": 3, "num_key_value_heads": 1}
    return save_tiny_model(tmp_path_factory.mktemp("models") / "packable", "llama", **sizes)


@pytest.fixture(scope="module")
def common(folder: Path, text: Path) -> list[str]:
    return policy_arguments(folder, text)


@pytest.fixture(scope="module")
def trained(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "narrow"
    small = ["--rounds", "1", "--batches", "1", "--rank", "4", "--actions", "skip,int4,full", "--head", "SKIP"]
    assert main(["train", *common, "--out", str(out), *small]) == 0
    return out / "policy.safetensors"


def test_training_writes_the_map(trained: Path) -> None:
    with safe_open(trained, "pt") as file:
        assert {"head.narrow", "head.widen", "head.offsets"} <= set(file.keys())
        facts = json.loads(file.metadata()["dash_policy"])
    assert facts["head"] == "SKIP"


def load(path: Path, folder: Path) -> LearnedPolicy:
    config = load_model_config(folder)
    fingerprint = model_fingerprint(config, open_weights(folder))
    return load_policy(path, config, fingerprint, dtype=torch.bfloat16, device=torch.device("cpu"))


def test_the_map_is_kept_in_half_precision(trained: Path, folder: Path, tmp_path: Path) -> None:
    policy = load(trained, folder)
    assert policy.head is Action.SKIP
    assert policy.head_map is not None
    save_policy(
        tmp_path / "again.safetensors", policy, model_fingerprint(load_model_config(folder), open_weights(folder))
    )
    again = load(tmp_path / "again.safetensors", folder).head_map
    assert again is not None
    assert all(torch.equal(getattr(again, name), getattr(policy.head_map, name)) for name in HeadMap.__slots__)
    assert policy.for_heads((Action.INT4, Action.FULL)).head is Action.INT4


HALF = torch.float16


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"narrow": None, "widen": None, "offsets": None}, "has a narrow head without its map"),
        ({"widen": None}, "head.widen"),
        ({"narrow": torch.zeros(7, 96, dtype=HALF)}, "head.narrow must have a multiple of 32 rows"),
        ({"narrow": torch.zeros(0, 96, dtype=HALF)}, "head.narrow must have a multiple of 32 rows"),
        ({"narrow": torch.zeros(32, 95, dtype=HALF)}, "head.narrow"),
        ({"widen": torch.zeros(96, 64, dtype=HALF)}, "head.widen"),
        ({"offsets": torch.full((272,), float("inf"), dtype=HALF)}, "head.offsets"),
        ({"offsets": torch.zeros(272)}, "head.offsets"),
    ],
)
def test_a_damaged_map_is_refused_by_name(
    changed: dict[str, torch.Tensor | None], fault: str, trained: Path, folder: Path, tmp_path: Path
) -> None:
    with safe_open(trained, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {"dash_policy": file.metadata()["dash_policy"]}
    tensors |= {f"head.{name}": tensor for name, tensor in changed.items()}
    path = tmp_path / "damaged.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)
    with pytest.raises(PolicyFileError, match=fault) as refused:
        load(path, folder)
    assert "damaged.safetensors" in str(refused.value)


def test_calibrating_fits_the_map_to_the_text_that_it_does_not_judge(
    trained: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", *common, "--policy", str(trained), "--out", str(tmp_path / "other.safetensors")]
    assert main([*arguments, "--sequences", "4", "--head", "SKIP"]) == 0
    maps = []
    for path in (trained, tmp_path / "other.safetensors"):
        with safe_open(path, "pt") as file:
            maps.append(file.get_tensor("head.offsets"))
    assert (maps[0] != maps[1]).any()
    assert main([*arguments, "--sequences", "5000", "--head", "SKIP"]) == 2
    assert "no sequences left that a narrow head could be fitted to" in capsys.readouterr().err


def test_a_vocabulary_that_native_code_cannot_lay_out_is_refused_before_anything_is_trained(
    tiny_folder: Path, common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *common, "--model", str(tiny_folder), "--out", str(tmp_path / "run"), "--head", "SKIP"]
    assert main(arguments) == 2
    assert "head: SKIP is for a CPU and tokens by the 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def request(name: str, prompt: list[int]) -> GenerationRequest:
    skip = SkipOptions(Mode.ADAPTIVE, policy_name="learned")
    return GenerationRequest(name, prompt, StoppingParameters(8, ignore_eos=True), skip=skip)


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[int]]:
    for own in requests:
        engine.submit(own)
    return {name: tokens(events) for name, events in drain(engine).items()}


@pytest.mark.usefixtures("native_library")
def test_it_is_served_alone_as_among_others(folder: Path, trained: Path, tmp_path: Path, rows_folder: Path) -> None:
    (tmp_path / "native").symlink_to(rows_folder)
    options = BuildOptions(checks_kept_costs=False, policy_file=trained)
    engine = build_engine(folder, tmp_path, options, EngineConfig(group_planner=False), lambda message: None)
    (costs,) = (tmp_path / "calibration").glob("costs-*.json")
    assert "SKIP" in json.loads(costs.read_text())["table"]["head"]
    requests = [request(str(number), [number + place for place in range(5 + number)]) for number in range(5)]
    alone = [run(engine, own)[own.request_id] for own in requests]
    assert [len(answer) for answer in alone] == [8] * 5
    together = run(engine, *requests)
    assert [together[own.request_id] for own in requests] == alone
