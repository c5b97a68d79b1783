"""Tables that are measured once and kept: for one model and device, made again if damaged or found to be wrong."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dash_runtime.actions import Action, CostTable, LatencyTable
from dash_runtime.commands.cost_files import read_costs
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.engine.cost_fit import CostSpread, MeasuredCosts
from dash_runtime.layers.compensation import Compensation, Identity
from dash_runtime.policy.draft_length import MEASURED_LENGTHS
from dash_runtime.policy.policy import cheapest_kernel
from dash_runtime.progress import Progress
from dash_runtime.startup.calibration import DeviceCalibration, Finding
from dash_runtime.startup.quiet import Quiet
from tests.runtime.support import load_decoder
from tests.tiny_models import save_tiny_model

MODEL, DEVICE = ("fingerprint", "bfloat16"), ("a CPU, 2 threads", "eager")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Returns a decoder that is quick to measure: two layers and two actions."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "two-layers", "llama", num_hidden_layers=2)
    return load_decoder(folder, torch.bfloat16, (Action.SKIP, Action.FULL))


class Machine:
    """Measures made-up times: those of a quiet machine, each longer by the factors of its disturbances.

    `FULL` and `SKIP` name what a factor applies to.
    """

    def __init__(
        self, quick: Mapping[str, float] | None = None, whole: Mapping[str, float] | None = None, *, waited: float = 0.0
    ) -> None:
        self.num_whole = 0
        self.quietness = partial(nullcontext, Quiet(waited))
        self._quick, self._whole = quick or {}, whole or {}

    def measure_costs(self, decoder: Decoder) -> MeasuredCosts:
        self.num_whole += 1
        costs = CostTable.from_seconds(decoder.num_layers, QUIET, dict.fromkeys(decoder.heads, 1.5), 0.2)
        return MeasuredCosts(costs, CostSpread.around(costs, 0.1), 8, 1.5e9)

    def measure_latencies(
        self, decoder: Decoder, compensation: Compensation, rows: tuple[int, ...] = (1, 2, 4, 8, 16), rounds: int = 12
    ) -> LatencyTable:
        factors = self._factors(rounds)
        return LatencyTable(
            rows,
            {
                action: tuple(seconds * (3 + count) / 4 * factors.get(action.name, 1) for count in rows)
                for action, seconds in QUIET.items()
            },
        )

    def _factors(self, rounds: int) -> Mapping[str, float]:
        if rounds < 12:
            return self._quick
        self.num_whole += 1
        return self._whole


QUIET = {Action.SKIP: 0.3, Action.FULL: 1.0}


def calibration(
    folder: Path, machine: Machine, model: tuple[str, ...] = MODEL, device: tuple[str, ...] = DEVICE
) -> DeviceCalibration:
    return DeviceCalibration(
        folder, model, device, measure_latencies=machine.measure_latencies, quietness=machine.quietness
    )


def costs_of(calibration: DeviceCalibration, decoder: Decoder, said: list[str], **options: bool) -> MeasuredCosts:
    measure = partial(Machine().measure_costs, decoder)
    return calibration.costs(decoder.actions, tuple(decoder.heads), measure, said.append, **options).get()


def latencies_of(calibration: DeviceCalibration, decoder: Decoder, said: list[str]) -> LatencyTable:
    finding = calibration.latencies(decoder, Identity, said.append)
    if finding.kept is None:
        return finding.make()
    return calibration.checked_latencies(finding.kept, decoder, Identity(), said.append)


def measured(
    folder: Path, decoder: Decoder, model: tuple[str, ...] = MODEL, device: tuple[str, ...] = DEVICE
) -> tuple[MeasuredCosts, LatencyTable, int]:
    """Returns both tables, and how many of them were not read."""
    said: list[str] = []
    calibrated = calibration(folder, Machine(), model, device)
    costs, latencies = costs_of(calibrated, decoder, said), latencies_of(calibrated, decoder, said)
    assert all("measuring" in words and "\n" not in words for words in said)
    return costs, latencies, len(said)


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
        *(b"", b"{", b"[]", b"3", b"\xff\xfe"),
        b'{"was_quiet": true, "table": {"layer": {"FULL": "x"}, "head": {}, "num_layers": 2, "fixed": 0}}',
        b'{"was_quiet": true, "table": {"rows": [2], "seconds": {"FULL": [1]}}}',
        b'{"was_quiet": true, "table": {"rows": [1, 2], "seconds": {"SKIP": [1, 2], "FULL": [-1, 2]}}}',
        b'{"was_quiet": true, "table": {"rows": null, "seconds": null}}',
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
    costs, latencies, _ = measured(tmp_path, decoder)
    assert set(costs.table.layer) == set(latencies.seconds) == {Action.SKIP, Action.FULL}
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace('"SKIP"', '"INT4"'))
    costs, latencies, num_measured = measured(tmp_path, decoder)
    assert num_measured == 2
    assert set(costs.table.layer) == set(latencies.seconds) == {Action.SKIP, Action.FULL}


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
            costs, latencies, num_measured = measured(folder, decoder)
            assert num_measured == 2
            assert set(costs.table.layer) == set(latencies.seconds) == {Action.SKIP, Action.FULL}
    assert blocked.read_text() == "in the way"


def test_a_table_that_a_quick_measurement_agrees_with_is_kept_to_the_bit(decoder: Decoder, tmp_path: Path) -> None:
    first = latencies_of(calibration(tmp_path, Machine()), decoder, [])
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    said: list[str] = []
    machine = Machine(quick={"FULL": 1.2})
    assert latencies_of(calibration(tmp_path, machine), decoder, said) == first
    assert (said, machine.num_whole, file.read_bytes()) == ([], 0, before)


@pytest.mark.parametrize("disturbed", ["FULL", "SKIP"])
def test_a_table_that_a_disturbed_start_measured_is_replaced(decoder: Decoder, tmp_path: Path, disturbed: str) -> None:
    wrong = latencies_of(calibration(tmp_path, Machine(whole={disturbed: 1.8})), decoder, [])
    said: list[str] = []
    right = latencies_of(calibration(tmp_path, Machine()), decoder, said)
    assert right == latencies_of(calibration(tmp_path / "elsewhere", Machine()), decoder, []) != wrong
    (words,) = said
    assert "no longer fits what was kept" in words
    machine = Machine()
    assert latencies_of(calibration(tmp_path, machine), decoder, said) == right
    assert (machine.num_whole, len(said)) == (0, 1)


def test_a_machine_that_is_slower_alike_keeps_its_table(decoder: Decoder, tmp_path: Path) -> None:
    first = latencies_of(calibration(tmp_path, Machine()), decoder, [])
    machine = Machine(quick=dict.fromkeys(("FULL", "SKIP"), 3.0))
    said: list[str] = []
    assert latencies_of(calibration(tmp_path, machine), decoder, said) == first
    assert (said, machine.num_whole) == ([], 0)


@pytest.mark.parametrize("whole", [{}, {"SKIP": 1.2}, {"FULL": 1.8}, {"SKIP": 1.8}])
def test_a_start_that_is_disturbed_all_the_time_makes_no_table_worse(
    decoder: Decoder, tmp_path: Path, whole: Mapping[str, float]
) -> None:
    first = latencies_of(calibration(tmp_path, Machine()), decoder, [])
    machine = Machine(quick={"SKIP": 1.8}, whole=whole)
    assert latencies_of(calibration(tmp_path, machine), decoder, []) == first
    assert machine.num_whole == 1
    assert latencies_of(calibration(tmp_path, Machine()), decoder, []) == first


@pytest.mark.parametrize(
    "damage",
    [
        ('"spread"', '"other"'),
        ('"measured_at": 1500000000.0', '"measured_at": null'),
        ('"num_rounds": 8', '"num_rounds": "x"'),
        ('"fixed": ', '"fixed": -'),
    ],
)
def test_costs_without_a_sound_spread_are_measured_again(
    decoder: Decoder, tmp_path: Path, damage: tuple[str, str]
) -> None:
    first = costs_of(calibration(tmp_path, Machine()), decoder, [])
    (file,) = tmp_path.iterdir()
    assert damage[0] in file.read_text()
    file.write_text(file.read_text().replace(*damage))
    said: list[str] = []
    assert costs_of(calibration(tmp_path, Machine()), decoder, said) == first
    assert len(said) == 1


def test_costs_are_measured_again_for_a_policy_without_one_and_on_demand(decoder: Decoder, tmp_path: Path) -> None:
    said: list[str] = []
    for options in ({}, {"has_policy": True}, {"measures_again": True}, {}):
        costs_of(calibration(tmp_path, Machine()), decoder, said, **options)
    assert len(said) == 3


def test_what_others_disturbed_is_measured_again_by_the_next_start_and_then_believed(
    decoder: Decoder, tmp_path: Path
) -> None:
    said: list[str] = []
    for start in (1, 2):
        disturbed = calibration(tmp_path, Machine(waited=0.3))
        costs = costs_of(disturbed, decoder, said)
        latencies_of(disturbed, decoder, said)
        assert sum("measuring" in words for words in said) == sum("other work" in words for words in said) == 2 * start
        assert costs.spread.layer[Action.FULL] > 3 * Machine().measure_costs(decoder).spread.layer[Action.FULL]
    assert costs_of(disturbed, decoder, said) == costs
    latencies_of(disturbed, decoder, said)
    assert len(said) == 8


def test_commands_read_the_costs_that_a_start_kept(decoder: Decoder, tmp_path: Path) -> None:
    costs = costs_of(calibration(tmp_path, Machine()), decoder, [])
    (file,) = tmp_path.iterdir()
    assert read_costs(file) == costs.table


def test_a_quiet_start_makes_good_what_a_disturbed_one_kept(decoder: Decoder, tmp_path: Path) -> None:
    wrong = latencies_of(calibration(tmp_path, Machine(whole={"FULL": 1.4}, waited=0.3)), decoder, [])
    right = latencies_of(calibration(tmp_path, Machine()), decoder, [])
    assert right == latencies_of(calibration(tmp_path / "elsewhere", Machine()), decoder, []) != wrong


def test_an_engine_that_checks_nothing_believes_a_disturbed_start(decoder: Decoder, tmp_path: Path) -> None:
    wrong = costs_of(calibration(tmp_path, Machine(waited=0.3)), decoder, [])
    kept = DeviceCalibration(tmp_path, MODEL, DEVICE, checks_kept=False)
    said: list[str] = []
    assert costs_of(kept, decoder, said).table == wrong.table
    assert not said


def test_costs_that_serving_corrected_are_those_of_later_starts(decoder: Decoder, tmp_path: Path) -> None:
    first = costs_of(calibration(tmp_path, Machine()), decoder, [])
    other = replace(first, num_rounds=0, measured_at=2e9)
    calibration(tmp_path, Machine()).keep_costs(other)
    assert costs_of(calibration(tmp_path, Machine()), decoder, []) == other


Rounds = tuple[LatencyTable, ...]
Found = Finding[float] | Finding[Rounds] | Finding[dict[int, float]]
DRAFTS: dict[str, tuple[Callable[[DeviceCalibration, Decoder, Progress], Found], list[str]]]
DRAFTS = {
    "second-row": (DeviceCalibration.second_row, ['{"share": -1}', '{"share": "x"}']),
    "rounds": (lambda own, decoder, say: own.round_seconds(decoder, (1, 2), say), ['{"passes": []}', '{"passes": 3}']),
    "verification": (DeviceCalibration.verification_costs, ['{"7": -1}', '{"5": 1.0}', '{"7": "x"}']),
}
"""What drafts cost, by the beginning of its file's name: the measurement, and tables that are damaged."""


@pytest.mark.parametrize("name", DRAFTS)
def test_what_drafts_cost_is_measured_once_and_again_if_its_file_is_damaged(
    decoder: Decoder, tmp_path: Path, name: str
) -> None:
    (measure, tables), said = DRAFTS[name], list[str]()
    first, second = (measure(calibration(tmp_path, Machine()), decoder, said.append).get() for _ in range(2))
    assert first == second
    (file,) = tmp_path.glob(f"{name}-*.json")
    for damage in ("", "[]", *(f'{{"was_quiet": true, "table": {table}}}' for table in tables)):
        file.write_text(damage)
        before = len(said)
        again = measure(calibration(tmp_path, Machine()), decoder, said.append).get()
        assert len(said) == before + 1
        match again:
            case dict():
                assert set(again) == set(MEASURED_LENGTHS)
            case tuple():
                cheapest = cheapest_kernel(decoder.actions)
                assert all(own.rows == (1, 2) and min(own.seconds[cheapest]) > 0 for own in again)
                assert all(own.seconds[Action.FULL] == again[0].seconds[Action.FULL] for own in again)
            case _:
                assert again >= 0


def test_rounds_of_drafts_are_measured_again_for_other_counts(decoder: Decoder, tmp_path: Path) -> None:
    said: list[str] = []
    for counts in ((1, 2), (1,)):
        rounds = calibration(tmp_path, Machine()).round_seconds(decoder, counts, said.append).get()
        assert rounds[0].rows == counts
    assert len(said) == 2
