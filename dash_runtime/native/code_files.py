"""Finds native code: what the installed package brings, or what is compiled here, once for a level of processors.

Knows files and compilers; knows no tensors.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from dash_runtime.files.atomic_file import replacing
from dash_runtime.files.disk_cache import digest, keep
from dash_runtime.native.levels import best_level, levels_here, processor_features
from dash_runtime.native.library import NativeLibrary
from dash_runtime.native.recipe import NATIVE, Level, code_name, compile_code
from dash_runtime.progress import Progress

PREBUILT = Path(__file__).parent / "prebuilt"
"""The folder of what a wheel brings: a library for each level, and SHA256SUMS."""
_COMPILING = "compiling native code (kept for later starts)"
_REASONS = (OSError, ValueError, AttributeError, zipfile.BadZipFile)
"""Why a file's code is not used."""
_compiling: dict[Path, threading.Thread] = {}
"""The compilations that `compile_ahead` began, by the file that each makes."""

Check = Callable[[NativeLibrary], None]
"""Raises ValueError if a library computes something else than it should."""


def compile_ahead(folder: Path, prebuilt: Path | None = PREBUILT) -> None:
    """Begins to compile what `load_native_code` will want from `folder`, if it is missing. A compiler is another
    process, so a start can convert a model meanwhile."""
    level = best_level()
    path = library_path(folder, level)
    is_brought = prebuilt is not None and any(brought(prebuilt, own).exists() for own in levels_here())
    if path in _compiling or path.exists() or is_brought:
        return

    def compile_it() -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # `load_native_code` tries again, and says why
            _compile(path, level)

    _compiling[path] = threading.Thread(target=compile_it, name="compiler", daemon=True)
    _compiling[path].start()


def load_native_code(
    folder: Path,
    progress: Progress,
    level: Level | None = None,
    *,
    prebuilt: Path | None = PREBUILT,
    check: Check = lambda library: None,
) -> NativeLibrary | None:
    """Returns the native code; None if there can be none here.

    It is of the best level that this machine has, or of the one that is asked for.

    Args:
        folder: where compiled code is kept.
        prebuilt: where the package has code; a level that is missing there, or refused, has the next lower one. None:
            all code is compiled here.
        check: refuses code of the package. What has passed on this processor is kept in `folder`; what is compiled
            here is taken as it is.
    """
    if prebuilt is not None and level is None:
        for own in levels_here():
            if (library := _from_package(brought(prebuilt, own), own, folder, progress, check)) is not None:
                return library
    path = library_path(folder, level or best_level())
    if (compiling := _compiling.pop(path, None)) is not None and compiling.is_alive():
        progress(_COMPILING)
        compiling.join()
    try:
        try:
            return _kept_or_compiled(folder, progress, level or best_level())
        except subprocess.CalledProcessError:
            if level is not None:
                raise
            return _kept_or_compiled(folder, progress, NATIVE)  # a compiler may be older than the level's name
    except (*_REASONS, subprocess.SubprocessError) as error:
        progress(f"layers run eagerly: {_reason(error)}")
        return None


def library_path(folder: Path, level: Level) -> Path:
    """Returns where a level's native code is kept."""
    return folder / f"{code_name(level, processor_features())}.zip"


def brought(prebuilt: Path, level: Level) -> Path:
    """Returns where a package has a level's native code."""
    return prebuilt / f"{code_name(level)}.so"


def others_may_write(path: Path) -> bool:
    """True if somebody but this user and root could have written a file whose code is to run.

    Raises:
        OSError: there is no such file.
    """
    status, folder = path.stat(), path.parent.stat()
    mine = (os.geteuid(), 0) if hasattr(os, "geteuid") else (status.st_uid, folder.st_uid)
    is_open = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
    return status.st_uid not in mine or bool(status.st_mode & stat.S_IWOTH) or bool(is_open)


def _from_package(path: Path, level: Level, folder: Path, progress: Progress, check: Check) -> NativeLibrary | None:
    if not path.exists():
        return None
    try:
        passed = folder / f"passed-{digest((_checked_sum(path), processor_features()))}"
        library = NativeLibrary(path)
        if not passed.exists():
            check(library)
            keep(passed, Path.touch)
    except _REASONS as error:
        progress(f"the package's native code for {level.name} is not used: {_reason(error)}")
        return None
    progress(f"native code for {level.name}, from the package")
    return library


def _checked_sum(path: Path) -> str:
    """Returns a library's SHA-256, which is the one that it was built with.

    A damaged library must not get as far as the loader, which would crash on a part of one.
    """
    sums = dict(line.split()[::-1] for line in (path.parent / "SHA256SUMS").read_text().splitlines())
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    if own != sums.get(path.name):
        raise ValueError(f"{path} is not as it was built")
    return own


def _kept_or_compiled(folder: Path, progress: Progress, level: Level) -> NativeLibrary:
    path = library_path(folder, level)
    with contextlib.suppress(*_REASONS):
        if not others_may_write(path):
            return NativeLibrary(path)
        progress(f"native code that is kept is not used: others may write to {path}")
    progress(_COMPILING)
    _compile(path, level)
    return NativeLibrary(path)


def _compile(path: Path, level: Level) -> None:
    if platform.system() != "Linux":
        raise OSError(f"native code is for Linux, not for {platform.system()}")
    compiler = shutil.which("g++")
    if compiler is None:
        raise OSError("no C++ compiler here")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as partial:
        library = Path(folder) / "native.so"
        compile_code([compiler], level, library)
        with zipfile.ZipFile(partial, "w") as package:
            package.write(library, library.name)


def _reason(error: Exception) -> str:
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in str(output).splitlines() if line.strip()]
    # A compiler's last line is only that it ended.
    errors = [line for line in lines if "error: " in line]
    return (errors or lines or [type(error).__name__])[-1]
