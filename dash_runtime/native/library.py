"""Native code, loaded. Knows files and threads; compiles nothing, and knows no tensors."""

import ctypes
import importlib.util
import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path

from dash_runtime.native.layout import check_layout

_THREADS = ("libgomp*.so*", "libomp*.dylib", "libiomp5*")
"""Libraries of OpenMP, whichever torch brings: each has GCC's entry, which native code calls."""


class NativeLibrary:
    """The native code, loaded.

    Args:
        path: a package that was compiled here (`.zip`), or the library of a wheel.

    Raises:
        OSError, ValueError, BadZipFile: the file cannot be loaded, or has other structures.
        AttributeError: it has other functions.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        """The level, and the digest of the code."""
        _share_threads()
        library = _unpacked(path) if path.suffix == ".zip" else ctypes.CDLL(str(path))
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


def place_to_run_code(folder: Path) -> Path:
    """Returns the usual place of temporary files, or `folder` if no code may be loaded from there: hardened machines
    and containers mount it so."""
    usual = Path(tempfile.gettempdir())
    no_code = getattr(os, "ST_NOEXEC", 0)  # Linux has it
    return folder if os.statvfs(usual).f_flag & no_code else usual


def _unpacked(path: Path) -> ctypes.CDLL:
    # What is loaded needs no file.
    with (
        tempfile.TemporaryDirectory(prefix="dash-rows-", dir=place_to_run_code(path.parent)) as folder,
        zipfile.ZipFile(path) as package,
    ):
        (name,) = package.namelist()
        return ctypes.CDLL(package.extract(name, folder))


def _share_threads() -> None:
    """Gives native code torch's threads: it names no library of its own for them, so that it needs none of the system,
    and the threads of two would take the processor from each other.

    Raises:
        OSError: there is none.
    """
    own = next(_thread_libraries(), "libgomp.so.1")  # some systems' torch has the system's
    ctypes.CDLL(str(own), mode=ctypes.RTLD_GLOBAL)


def _thread_libraries() -> Iterator[Path]:
    torch = importlib.util.find_spec("torch")
    for place in torch.submodule_search_locations or () if torch is not None else ():
        for folder in (Path(place) / "lib", Path(place).with_name("torch.libs")):
            for pattern in _THREADS:
                yield from sorted(folder.glob(pattern))


def _function(own: "ctypes._NamedFuncPointer", *arguments: type) -> "ctypes._NamedFuncPointer":
    own.argtypes, own.restype = arguments, None
    return own
