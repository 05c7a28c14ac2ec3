"""Compile a recorded launch for a GPU architecture, without such a GPU."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import create_function_from_signature

if TYPE_CHECKING:
    from linattn.kernels.common.gpu.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class OfflineKernel(NamedTuple):
    """A compiled kernel, as a device would load it."""

    architecture: str
    num_warps: int
    shared_bytes: int
    assembly: str
    """SASS, disassembled from the cubin; on AMD the assembler's input."""
    log: str
    """The log of ptxas; empty on AMD."""
    key: str
    """The same for two launches that share one binary."""


def compile_offline(launch: Launch, architecture: str) -> OfflineKernel:
    """Specialise the kernel on this launch's arguments, as a call on a device would, and compile it."""
    target, kernel = TARGETS[architecture], launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(target))
    bound, specialization, extra = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        make_backend(target), launch.options, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constants, attributes)
    if target.backend == "hip":
        binary = triton.compile(source, target=target, options=options.__dict__)
        assembly, log = binary.asm["amdgcn"], ""
    else:
        binary, log = _compile_with_log(source, target, options.__dict__)
        assembly = _disassemble(binary.asm["cubin"])
    return OfflineKernel(architecture, launch.num_warps, binary.metadata.shared, assembly, log, binary.hash)


def _compile_with_log(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    """Triton shows ptxas's log only while it compiles; it is kept in Triton's cache, beside the kernel."""
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        binary, log = _compile_captured(source, target, options)
        cache = get_cache_manager(binary.hash)
        kept = cache.get_file("ptxas.log")
        if not log and kept:
            return binary, Path(kept).read_text()
        if not log:  # compiled before, without asking for the log
            with triton.knobs.compilation.scope():
                triton.knobs.compilation.always_compile = True
                binary, log = _compile_captured(source, target, options)
    cache.put(log, "ptxas.log", binary=False)
    return binary, log


def _compile_captured(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        binary = triton.compile(source, target=target, options=options)
    return binary, output.getvalue()


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True)
    return done.stdout
