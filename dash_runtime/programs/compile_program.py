"""Compiles programs and exits: `python -m dash_runtime.programs.compile_program FILE SPECIFICATION …`.

Runs in a process of its own, so that the compiler's memory and settings do not stay in the one that serves, and several
can run at once. Each compiles several programs, since loading Inductor and trying out the C++ compiler takes as long as
one program.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dash_runtime.actions import Action
from dash_runtime.child_process import die_with_parent
from dash_runtime.files.atomic_file import replacing
from dash_runtime.programs import example_inputs
from dash_runtime.programs.example_inputs import Sample
from dash_runtime.programs.program_cache import ProgramKind, ProgramSpec
from dash_runtime.programs.traced_layer import ModelShape

_NEVER = 1_000_000
_INDUCTOR = {
    # A product's unrolled terms stay in one loop; their common parts are computed once before it.
    "realize_opcount_threshold": _NEVER,
    "realize_acc_reads_threshold": _NEVER,
    "realize_reads_threshold": 1,
    "cpp.enable_floating_point_contract_flag": "fast",
    # These are half a gigabyte for each set of flags. Writing them takes as long as a dozen programs gain by them.
    "aot_inductor.precompile_headers": False,
}
_ON_STACK = "aot_inductor.allow_stack_allocation"
"""Small intermediate results lie on the stack. A layer has dozens: allocating them takes a twelfth of an INT4 layer's
time, and a quarter of the time of a skip that also decides."""
_WITHOUT_CONTRACTION = "off"
"""Contraction lets a compiler fuse an addition with either of two products, and with more rows it picks the other.
Layers in FULL must give the same numbers in calls for one row and for several. They wait for memory anyway."""
_WIDE_VECTORS = "native -mprefer-vector-width=512"
"""Bits are reinterpreted through an array, which compilers only optimise away if all of it has one vector width. Tuned
for Intel, they prefer half of AVX-512's width, and INT4 and INT8 then take five times as long."""


_MODEL_SAMPLES = {
    ProgramKind.LAYER: example_inputs.layer_sample,
    ProgramKind.ATTENTION: example_inputs.attention_sample,
    ProgramKind.NORM: example_inputs.norm_sample,
    ProgramKind.HEAD: example_inputs.head_sample,
}

_SKIP_SAMPLES = {
    ProgramKind.SKIP: example_inputs.skip_sample,
    ProgramKind.SKIP_ROWS: example_inputs.skip_rows_sample,
}


def sample(spec: ProgramSpec) -> Sample:
    """Returns the module and the example inputs that the program is traced with."""
    if not isinstance(spec.shape, ModelShape):
        return example_inputs.policy_sample(spec.shape)
    if spec.policy is not None:
        return example_inputs.deciding_sample(sample(replace(spec, policy=None)), spec.policy)
    if spec.kind in _SKIP_SAMPLES:
        return _SKIP_SAMPLES[spec.kind](spec.shape, spec.action, spec.rank)
    return _MODEL_SAMPLES[spec.kind](spec.shape, spec.action, spec.num_rows)


def compile_program(spec: ProgramSpec, path: Path) -> None:
    """Compiles a program into `path`, whole or not at all."""
    import torch._inductor.config as inductor_config

    torch.set_num_threads(spec.num_threads)
    module, inputs, dynamic_shapes = sample(spec)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic_shapes)
        with replacing(path) as partial:
            # Inductor insists on the name's ending.
            package = partial.with_name(f"{partial.name}.pt2")
            options: dict[str, Any] = dict(_INDUCTOR)
            if spec.kind is ProgramKind.LAYER and spec.action is Action.FULL:
                options["cpp.enable_floating_point_contract_flag"] = _WITHOUT_CONTRACTION
            if spec.keeps_results_on_stack and hasattr(inductor_config.aot_inductor, "allow_stack_allocation"):
                options[_ON_STACK] = True
            if torch.cpu._is_avx512_supported() and hasattr(inductor_config.cpp, "march"):
                options["cpp.march"] = _WIDE_VECTORS
            with inductor_config.patch(options):
                torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
            package.replace(partial)


def main() -> None:
    """Compiles the command line's programs in turn. Stops at the first that fails."""
    die_with_parent()
    for path, spec in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        compile_program(ProgramSpec.from_json(spec), Path(path))


if __name__ == "__main__":
    main()
