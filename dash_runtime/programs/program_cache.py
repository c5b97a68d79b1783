"""Compiled programs: names them, compiles missing ones, and loads them.

A program is one AOTInductor package. It is compiled once for a shape, an action and this machine, and every later start
reads it. Knows tensors and files; knows no sequences.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dash_runtime
from dash_runtime.actions import Action
from dash_runtime.files.disk_cache import digest
from dash_runtime.programs.traced_code import traced_code
from dash_runtime.programs.traced_layer import ModelShape
from dash_runtime.programs.traced_policy import PolicyShape
from dash_runtime.progress import Progress

_COMPILE_SECONDS = 600
"""The time limit for one program."""
_SECONDS_BETWEEN_LOOKS = 0.5
_YIELDING = ("nice", "-n", "5")
"""Before a command: it and its children get a third of what another process gets of a processor that both want. With
much less they would never end on a busy machine. Every POSIX system has `nice`."""


class ProgramKind(StrEnum):
    """The kinds of programs (`traced_layer.py`, `traced_skip.py`, `traced_policy.py`)."""

    LAYER = "layer"
    ATTENTION = "attention"
    NORM = "norm"
    SKIP = "skip"
    SKIP_ROWS = "skip-rows"
    HEAD = "head"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program's kind, the action of its matrices, its shape, and its number of threads.

    A layer also has a number of rows, a skipped one its compensation's rank (`row_compensation.py`). Either may also
    decide the next layer, by a policy of some shape.
    """

    kind: ProgramKind
    action: Action
    shape: ModelShape | PolicyShape
    num_threads: int
    num_rows: int = 1
    rank: int = 0
    policy: PolicyShape | None = None

    @property
    def name(self) -> str:
        """The file's name, without digest and ending."""
        rows = "" if self.num_rows == 1 else f"-{self.num_rows}-rows"
        rank = f"-rank-{self.rank}" if self.rank else ""
        decides = "" if self.policy is None else "-deciding"
        return f"{self.kind}-{self.action.name.lower()}{rows}{rank}{decides}"

    @property
    def keeps_results_on_stack(self) -> bool:
        """True if intermediate results lie on the stack, and the output where the program's last one lay.

        It pays where a call is short, and so is its output, which has to be copied.
        """
        return self.kind in (ProgramKind.LAYER, ProgramKind.SKIP) and self.num_rows == 1

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "ProgramSpec":
        facts = json.loads(text)
        kind = ProgramKind(facts["kind"])
        shape = PolicyShape if kind is ProgramKind.POLICY else ModelShape
        policy = None if facts["policy"] is None else PolicyShape(**facts["policy"])
        own = {"kind": kind, "action": Action(facts["action"]), "shape": shape(**facts["shape"]), "policy": policy}
        return cls(**facts | own)


class Program:
    """A loaded program. A call takes its inputs as a flat list, in order, and may write into them."""

    path: Path | None = None
    """The package that it was loaded from."""

    def __init__(self, path: Path, spec: ProgramSpec) -> None:
        self.path = path
        self._has_own_outputs = not spec.keeps_results_on_stack
        # torch unpacks the file, and leaves that behind in a process that ends without tidying; what is loaded needs
        # no file.
        with _own_temporary_folder(place_to_run_code(path.parent)):
            # One caller, one thread, so the loader needs no pool of runners.
            self._loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self._loader.boxed_run(inputs)
        return outputs if self._has_own_outputs else [output.clone() for output in outputs]


def place_to_run_code(folder: Path) -> Path:
    """Returns the usual place of temporary files, or `folder` if no code may be loaded from there: hardened machines
    and containers mount it so."""
    usual = Path(tempfile.gettempdir())
    no_code = getattr(os, "ST_NOEXEC", 0)  # Linux has it
    return folder if os.statvfs(usual).f_flag & no_code else usual


@contextmanager
def _own_temporary_folder(place: Path) -> Iterator[None]:
    """Lets everything temporary go into a folder in `place` that is deleted at the end."""
    usual = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="dash-programs-", dir=place) as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if usual is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = usual


def will_compile(specs: Sequence[ProgramSpec], folder: Path) -> bool:
    """Returns True if `load_programs` will compile, which takes minutes."""
    return has_compiler() and not all(path.exists() for path in program_files(specs, folder).values())


def load_programs(
    specs: Sequence[ProgramSpec], folder: Path, progress: Progress, *, yields: bool = False
) -> dict[ProgramSpec, Program] | None:
    """Returns the programs; compiles missing ones into `folder`. Returns None if this machine cannot compile.

    Args:
        yields: compilers get less of a busy processor than others.
    """
    paths = program_files(specs, folder)
    programs = {spec: program for spec, path in paths.items() if (program := _load(path, spec)) is not None}
    missing = [spec for spec in paths if spec not in programs]
    if not missing:
        return programs
    if not has_compiler():
        progress("layers run uncompiled: no C++ compiler here")
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        num_processes = min(len(missing), max(1, torch.get_num_threads()))
        shares = [missing[first::num_processes] for first in range(num_processes)]
        # Inductor loads code too: it tries out what the compiler can do.
        place = place_to_run_code(folder)
        with tempfile.TemporaryDirectory(dir=place) as scratch, ThreadPoolExecutor(num_processes) as pool:
            compiling = [pool.submit(_compile, share, paths, scratch, yields) for share in shares]
            _follow([paths[spec] for spec in missing], compiling, progress)
        return programs | {spec: Program(paths[spec], spec) for spec in missing}
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        progress(f"layers run uncompiled: {_reason(error)}")
        return None


def has_compiler() -> bool:
    """Returns True if this machine has a C++ compiler."""
    return shutil.which("g++") is not None or shutil.which("clang++") is not None


def program_files(specs: Sequence[ProgramSpec], folder: Path) -> dict[ProgramSpec, Path]:
    """Returns the file of each program, there or not."""
    return {spec: folder / f"{spec.name}-{digest((spec.to_json(), _surroundings()))}.pt2" for spec in specs}


def _follow(paths: Sequence[Path], compiling: Sequence[Future[None]], progress: Progress) -> None:
    """Tells how many programs are there, until all are. Raises what `compiling` raises."""
    num_told, is_over = -1, False
    while not is_over:
        done, unfinished = wait(compiling, timeout=_SECONDS_BETWEEN_LOOKS, return_when=FIRST_EXCEPTION)
        num_there = sum(path.exists() for path in paths)
        if num_there != num_told:
            num_told = num_there
            progress(f"compiling programs (kept for later starts): {num_there} of {len(paths)}")
        is_over = not unfinished or any(future.exception() for future in done)
    for future in compiling:
        future.result()


def programs_digest() -> str:
    """Returns a digest that changes if programs are compiled differently, so that their measurements no longer hold."""
    return digest(_surroundings())


def _load(path: Path, spec: ProgramSpec) -> Program | None:
    """Returns None if the file is missing or damaged; the program is then compiled again."""
    try:
        return Program(path, spec) if path.exists() else None
    except RuntimeError:
        return None


def _compile(specs: Sequence[ProgramSpec], paths: Mapping[ProgramSpec, Path], scratch: str, yields: bool) -> None:
    """Compiles in one process. Its temporary files go into `scratch`, shared with its neighbours, not the system's."""
    command = [*(_YIELDING if yields else ()), sys.executable, "-m", "dash_runtime.programs.compile_program"]
    for spec in specs:
        command += str(paths[spec]), spec.to_json()
    environment = {**os.environ, "TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": scratch}
    seconds = _COMPILE_SECONDS * len(specs)
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds, env=environment)


def _reason(error: Exception) -> str:
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in str(output).splitlines() if line.strip()]
    # A compiler's last line is only that it ended.
    errors = [line for line in lines if "error: " in line]
    return (errors or lines or [type(error).__name__])[-1]


@lru_cache  # the same for all programs of a start
def _surroundings() -> tuple[object, ...]:
    """Returns all else that compiled code depends on: the traced code, torch's version, Python's and the processor."""
    return traced_code(Path(dash_runtime.__file__).parent), torch.__version__, sys.version_info[:2], _processor()


def _processor() -> str:
    """Returns the processor's features, which the compiler's `-march=native` looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
