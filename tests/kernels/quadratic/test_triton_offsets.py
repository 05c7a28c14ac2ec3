"""Tensors of more than 2^31 elements: 32-bit offsets would wrap. Of their memory only what is touched exists."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import linattn
from linattn import testing
from linattn.kernels.common.op.backend import INTERPRETED, TRITON_ABSENT

pytestmark = pytest.mark.skipif(
    bool(TRITON_ABSENT) or not INTERPRETED or sys.platform != "linux",
    reason=TRITON_ABSENT or "memory without bytes behind it serves TRITON_INTERPRET=1 alone, on Linux",
)
if not TRITON_ABSENT:
    from triton.runtime.interpreter import GridExecutor

    from linattn.kernels.common.gpu.direct import launch as direct
    from linattn.kernels.common.gpu.launch import MAX_TOKEN_STRIDE
    from linattn.kernels.feature_map.gpu import launch as feature_map
    from linattn.kernels.quadratic.gpu import launch as quadratic

ROW = MAX_TOKEN_STRIDE - 8
KEYS = 2**31 // ROW + 16
HEAD = 2**30
NO_RESERVE, NO_HUGE_PAGES = 0x4000, 15  # of Linux; the first has a name in Python from 3.13 on

OPTIONS = {"is_causal": True, "enable_gqa": True, "backend": "triton"}
CALLS: dict[str, Callable[..., Tensor]] = {
    "softmax": partial(linattn.softmax_attention, **OPTIONS),
    "quadratic direct": partial(linattn.quadratic_attention, form="direct", **OPTIONS),
    "quadratic chunked": partial(linattn.quadratic_attention, form="chunked", **OPTIONS),
    "elu+1 chunked": partial(linattn.linear_attention, form="chunked", **OPTIONS),
    "elu+1 direct": partial(linattn.linear_attention, form="direct", **OPTIONS),
    "elu+1 recurrent": partial(linattn.linear_attention, form="recurrent", **OPTIONS),
}


def far(shape: tuple[int, ...]) -> Tensor:
    """A tensor with rows and heads as far apart as they may be. It lies in the middle of its memory, so that an offset
    that has wrapped meets zeros and no other memory."""
    extent = shape[1] * HEAD + shape[2] * ROW
    memory = mmap.mmap(-1, 4 * (2**31 + extent), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    memory.madvise(NO_HUGE_PAGES)
    return torch.frombuffer(memory, dtype=torch.float32)[2**31 :].as_strided(shape, (extent, HEAD, ROW, 1))


@pytest.mark.parametrize(("queries", "keys"), [(4, KEYS), (24, KEYS), (KEYS, 24)])
@pytest.mark.parametrize("name", CALLS)
def test_rows_and_heads_far_apart(name: str, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, outputs and gradients, each beyond 2^31 elements, bit by bit as in dense memory."""
    tensors = testing.make_inputs(
        batch=1, heads=3, kv_heads=1, queries=queries, keys=keys, head_size=16, value_size=16, dtype=torch.float32
    )
    call = partial(CALLS[name], q_offset=max(keys - queries, 0))
    (dense,), gradients = testing.evaluate(call, tensors)
    # The interpreter copies the whole memory of each argument back onto itself.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    for module in (direct, feature_map, quadratic):
        monkeypatch.setattr(module, "empty_in_storage_order", lambda like, last: far((*like.shape[:3], last)))
    leaves = [far(x.shape).copy_(x).requires_grad_() for x in tensors]
    out = call(*leaves)
    assert out.stride()[1:] == (HEAD, ROW, 1)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(out, leaves, far(out.shape).copy_(upstream))
    assert torch.equal(out, dense)
    for x, expected in zip(ours, gradients, strict=True):
        assert torch.equal(x, expected)
