"""llama.cpp's contenders: a model's GGUF file as it is, and in the formats for which llama.cpp has its fast kernels.

Knows formats and processes; knows no figures.
"""

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.figures import Report
from benchmarks.peers.child import ChildContender
from benchmarks.peers.install import find_peer
from benchmarks.peers.peer_process import PeerProcess
from benchmarks.rounds import progress
from dash_runtime.files.atomic_file import replacing
from dash_runtime.files.disk_cache import digest

FILE = "file"
"""The format of the file itself."""
BITS: Mapping[str, int] = {FILE: 4, "Q4_0": 4, "IQ4_NL": 4, "Q4_K_M": 4, "Q8_0": 8, "BF16": 16}
"""The class of each format: what it is compared with. Our files have four to six bits."""
MODULES = {"llama_cpp": "llama_cpp", "ik_llama_cpp": "ik_llama_cpp._ctypes_api"}
"""The Python module of each peer that has its C API."""
_WRITER = "llama_cpp"
"""The peer that writes the formats; its fork reads the same."""
_CHILD = Path(__file__).parent / "llama_child.py"


def name_of(peer: str, kind: str) -> str:
    """Returns the name of a contender and its figures."""
    return f"{peer}_{kind.lower()}"


def of_class(peer: str, bits: int) -> list[str]:
    """Returns the names of a peer's formats of so many bits."""
    return [name_of(peer, kind) for kind, own in BITS.items() if own == bits]


def start_formats(
    report: Report,
    running: ExitStack,
    peer: str,
    folder: Path,
    file: Path,
    kinds: Sequence[str] = tuple(BITS),
    max_sequences: int = 1,
    max_length: int = 2048,
) -> dict[str, ChildContender]:
    """Starts a process for each format, which ends with `running`, and returns the contenders by name.

    One that does not start is left out, with a note; all are if the peer is not in `folder`.
    """
    python, contenders = find_peer(report, peer, folder), dict[str, ChildContender]()
    if python is None:
        return contenders
    progress(f"loading {peer}")
    # The fork's package does not say where its libraries lie.
    libraries = ":".join(map(str, python.parents[1].glob("lib/python*/site-packages/ik_llama_cpp/lib")))
    sizes = [str(number) for number in (torch.get_num_threads(), max_sequences, max_length)]
    for kind in kinds:
        name = name_of(peer, kind)
        with report.attempt(name):
            own = file if kind == FILE else _written(folder, file, kind)
            command = [str(python), "-I", str(_CHILD), MODULES[peer], str(own), *sizes]
            contenders[name] = ChildContender(
                running.enter_context(PeerProcess(name, command, {"LD_LIBRARY_PATH": libraries}))
            )
    for contender in list(contenders.values())[:1]:
        report.note(
            f"{peer}: {contender.description}, compiled here for this processor, by its C API, the largest logit by "
            "numpy, its defaults otherwise (ik_llama.cpp: weights repacked at run time, flash attention); FILE is the "
            "one that our weights come from, the other formats are made of it by llama.cpp's llama_model_quantize"
        )
    return contenders


def _written(folder: Path, file: Path, kind: str) -> Path:
    """Returns the file in another format, which is kept beside the peers' environments."""
    status = file.stat()
    name = f"{file.stem}-{kind}-{digest((str(file), status.st_size, status.st_mtime_ns))}.gguf"
    path = folder / "gguf" / name
    if not path.exists():
        progress(f"writing {name}")
        path.parent.mkdir(exist_ok=True)
        python = folder.absolute() / _WRITER / "bin" / "python"
        with replacing(path) as partial:
            command = [str(python), "-I", str(_CHILD), MODULES[_WRITER], "--quantize", str(file), kind, str(partial)]
            subprocess.run(command, check=True, capture_output=True)
    return path
