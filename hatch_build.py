"""Puts native code into a wheel, of every level of one kind of machine.

Only if DASH_WHEEL_MACHINE names the machine (x86_64, aarch64): a wheel from a checkout has none, and compiles what its
machine needs when it starts. CXX is the compiler; by default g++, or the one that compiles for that machine here.
"""

import hashlib
import os
import platform
import runpy
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeCode(BuildHookInterface):
    """Compiles the libraries, and a list of their digests, which a start checks."""

    def initialize(self, version: str, build_data: dict) -> None:
        machine = os.environ.get("DASH_WHEEL_MACHINE")
        if not machine or version == "editable":
            return
        package = Path(self.root) / "dash_runtime" / "native"
        recipe = runpy.run_path(str(package / "recipe.py"))
        levels = [level for level in recipe["LEVELS"] if level.machine == machine]
        if not levels:
            raise ValueError(f"DASH_WHEEL_MACHINE={machine}: no level of native code is for such a machine")
        default = "g++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"
        compiler = shlex.split(os.environ.get("CXX", default))
        folder = Path(self.root) / "build" / "prebuilt" / machine
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{recipe['code_name'](level)}.so" for level in levels]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(recipe["compile_code"], [compiler] * len(levels), levels, files))
        sums = folder / "SHA256SUMS"
        sums.write_text("".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files))
        for file in (*files, sums):
            build_data["force_include"][str(file)] = f"dash_runtime/native/prebuilt/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{machine}"
