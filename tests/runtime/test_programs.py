"""The programs that a model needs, where they are kept, and what a start says if it has none."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

from dash_runtime.actions import Action
from dash_runtime.checkpoints import load_model_config
from dash_runtime.decoder.backends.needed_programs import program_specs, why_eager
from dash_runtime.model_config import BlockConfig, MixtureConfig, NormPlacement, QkNorm, RopeConfig, RopeKind
from dash_runtime.programs.compile_program import sample
from dash_runtime.programs.program_cache import Program, ProgramKind, ProgramSpec, load_programs
from dash_runtime.programs.traced_layer import ModelShape
from dash_runtime.programs.traced_policy import PolicyShape

MODEL_SHAPE = ModelShape(
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rms_norm_eps=1e-6,
    has_qkv_bias=False,
    vocab_size=272,
    qk_norm=QkNorm.HEAD,
)
POLICY_SHAPE = PolicyShape(hidden_size=64, width=32, inner_width=16, block_size=2, num_actions=3, num_facts=5)
LAYER = ProgramSpec(ProgramKind.LAYER, Action.INT4, MODEL_SHAPE, 2)
POLICY = ProgramSpec(ProgramKind.POLICY, Action.FULL, POLICY_SHAPE, 2)
UNTRACEABLE = replace(LAYER, shape=replace(MODEL_SHAPE, hidden_size=65))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A g++ that only fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "g++").write_text("#!/bin/sh\necho 'g++: fatal error: no cc1plus\ncompilation terminated.' >&2\nexit 1\n")
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the smallest program, really compiled."""
    folder = tmp_path_factory.mktemp("kept") / "programs"
    temporary = folder.with_name("temporary")
    temporary.mkdir()
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr("tempfile.tempdir", None)  # it is looked up once
        assert load_programs([POLICY], folder, said.append) is not None, said
    assert [words.rpartition(": ")[2] for words in said] == ["0 of 1", "1 of 1"]
    return folder


def load(folder: Path, *specs: ProgramSpec) -> tuple[dict[ProgramSpec, Program] | None, list[str]]:
    """Returns the programs, and the progress messages."""
    said: list[str] = []
    return load_programs(specs, folder, said.append), said


def assert_one_line_of_reason(said: list[str]) -> None:
    assert "uncompiled" in said[-1]
    assert "\n" not in said[-1]
    assert "Traceback" not in said[-1]
    assert said[-1].partition(": ")[2]


@pytest.mark.parametrize("spec", [LAYER, POLICY, replace(LAYER, kind=ProgramKind.SKIP, action=Action.FULL, rank=32)])
def test_a_specification_survives_its_json(spec: ProgramSpec) -> None:
    assert ProgramSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        (
            {
                "block": BlockConfig(has_qkv_bias=True, qk_norm=QkNorm.HEAD),
                "sliding_window": (None, 2, 7, None, None, None),
            },
            None,
        ),
        ({"block": BlockConfig(has_output_bias=True)}, "biases of outputs"),
        ({"block": BlockConfig(has_mlp_bias=True)}, "biases of outputs"),
        ({"block": BlockConfig(NormPlacement.AFTER, qk_norm=QkNorm.WIDTH)}, None),
        ({"block": BlockConfig(NormPlacement.BOTH)}, None),
        ({"sliding_window": (None,) * 5 + (1,)}, "sliding windows of one position"),
        ({"ropes": (None, RopeConfig(1e4, RopeKind.YARN, original_context_length=64, query_growth=0.1))}, None),
        (
            {"ropes": (None, RopeConfig(1e4, RopeKind.YARN, original_context_length=63, query_growth=0.1))},
            "queries that grow with their position",
        ),
        ({"mixture": MixtureConfig(frozenset((1,)), 8, 2, 32, True)}, "mixtures of experts"),
        ({"intermediate_size": 168}, "matrices of these sizes"),
        ({"hidden_size": 80}, "matrices of these sizes"),
    ],
)
def test_only_models_that_the_programs_can_stand_for_are_compiled(
    tiny_folder: Path, changes: dict[str, object], expected: str | None
) -> None:
    model = replace(load_model_config(tiny_folder), vocab_size=272)
    assert why_eager(replace(model, **changes), 64) == expected  # type: ignore[arg-type]


def test_there_are_programs_for_the_actions_that_run_and_no_others(tiny_folder: Path) -> None:
    model = load_model_config(tiny_folder)
    specs = program_specs(model, (Action.SKIP, Action.INT4, Action.FULL), 3)
    assert {spec.action for spec in specs} == {Action.INT4, Action.FULL}
    shared = {ProgramKind.ATTENTION, ProgramKind.NORM}
    assert {spec.kind for spec in specs} == {ProgramKind.LAYER, ProgramKind.SKIP, ProgramKind.SKIP_ROWS, *shared}
    assert {spec.shape for spec in specs} == {ModelShape.of(model)}
    assert {spec.num_threads for spec in specs} == {3}
    assert len(set(specs)) == len(specs) == 9


@pytest.mark.usefixtures("no_compiler")
def test_a_machine_without_a_compiler_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    programs, said = load(tmp_path / "programs", LAYER, POLICY)
    assert programs is None
    assert said == ["layers run uncompiled: no C++ compiler here"]
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_folder_that_cannot_be_made_is_a_reason_and_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    for folder in (blocked, blocked / "programs"):
        programs, said = load(folder, LAYER)
        assert programs is None
        assert_one_line_of_reason(said)


@needs_compiler
def test_what_cannot_be_traced_is_a_reason_and_leaves_no_file(tmp_path: Path) -> None:
    programs, said = load(tmp_path, UNTRACEABLE)
    assert programs is None
    assert_one_line_of_reason(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("failing_compiler")
def test_a_compiler_that_fails_is_a_reason_and_leaves_no_file(tmp_path: Path) -> None:
    programs, said = load(tmp_path / "programs", POLICY)
    assert programs is None
    assert_one_line_of_reason(said)
    assert said[-1].endswith("fatal error: no cc1plus")
    assert list((tmp_path / "programs").iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("no_compiler")
def test_a_kept_program_is_loaded_without_a_word_and_computes_what_its_module_does(kept: Path) -> None:
    programs, said = load(kept, POLICY)
    assert said == []
    assert programs is not None
    module, inputs, _ = sample(POLICY)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in pytree.tree_leaves(inputs)]
    expected = pytree.tree_leaves(module(*pytree.tree_unflatten(given, pytree.tree_structure(inputs))))
    torch.testing.assert_close(programs[POLICY](list(given)), expected, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_a_loaded_program_keeps_nothing_in_the_temporary_folder(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (path,) = kept.iterdir()
    program = Program(path, POLICY)  # its destructor would delete it, but a process may end without
    assert list(tmp_path.iterdir()) == []
    assert os.environ["TMPDIR"] == str(tmp_path)
    del program


@needs_compiler
def test_programs_load_where_no_code_may_be_run_from_the_temporary_folder(kept: Path, tmp_path: Path) -> None:
    """As on hardened machines, and in a container whose temporary folder is in memory."""
    (path,) = kept.iterdir()
    script = "from tests.runtime.test_programs import *; Program(Path(sys.argv[1]), POLICY)"
    in_there = f"mount -t tmpfs -o noexec tmpfs {tmp_path} && exec env TMPDIR={tmp_path}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "--mount", "sh", "-c", f"{in_there} true"]).returncode:
        pytest.skip("needs the right to mount")
    command = [unshare, "--mount", "sh", "-c", f'{in_there} "$@"', "sh", sys.executable, "-c", script, str(path)]
    subprocess.run(command, check=True, timeout=120)


@needs_compiler
@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "another",
    [
        replace(POLICY, num_threads=3),
        replace(POLICY, action=Action.INT4),
        replace(POLICY, shape=replace(POLICY_SHAPE, width=48)),
        replace(POLICY, shape=replace(POLICY_SHAPE, block_size=1)),
        LAYER,
    ],
)
def test_a_kept_program_stands_for_no_other(kept: Path, another: ProgramSpec) -> None:
    before = sorted(kept.iterdir())
    programs, said = load(kept, POLICY, another)
    assert programs is None
    assert len(said) == 1
    assert sorted(kept.iterdir()) == before


@needs_compiler
@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("kept_bytes", [0, 100, -100])
def test_a_damaged_program_is_a_reason_and_no_error(kept: Path, tmp_path: Path, kept_bytes: int) -> None:
    (path,) = kept.iterdir()
    (tmp_path / path.name).write_bytes(path.read_bytes()[:kept_bytes])
    programs, said = load(tmp_path, POLICY)
    assert programs is None
    assert_one_line_of_reason(said)


@needs_compiler
def test_nothing_but_the_program_is_left_behind_by_compiling(kept: Path) -> None:
    (path,) = kept.iterdir()
    assert path.suffix == ".pt2"
    assert not path.name.startswith(".")
    assert list(kept.with_name("temporary").iterdir()) == []


@needs_compiler
@torch.inference_mode()
def test_a_policys_row_has_the_same_scores_whatever_rows_are_with_it(kept: Path) -> None:
    programs, _ = load(kept, POLICY)
    assert programs is not None
    _, (hidden, facts, *weights), _ = sample(POLICY)
    hidden, facts, *weights = (torch.randn(own.shape).to(own.dtype) for own in (hidden, facts, *weights))
    choices, scores = programs[POLICY]([hidden, facts, *weights])
    rows = zip(hidden.split(1), facts.split(1), strict=True)
    alone = [programs[POLICY]([row, own, *weights]) for row, own in rows]
    assert torch.equal(scores, torch.cat([own for _, own in alone]))
    assert torch.equal(choices, torch.cat([own for own, _ in alone]))
