"""The run for a GPU works wherever torch does; what only a GPU can show is tried on fakes of its parts."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_once.__main__ import main
from benchmarks.gpu_once.archive import archive
from benchmarks.gpu_once.decoding import contexts, generate
from benchmarks.gpu_once.graphs import layers_of
from benchmarks.gpu_once.live_report import FILE_NAME, LiveReport
from benchmarks.gpu_once.model import Model, build_model, fitting_actions
from benchmarks.gpu_once.parity import equal_steps, float_parity, layer_parity, token_parity, verification_parity
from benchmarks.gpu_once.pieces import PIECES, piece_parity
from benchmarks.gpu_once.processes import OUTPUT_NAME, run_units
from benchmarks.gpu_once.random_models import SHAPES, RandomWeights, needed_bytes, random_policy, tensor_shapes
from benchmarks.gpu_once.run import QUICK, check_parity, units_of
from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config, parameter_shapes
from dash_runtime.decoder.backends.eager import EagerBackend
from dash_runtime.decoder.decoder import Decoder
from dash_runtime.devices import CpuDevice
from dash_runtime.engine.lanes import InlineLane
from dash_runtime.layers.batch import Batch, PassKind
from dash_runtime.layers.heads import Heads
from dash_runtime.policy.policy import full_depth
from tests.runtime.support import ALL_ACTIONS, CPU, loop_ends
from tests.runtime.twin_devices import TWINS, twin_devices

ROOT = Path(__file__).resolve().parents[2]
TINY = SHAPES["tiny"]
REFUSED = (
    "numpy msgspec gguf safetensors transformers tokenizers huggingface_hub pydantic pydantic_settings llguidance "
    "jinja2 grpc google psutil matplotlib tqdm pytest"
)
WITHOUT_THIRD_PARTIES = f"""
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED.split()}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Refuses())
"""
"""A `sitecustomize.py`, which the processes that the run starts read too."""


def failing() -> None:
    raise ValueError("no such kernel\nand more")


def kept(report: LiveReport) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((report.folder / FILE_NAME).read_text(encoding="utf-8"))
    return content


@pytest.mark.long
def test_with_nothing_but_torch_the_run_comes_to_its_end_and_all_parities_hold(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_THIRD_PARTIES)
    command = [sys.executable, "-m", "benchmarks.gpu_once", str(folder), "--device", "cpu", "--quick"]
    own = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=500)
    content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert content["broken_parities"] == []
    assert [name for name, part in content["parts"].items() if part.keys() != {"seconds"}] == []
    assert [note for note in content["notes"] if "left out" in note] == []
    assert [path.name for path in folder.glob("gpu_once.tar.gz.*")] == ["gpu_once.tar.gz.0"]
    assert "all parities hold" in done.stdout
    for unit in units_of(["tiny"]):
        assert (folder / unit / OUTPUT_NAME).read_text(encoding="utf-8") in done.stdout
    for name in (
        *(f"piece_{name}_error" for name in PIECES),
        "tiny_fp32_cpu_vs_device_full_equal_tokens",
        "tiny_layer_error_mixed_rows3",
        "tiny_int4_rows3_twice_bit_equal",
        "tiny_lookahead4_inline_vs_inline_equal_plans",
        "tiny_verify_rows8_logits_error",
        "tiny_layer_host_us_int8_rows16_context256",
        "tiny_rows16_full_vs_whole_step",
        "tiny_rows16_whole_step_logits_error",
        "tiny_rows1_adaptive_lookahead4_tokens_per_second",
        "tiny_rows1_lookahead1_inline_exposed_us",
    ):
        assert name in content["figures"], name


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_cuda_device_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().out == "no CUDA device: nothing measured\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", ["tiny", "135m"])
def test_on_a_gpu_all_parities_hold(report: LiveReport, shape: str) -> None:
    float_parity(report, shape, torch.device("cuda"), 64)
    check_parity(report, {}, shape, torch.device("cuda"), QUICK)
    assert report.broken_parities == []


def test_time_that_is_over_leaves_the_rest_out_and_breaks_the_parities_that_were_not_checked(tmp_path: Path) -> None:
    assert main([str(tmp_path), "--device", "cpu", "--seconds", "0"]) == 1
    content = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    assert content["broken_parities"] == units_of(["tiny"])
    assert "figures" not in content
    assert content["parts"]["tests"]["left_out"] == "the run's time is over"


def test_a_unit_whose_process_dies_costs_that_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run_units(tmp_path, ["pinned_copies", "index_copy"], 100, ["--device", "none"])
    content = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    assert broken == content["broken_parities"] == [*content["parts"]] == ["pinned_copies", "index_copy"]
    assert "ended with 2" in content["parts"]["index_copy"]["error"]
    assert "invalid choice" in (tmp_path / "index_copy" / OUTPUT_NAME).read_text(encoding="utf-8")
    assert capsys.readouterr().out.count("invalid choice") == 2


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_whose_graph_does_something_else_breaks_its_parity(
    report: LiveReport, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuDevice, "has_graphs", True)
    monkeypatch.setattr(CpuDevice, "make_capture", lambda device: lambda run: lambda: None)
    piece_parity(report, name, CPU)
    assert report.broken_parities == [f"piece_{name}_error"] * 2


def test_an_archive_in_pieces_has_all_files_that_there_is_room_for(tmp_path: Path) -> None:
    sizes = {"small": 10, "folder/large": 40_000, "too-large": 100_000}
    (tmp_path / "folder").mkdir()
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    for _ in range(2):  # a second time it does not take up its own pieces
        pieces, left_out = archive(tmp_path, piece_bytes=20_000, max_pieces=4)
        assert left_out == ["too-large"]
        assert all(path.stat().st_size <= 20_000 for path in pieces)
    assert 2 <= len(pieces) <= 4
    whole = io.BytesIO(b"".join(path.read_bytes() for path in pieces))
    with tarfile.open(fileobj=whole) as packed:
        assert {own.name: own.size for own in packed} == {name: sizes[name] for name in ("small", "folder/large")}


def test_each_figure_is_in_the_file_at_once(report: LiveReport) -> None:
    report.add("speed", [1.0, 3.0])
    report.note("slow")
    assert kept(report)["figures"]["speed"]["value"] == 2.0
    assert kept(report)["notes"] == ["slow"]


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(report: LiveReport) -> None:
    report.part("first", failing)
    report.part("second", lambda: report.add("speed", [1.0]))
    parts = kept(report)["parts"]
    assert "no such kernel" in parts["first"]["error"]
    assert parts["second"].keys() == {"seconds"}
    assert report.broken_parities == []


@pytest.mark.parametrize(("value", "is_broken"), [(0.1, False), (0.2, True), (float("nan"), True)])
def test_a_parity_breaks_when_its_bound_is_missed_or_it_is_no_number(
    report: LiveReport, value: float, is_broken: bool
) -> None:
    report.require("error", value, "≤ 0.1")
    report.add("speed", [1.0], "≥ 2")  # a figure that is no parity
    assert report.broken_parities == ["error"] * is_broken


def test_a_parity_part_that_fails_is_a_broken_parity(report: LiveReport) -> None:
    report.part("parity", failing, is_parity=True)
    assert report.broken_parities == ["parity"]


def test_shapes_are_a_llamas() -> None:
    for config in SHAPES.values():
        assert tensor_shapes(config) == parameter_shapes(config)


@pytest.mark.embedded
def test_the_small_shape_is_the_embedded_models(embedded_folder: Path) -> None:
    real, own = load_model_config(embedded_folder), SHAPES["135m"]
    assert replace(real, name=own.name, context_length=own.context_length, eos_token_ids=own.eos_token_ids) == own


def test_only_steps_before_the_first_difference_count_as_equal() -> None:
    assert equal_steps([[1], [2], [3]], [[1], [9], [3]]) == 1


def test_weights_are_the_same_each_time_and_differ_between_names() -> None:
    weights = RandomWeights(TINY, torch.bfloat16, CPU)
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    assert torch.equal(weights[gate], weights[gate])
    assert not torch.equal(weights[gate], weights[up])
    assert len(weights) == len(list(weights))


def test_what_does_not_fit_is_left_out_with_a_line(report: LiveReport) -> None:
    offered = (Action.SKIP, Action.INT4, Action.INT8, Action.FULL)
    smaller = (Action.SKIP, Action.FULL)
    everything, least = (int(needed_bytes(SHAPES["8b"], own, 4096)) + 1 for own in (offered, smaller))
    assert fitting_actions(report, "8b", offered, everything, 4096) == [*offered]
    assert fitting_actions(report, "8b", offered, least, 4096) == [*smaller]
    assert fitting_actions(report, "8b", offered, least // 2, 4096) is None
    assert report.notes[-1] == "8b: left out"


def test_all_actions_at_8b_fit_in_48_gigabytes() -> None:
    offered = (Action.SKIP, Action.INT4, Action.INT8, Action.FULL)  # INT3 is for processors
    assert 30e9 < needed_bytes(SHAPES["8b"], offered, 34_000) < 48e9


def test_a_policy_that_has_learned_nothing_skips_some_layers_and_runs_others_in_full(model: Model) -> None:
    with contexts(model.pool, [40], 65) as caches:  # rows of a batch would agree on one action
        run = generate(model.eager, InlineLane(), model.policies[0], caches, [7], 64)
    assert {Action(number) for step in run.plans for plan in step for number in plan} == {Action.SKIP, Action.FULL}
    assert {policy.head for policy in model.policies} == {Action.FULL}


def test_a_policy_decides_no_layer_before_it_has_looked_ahead() -> None:
    policy = random_policy(TINY, ALL_ACTIONS, (Action.FULL,), full_depth(6).compensation, CPU, lookahead=4)
    assert policy.spec.decision_blocks == ((4,),)


def test_a_replayed_plan_gives_the_same_tokens_and_asks_nobody(model: Model) -> None:
    lane = InlineLane()
    with contexts(model.pool, [20, 33], 9) as caches:
        planned = generate(model.decoder, lane, model.policies[0], caches, [1, 2], 8)
        exposed = lane.exposed_ns
        again = generate(model.decoder, lane, model.policies[0], caches, [1, 2], 8, replayed=planned.plans)
    assert (again.tokens, again.plans) == (planned.tokens, planned.plans)
    assert lane.exposed_ns == exposed > 0


def test_every_step_is_guarded_from_its_pass_to_its_logits(model: Model) -> None:
    seen: list[str] = []

    @contextmanager
    def guard() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    with contexts(model.pool, [20], 4) as caches:
        lane, policy = InlineLane(), model.policies[0]
        generate(model.eager, lane, policy, caches, [1], 3, guard=guard, on_logits=lambda own: seen.append("logits"))
    assert seen == ["begin", "end", "logits"] * 3


def test_a_model_that_does_not_fit_breaks_the_run(report: LiveReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "free_bytes", lambda device: 1000)
    report.part("tiny", lambda: check_parity(report, {}, "tiny", CPU, QUICK), is_parity=True)
    assert report.broken_parities == ["tiny"]
    assert "does not fit" in kept(report)["parts"]["tiny"]["error"]


def test_parities_move_everything_to_the_device_that_they_use_there(
    report: LiveReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twin_devices(monkeypatch):
        float_parity(report, "tiny", TWINS[0], 2)
        model = build_model(report, "tiny", TWINS[0], 4096)
        assert model is not None
        layer_parity(report, model, (3,))
        token_parity(report, model, (2,), 2)
        verification_parity(report, model)
    assert report.broken_parities == []


class _Mistaken(EagerBackend):
    """Gets one thing wrong in one layer."""

    def __init__(self, decoder: Decoder, mistake: str) -> None:
        super().__init__(loop_ends(decoder), TINY, layers_of(decoder), Heads(decoder.heads))
        self._mistake = mistake

    def run_layer(self, layer: int, actions: Sequence[Action], hidden: Tensor, batch: Batch) -> Tensor:
        if layer != 3:
            return super().run_layer(layer, actions, hidden, batch)
        if self._mistake == "the wrong action":
            return super().run_layer(layer, [Action.INT4] * len(actions), hidden, batch)
        output = super().run_layer(layer, actions, hidden, batch)
        if self._mistake == "rows in another order":
            return output.flip(0)
        for span in batch.spans:
            if self._mistake == "keys that are not written":
                span.cache.keys[layer][span.start].zero_()
            if self._mistake == "values of the position before":
                values = span.cache.values[layer]
                values[span.start] = values[span.start - 1]
        return output * 1.05 if self._mistake == "a wrong factor" else output


@pytest.mark.parametrize(
    "mistake",
    [
        "the wrong action",
        "rows in another order",
        "keys that are not written",
        "values of the position before",
        "a wrong factor",
    ],
)
def test_a_mistake_in_one_layer_breaks_the_parity_of_layers(report: LiveReport, model: Model, mistake: str) -> None:
    backends = {**model.decoder.backends, PassKind.DECODE: [_Mistaken(model.decoder, mistake)]}
    mistaken = replace(model, decoder=replace(model.decoder, backends=backends))
    layer_parity(report, mistaken, (2,))
    assert report.broken_parities
