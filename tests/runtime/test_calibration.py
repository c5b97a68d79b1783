"""What is measured once and kept: read where it is there, made again where it is damaged, for one model and device."""

from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action, CostTable, LatencyTable
from dash_runtime.decoder.compensation import Identity
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.policy.draft_length import DRAFT_LENGTHS
from dash_runtime.startup.calibration import Calibration
from tests.runtime.support import load_decoder
from tests.tiny_models import save_tiny_model

MODEL, DEVICE = ("fingerprint", "bfloat16"), ("a CPU, 2 threads", "eager")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Two layers with two actions: little to measure."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "two-layers", "llama", num_hidden_layers=2)
    return load_decoder(folder, torch.bfloat16, (Action.SKIP, Action.FULL))


def measured(
    folder: Path, decoder: Decoder, model: tuple[str, ...] = MODEL, device: tuple[str, ...] = DEVICE
) -> tuple[CostTable, LatencyTable, int]:
    """Both tables, and how many of them were not read."""
    said: list[str] = []
    calibration = Calibration(folder, model, device)
    costs = calibration.costs(decoder, Identity(), said.append)
    row_costs = calibration.row_costs(decoder, Identity(), said.append)
    assert all("measuring" in words and "\n" not in words for words in said)
    return costs, row_costs, len(said)


def test_costs_are_measured_once_and_read_by_later_starts(decoder: Decoder, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    *first, num_measured = measured(folder, decoder)
    assert num_measured == 2
    *second, num_measured = measured(folder, decoder)
    assert num_measured == 0
    assert second == first
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'{"layer": {"FULL": "x"}, "head": {}, "num_layers": 2, "fixed": 0}',
        b'{"rows": [2], "seconds": {"FULL": [1]}}',
        b'{"rows": [1, 2], "seconds": {"SKIP": [1, 2], "FULL": [-1, 2]}}',
        b'{"rows": null, "seconds": null}',
    ],
)
def test_a_damaged_table_is_measured_again_and_whole_afterwards(
    decoder: Decoder, tmp_path: Path, damage: bytes
) -> None:
    measured(tmp_path, decoder)
    for path in tmp_path.iterdir():
        path.write_bytes(damage)
    *again, num_measured = measured(tmp_path, decoder)
    assert num_measured == 2
    *read, num_measured = measured(tmp_path, decoder)
    assert num_measured == 0
    assert read == again


def test_a_table_of_other_actions_is_measured_again(decoder: Decoder, tmp_path: Path) -> None:
    costs, row_costs, _ = measured(tmp_path, decoder)
    assert set(costs.layer) == set(row_costs.seconds) == {Action.SKIP, Action.FULL}
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace('"SKIP"', '"INT4"'))
    costs, row_costs, num_measured = measured(tmp_path, decoder)
    assert num_measured == 2
    assert set(costs.layer) == set(row_costs.seconds) == {Action.SKIP, Action.FULL}


@pytest.mark.parametrize(
    ("model", "device"),
    [
        (("another model", "bfloat16"), DEVICE),
        (("fingerprint", "float32"), DEVICE),
        (MODEL, ("a CPU, 3 threads", "eager")),
        (MODEL, ("a CPU, 2 threads", "compiled")),
    ],
)
def test_one_models_costs_on_one_device_are_no_others(
    decoder: Decoder, tmp_path: Path, model: tuple[str, ...], device: tuple[str, ...]
) -> None:
    measured(tmp_path, decoder)
    assert measured(tmp_path, decoder, model, device)[-1] == 2
    assert measured(tmp_path, decoder)[-1] == 0


def test_a_folder_that_cannot_be_written_still_gives_costs(decoder: Decoder, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    for folder in (blocked, blocked / "calibration"):
        for _ in range(2):
            costs, row_costs, num_measured = measured(folder, decoder)
            assert num_measured == 2
            assert set(costs.layer) == set(row_costs.seconds) == {Action.SKIP, Action.FULL}
    assert blocked.read_text() == "in the way"


def test_verifications_are_measured_once_for_the_lengths_that_fit(decoder: Decoder, tmp_path: Path) -> None:
    said: list[str] = []
    first, second = (Calibration(tmp_path, MODEL, DEVICE).verification_costs(decoder, said.append) for _ in range(2))
    assert first == second
    assert len(said) == 1
    assert set(first) == set(DRAFT_LENGTHS)
    (file,) = tmp_path.glob("verification-*.json")
    for damage in ("", "[]", '{"7": -1}', '{"5": 1.0}', '{"7": "x"}'):
        file.write_text(damage)
        assert set(Calibration(tmp_path, MODEL, DEVICE).verification_costs(decoder, said.append)) == set(DRAFT_LENGTHS)
    assert len(said) == 6
