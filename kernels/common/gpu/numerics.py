"""Rounding and products, the same on a device and in Triton's interpreter."""

import torch
import triton
import triton.language as tl

from linattn.kernels.common.gpu.architecture import forced
from linattn.kernels.common.op.backend import INTERPRETED

EMULATED = tl.constexpr(INTERPRETED)
"""In the interpreter low-precision tensors arrive as fp32 (launch.py) and rounding is spelled out."""

TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The constant IN_DTYPE of a kernel: the dtype of its inputs, to which products are rounded before they are multiplied.
"""


def precision(dtype: torch.dtype) -> str:
    """Return the constant PRECISION: how fp32 matrices are multiplied. Follows PyTorch's switch for TF32."""
    if dtype != torch.float32 or INTERPRETED or torch.version.hip or forced() == "gfx942":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round x to the precision of DTYPE."""
    if EMULATED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    elif EMULATED and tl.float16 == DTYPE:
        return x.to(tl.float16).to(tl.float32)
    elif EMULATED:
        return x
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Compute acc + a @ b, accumulated in fp32."""
    # [I, J] @ [J, K] -> [I, K]; each call states its own sides
    return tl.dot(a, b, acc, input_precision=PRECISION)
