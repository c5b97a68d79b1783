"""Compiles the native code into a cache folder, once for a level of processors, and loads it.

Knows files and compilers; knows no tensors.
"""

import contextlib
import ctypes
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import weakref
import zipfile
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path

from dash_runtime.files.atomic_file import replacing
from dash_runtime.files.disk_cache import digest
from dash_runtime.native.layout import check_layout
from dash_runtime.native.levels import NATIVE, Level, best_level, processor_features
from dash_runtime.progress import Progress

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "native.cpp"
_FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    # Tuned for Intel, compilers prefer half of AVX-512's width.
    *(("-mtune=native", "-mprefer-vector-width=512") if platform.machine() == "x86_64" else ()),
    # A product and the sum that it is added to are one instruction, in every loop alike.
    *("-ffp-contract=fast", "-fno-math-errno"),
)
_COMPILE_SECONDS = 300
_compiling: dict[Path, threading.Thread] = {}
"""The compilations that `compile_ahead` began, by the file that each makes."""


class NativeLibrary:
    """The native code, loaded.

    Raises:
        OSError, ValueError, BadZipFile: the package cannot be loaded, or has other structures.
        AttributeError: the package has other functions.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        """The level, and the digest of the code."""
        place = place_to_run_code(path.parent)
        # What is loaded needs no file.
        with tempfile.TemporaryDirectory(prefix="dash-rows-", dir=place) as folder, zipfile.ZipFile(path) as package:
            (name,) = package.namelist()
            library = ctypes.CDLL(package.extract(name, folder))
        library.dash_layout.restype = c_char_p
        self.layout: str = library.dash_layout().decode()
        """Where it has the fields of its structures."""
        check_layout(self.layout)
        self.run_rows = _function(library.dash_run_rows, c_void_p)
        self.run_burst = _function(
            library.dash_run_burst, c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 2, c_int64, *[c_void_p] * 2
        )
        self.run_burst.restype = c_int64
        self.draw = _function(library.dash_draw, c_void_p, c_int64, *[c_void_p] * 2, c_int64, c_int64, c_void_p)
        self.choose = _function(library.dash_choose, *[c_void_p] * 4, c_int64, *[c_void_p] * 2)
        self.rounds_keys = bool(library.dash_rounds_keys())
        """True if rounded layers attend to keys and values in INT8."""
        self._new_workspace = library.dash_new_workspace
        self._new_workspace.restype = c_void_p
        self._delete_workspace = _function(library.dash_delete_workspace, c_void_p)

    def new_workspace(self, owner: object) -> int:
        """Returns memory of passes, which goes with its owner. One pass at a time may use it."""
        workspace = int(self._new_workspace())
        weakref.finalize(owner, self._delete_workspace, workspace).atexit = False
        return workspace


def compile_ahead(folder: Path) -> None:
    """Begins to compile what `load_native_code` will want from `folder`, if it is missing. A compiler is another
    process, so a start can convert a model meanwhile."""
    level = best_level()
    path = library_path(folder, level)
    if path in _compiling or path.exists():
        return

    def compile_it() -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # `load_native_code` tries again, and says why
            _compile(path, level)

    _compiling[path] = threading.Thread(target=compile_it, name="compiler", daemon=True)
    _compiling[path].start()


def load_native_code(folder: Path, progress: Progress, level: Level | None = None) -> NativeLibrary | None:
    """Returns the native code, compiled into `folder` if it is missing or damaged; None if that cannot be here.

    It is of the best level that this machine has, or of the one that is asked for.
    """
    path = library_path(folder, level or best_level())
    if (compiling := _compiling.pop(path, None)) is not None and compiling.is_alive():
        progress("compiling native code (kept for later starts)")
        compiling.join()
    try:
        try:
            return _kept_or_compiled(folder, progress, level or best_level())
        except subprocess.CalledProcessError:
            if level is not None:
                raise
            return _kept_or_compiled(folder, progress, NATIVE)  # a compiler may be older than the level's name
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        progress(f"layers run eagerly: {_reason(error)}")
        return None


def _kept_or_compiled(folder: Path, progress: Progress, level: Level) -> NativeLibrary:
    path = library_path(folder, level)
    with contextlib.suppress(OSError, ValueError, AttributeError, zipfile.BadZipFile):
        if not others_may_write(path):
            return NativeLibrary(path)
        progress(f"native code that is kept is not used: others may write to {path}")
    progress("compiling native code (kept for later starts)")
    _compile(path, level)
    return NativeLibrary(path)


def others_may_write(path: Path) -> bool:
    """True if somebody but this user and root could have written a file whose code is to run.

    Raises:
        OSError: there is no such file.
    """
    status, folder = path.stat(), path.parent.stat()
    mine = (os.geteuid(), 0) if hasattr(os, "geteuid") else (status.st_uid, folder.st_uid)
    is_open = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
    return status.st_uid not in mine or bool(status.st_mode & stat.S_IWOTH) or bool(is_open)


def library_path(folder: Path, level: Level) -> Path:
    """Returns where a level's native code is kept."""
    return folder / f"rows-{level.name}-{code_digest(level)}.zip"


def code_digest(level: Level) -> str:
    """Returns a digest that changes if the level's native code does."""
    sources = [file.read_text() for file in (_SOURCE, *sorted(_FOLDER.glob("*.h")))]
    return digest((sources, _FLAGS, level.flags, processor_features() if level is NATIVE else None))


def place_to_run_code(folder: Path) -> Path:
    """Returns the usual place of temporary files, or `folder` if no code may be loaded from there: hardened machines
    and containers mount it so."""
    usual = Path(tempfile.gettempdir())
    no_code = getattr(os, "ST_NOEXEC", 0)  # Linux has it
    return folder if os.statvfs(usual).f_flag & no_code else usual


def _compiler() -> str | None:
    return shutil.which("g++")


def _compile(path: Path, level: Level) -> None:
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C++ compiler here")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, replacing(path) as partial:
        library = Path(folder) / "native.so"
        command = [compiler, *_FLAGS, *level.flags, "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        with zipfile.ZipFile(partial, "w") as package:
            package.write(library, library.name)


def _reason(error: Exception) -> str:
    output = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in str(output).splitlines() if line.strip()]
    # A compiler's last line is only that it ended.
    errors = [line for line in lines if "error: " in line]
    return (errors or lines or [type(error).__name__])[-1]


def _function(own: "ctypes._NamedFuncPointer", *arguments: type) -> "ctypes._NamedFuncPointer":
    own.argtypes, own.restype = arguments, None
    return own
