"""Runs one row through all layers in one call of native code (`row_loop.cpp`).

Calling each layer's program from Python takes a tenth of a token's time, mostly for lists of tensors that were the same
for the token before. Knows programs and memory; `row_calls.py` says what is called.
"""

import contextlib
import ctypes
import platform
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_size_t, c_uint8, c_void_p, cast
from pathlib import Path

import torch
from torch import Tensor

from dash_runtime.files.atomic_file import replacing
from dash_runtime.files.disk_cache import digest
from dash_runtime.programs.program_cache import place_to_run_code
from dash_runtime.progress import Progress

_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILE_SECONDS = 60
NUM_OWN_INPUTS, MOST_INPUTS = 5, 32
"""As in the source: the row's own inputs of a program, and the most that it may have in all."""


class TorchStruct(Structure):
    _fields_ = [(name, c_void_p) for name in ("copy_handle", "delete_handle", "data_of", "wrap")] + [("cpu", c_int64)]


class CallStruct(Structure):
    _fields_ = [("run", c_void_p), ("container", c_void_p), ("inputs", POINTER(c_void_p)), ("num_inputs", c_int64)]


class ExchangeStruct(Structure):
    _fields_ = [
        ("numbers", c_void_p),
        *((name, c_int64) for name in ("num_known", "first_result", "num_scores")),
        ("actions", POINTER(c_int64)),
        ("layer_costs", POINTER(c_double)),
    ]


class RotaryStruct(Structure):
    _fields_ = [("cosines", c_void_p), ("sines", c_void_p)]


_SIZES = ("num_layers", "num_actions", "num_rows", "dtype", "element_bytes", "hidden_bytes")
_CACHE_SIZES = ("layer_bytes", "values_bytes", "token_bytes", "num_kv_heads", "head_dim", "num_tokens")


class RowStruct(Structure):
    _fields_ = [
        ("torch", POINTER(TorchStruct)),
        ("calls", POINTER(CallStruct)),
        *((name, c_int64) for name in _SIZES),
        ("hidden", c_void_p * 2),
        ("hidden_data", c_void_p * 2),
        ("windows", POINTER(c_int64)),
        ("rotary_of", POINTER(c_int64)),
        ("rotary", POINTER(RotaryStruct)),
        ("memory", c_void_p),
        *((name, c_int64) for name in _CACHE_SIZES),
        ("pinned", POINTER(c_uint8)),
        ("exchange", POINTER(ExchangeStruct)),
        *((name, c_void_p) for name in ("plan", "scores", "times")),
    ]


def load_row_loop(folder: Path, progress: Progress) -> "RowLoop | None":
    """Returns the loop, compiled into `folder` if it is missing or damaged. Returns None if that cannot be here."""
    path = folder / f"row-loop-{digest((_SOURCE.read_text(), platform.machine()))}.zip"
    try:
        with contextlib.suppress(OSError, zipfile.BadZipFile):
            return RowLoop(path)
        folder.mkdir(parents=True, exist_ok=True)
        _compile(path)
        return RowLoop(path)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        progress(f"layers are called one by one: {error}")
        return None


def _compile(path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler here")
    with tempfile.TemporaryDirectory() as folder, replacing(path) as partial:
        library = Path(folder) / "row_loop.so"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
        with zipfile.ZipFile(partial, "w") as package:
            package.write(library, library.name)


def _library_in(path: Path) -> ctypes.CDLL:
    """Loads the one library in a package, whose checksum says that it is whole. What is loaded needs no file."""
    place = place_to_run_code(path.parent)
    with tempfile.TemporaryDirectory(prefix="dash-programs-", dir=place) as folder, zipfile.ZipFile(path) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".so"))
        return ctypes.CDLL(package.extract(name, folder))


class RowLoop:
    """The native loop, loaded, and its ways into torch and into programs.

    Raises:
        OSError, BadZipFile: the package cannot be loaded.
        AttributeError: this torch has another C interface.
    """

    def __init__(self, path: Path) -> None:
        self._library = _library_in(path)
        self.run = self._library.dash_run_row
        self.run.argtypes, self.run.restype = [c_void_p], c_int64
        self._shim = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ("new_tensor_handle", "delete_tensor_object", "get_data_ptr", "create_tensor_from_blob")
        functions = [cast(getattr(self._shim, f"aoti_torch_{name}"), c_void_p) for name in names]
        self.torch = TorchStruct(*functions, self._shim.aoti_torch_device_type_cpu())
        self._containers: dict[Path, tuple[int, int]] = {}
        self._libraries: list[ctypes.CDLL] = []

    def dtype(self, dtype: torch.dtype) -> int:
        """Returns the number by which the C interface names a dtype."""
        return int(getattr(self._shim, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")())

    def handle(self, tensor: Tensor) -> int:
        """Returns a new handle of the tensor's memory, which has to outlive it."""
        num_dims, made = tensor.dim(), c_void_p()
        sizes, strides = (c_int64 * num_dims)(*tensor.shape), (c_int64 * num_dims)(*tensor.stride())
        memory, dtype = c_void_p(tensor.data_ptr()), self.dtype(tensor.dtype)
        failed = self._shim.aoti_torch_create_tensor_from_blob(
            memory, c_int64(num_dims), sizes, strides, c_int64(0), dtype, self.torch.cpu, 0, byref(made)
        )
        return _made(made, failed)

    def delete(self, handles: Sequence[int]) -> None:
        for handle in handles:
            self._shim.aoti_torch_delete_tensor_object(c_void_p(handle))

    def container(self, path: Path) -> tuple[int, int]:
        """Returns a program's function and the container that it runs, which are made once.

        Raises:
            RuntimeError: the package is gone, or has another interface.
        """
        if path not in self._containers:
            try:
                library = _library_in(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise RuntimeError(f"{path} cannot be loaded: {error}") from None
            container = c_void_p()
            failed = library.AOTInductorModelContainerCreateWithDevice(byref(container), c_size_t(1), b"cpu", None)
            run = cast(library.AOTInductorModelContainerRunSingleThreaded, c_void_p)
            self._containers[path] = _made(run, 0), _made(container, failed)
            self._libraries.append(library)
        return self._containers[path]


def _made(pointer: c_void_p, failed: int) -> int:
    if failed or pointer.value is None:
        raise RuntimeError("torch's C interface does not do what it did")
    return pointer.value
