"""TVM's names that move between releases; kernels write TVMScript, and import tvm themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy.typing as npt

from llmopt.errors import BackendUnavailableError


def tvm() -> ModuleType:
    """Return the module ``tvm``.

    Raises:
        BackendUnavailableError: it is not installed.
    """
    try:
        import tvm as module
    except ImportError as error:
        raise BackendUnavailableError("tvm", "pip install 'llmopt[cpu]'") from error
    return module  # type: ignore[no-any-return]


def relax() -> Any:
    """Return ``tvm.relax``, the graph language."""
    return tvm().relax


def tirx() -> Any:
    """Return ``tvm.tirx``, the language of kernels."""
    return tvm().tirx


def target(options: dict[str, object]) -> Any:
    """Return a target: ``{"kind": "llvm", "mcpu": …, "mtriple": …}``."""
    return tvm().target.Target(options)


def host_processor() -> str:
    """Return LLVM's name of this machine's processor."""
    return str(tvm().target.codegen.llvm_get_system_cpu())


def processors(triple: str) -> list[str]:
    """Return LLVM's names of the processors of a machine."""
    codegen = tvm().target.codegen
    return [str(name) for name in codegen.llvm_get_cpu_archlist(_bare(triple))]


def processor_features(triple: str, mcpu: str) -> set[str]:
    """Return what LLVM may use on a processor, in LLVM's names."""
    codegen = tvm().target.codegen
    return {str(name) for name in codegen.llvm_get_cpu_features(_bare(triple, mcpu))}


def _bare(triple: str, mcpu: str = "") -> Any:
    return target({"kind": "llvm", "mtriple": triple, **({"mcpu": mcpu} if mcpu else {})})


def symbol(name: str) -> Any:
    """Return a size that is known when the code runs."""
    return tirx().Var(name, "int64")


def plain(size: Any) -> Any:
    """Return a size as a number where it is one."""
    return int(size.value) if isinstance(size, tirx().IntImm) else size


def simplify(size: Any) -> Any:
    """Return a size in its simplest form, as a number where it is one."""
    return size if isinstance(size, int) else plain(tvm().sym.Analyzer().simplify(size))


def equal(left: Any, right: Any) -> bool:
    """Whether two sizes are always the same."""
    difference = simplify(left - right)
    return isinstance(difference, int) and difference == 0


def product(sizes: Sequence[Any]) -> Any:
    """Return the product of sizes."""
    return simplify(math.prod(sizes, start=1)) if sizes else 1


def scalar(value: float, dtype: str) -> Any:
    """Return a constant of rank 0."""
    return relax().const(value, dtype)


def array(value: npt.NDArray[Any]) -> Any:
    """Return a constant."""
    return relax().const(value, value.dtype.name)


def tensor_type(shape: Sequence[Any], dtype: str) -> Any:
    """Return the type of a tensor."""
    return relax().TensorType(list(shape), dtype)


def listed(values: Any, number: int, kind: Any) -> Any:
    """Return one element of a list that is an argument; its type is not checked again."""
    get = relax().op.call_pure_packed
    return get("vm.builtin.tuple_getitem", values, relax().prim_value(number), ty_args=kind)


def call(
    name: Any, arguments: Sequence[Any], kinds: Sequence[Any], aliases: list[int] | None
) -> Any:
    """Return a call of a kernel.

    Args:
        name: Global name of the function.
        arguments: Operands of the call.
        kinds: The types of what it writes.
        aliases: Argument that each output is written into, or -1; None for none.
    """
    if aliases is None:
        return relax().call_tir(name, list(arguments), list(kinds))
    return relax().call_tir_inplace(name, list(arguments), aliases, list(kinds))


def fused(module: Any, options: dict[str, object]) -> Any:
    """Return a module of Relax with kernels for a target, each scheduled if it is a GPU.

    Element-wise operators are fused; functions that nothing distinguishes are compiled once.
    """
    t = relax().transform
    passes = [
        relax().backend.DispatchSortScan(),
        t.LegalizeOps(),
        t.AnnotateTIROpPattern(),
        t.FoldConstant(),
        t.FuseOps(),
        t.FuseTIR(),
        t.DeadCodeElimination(),
    ]
    found = _run(passes, module, options)
    return _scheduled(found, options) if options["kind"] == "cuda" else found


def _scheduled(module: Any, options: dict[str, object]) -> Any:
    """Return a module whose kernels have threads and blocks of a GPU.

    Of one without matrix units: dlight's rule for those brings TVM 0.27 down, whatever the sizes.
    """
    from tvm.s_tir import dlight

    gpu = dlight.gpu
    rules = (gpu.Matmul, gpu.GEMV, gpu.Reduction, gpu.GeneralReduction, gpu.Fallback)
    plain = {**options, "arch": "sm_60"}
    return _run([dlight.ApplyDefaultSchedule(*(rule() for rule in rules))], module, plain)


def compiled(module: Any, options: dict[str, object]) -> Any:
    """Return a module of Relax compiled for a target, not linked yet."""
    t = relax().transform
    passes = [
        t.RewriteDataflowReshape(),
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]
    lowered = _in_order(_run(passes, fused(module, options), options))
    chosen = target(options)
    with chosen, tvm().transform.PassContext(opt_level=3):
        return relax().build(lowered, target=chosen, relax_pipeline=None)


def _in_order(module: Any) -> Any:
    """Return a module whose functions of sizes write in the order of their slots.

    TVM takes them from a set that is ordered by addresses, which differ from run to run.
    """
    for name, function in list(module.functions_items()):
        if not str(name.name_hint).startswith("shape_func"):
            continue
        stores = getattr(function.body, "seq", None)
        if stores is not None:
            ordered = sorted(stores, key=lambda store: int(store.indices[0]))
            module[name] = function.with_body(tirx().SeqStmt(ordered))
    return module


def _run(passes: Sequence[Any], module: Any, options: dict[str, object]) -> Any:
    with target(options), tvm().transform.PassContext(opt_level=3):
        return tvm().transform.Sequential(list(passes))(module)


def kernels(module: Any) -> dict[str, str]:
    """Return the kernels of a module by name, as text."""
    kind = tirx().PrimFunc
    found = module.functions_items()
    return {str(name.name_hint): f.script() for name, f in found if isinstance(f, kind)}


def device_source(executable: Any) -> str:
    """Return the CUDA source of what was compiled; empty if there is no kernel."""
    waiting = [executable.mod]
    while waiting:
        module = waiting.pop()
        if module.kind == "cuda":
            return str(module.inspect_source())
        waiting.extend(module.imports)
    return ""


def cuda_binary(source: str, compiler: str, options: dict[str, object]) -> bytes:
    """Return CUDA source compiled for an architecture, and for those that come after it.

    Args:
        source: All kernels.
        compiler: ``"nvcc"`` or ``"nvrtc"``.
        options: The target.

    Raises:
        RuntimeError: It does not compile; the compiler says why.
    """
    from tvm.support import nvcc

    number = str(options["arch"]).removeprefix("sm_")
    with target(options):
        if compiler == "nvcc":
            both = f"arch=compute_{number},code=[sm_{number},compute_{number}]"
            found = nvcc.compile_cuda(source, "fatbin", ["-gencode", both], compiler=compiler)
        else:
            found = nvcc.compile_cuda(source, "ptx", f"compute_{number}", compiler=compiler)
    return bytes(found)
