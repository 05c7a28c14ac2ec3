"""Rounding and products, the same on a device and in Triton's interpreter."""

import torch
import triton
import triton.language as tl

from linattn.kernels.common.gpu.architecture import forced
from linattn.kernels.common.op.backend import INTERPRETED

EMULATED = tl.constexpr(INTERPRETED)
"""In the interpreter low-precision tensors arrive as fp32 (launch.py) and rounding is spelled out."""

LOW = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The constant LOW of a kernel: the dtype of its inputs, to which products are rounded before they are multiplied."""


def precision(dtype: torch.dtype) -> str:
    """The constant PRECISION of a kernel: how fp32 matrices are multiplied. Follows PyTorch's switch for TF32."""
    if dtype != torch.float32 or INTERPRETED or torch.version.hip or forced() == "gfx942":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@triton.jit
def rounded(x, LOW: tl.constexpr):
    """X to the precision of LOW."""
    if EMULATED:
        if tl.bfloat16 == LOW:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            return bits.to(tl.float32, bitcast=True)
        if tl.float16 == LOW:
            return x.to(tl.float16).to(tl.float32)
        return x
    return x.to(LOW)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Acc + a @ b, accumulated in fp32."""
    return tl.dot(a, b, acc, input_precision=PRECISION)
