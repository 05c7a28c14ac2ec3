"""Direct tiles of polynomial similarities in Triton, on a GPU or in the interpreter, against the truth in float64."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from linattn import testing
from linattn.kernels.common.op.backend import TRITON_ABSENT
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]
if TRITON_ABSENT:
    pytest.skip(TRITON_ABSENT, allow_module_level=True)

from linattn.kernels.common.gpu import direct, similarity  # noqa: E402
from linattn.kernels.common.gpu.architecture import as_architecture  # noqa: E402
from linattn.kernels.common.gpu.direct.config import CONFIGURATIONS  # noqa: E402
from linattn.kernels.common.gpu.launch import recording  # noqa: E402


class Kind(NamedTuple):
    similarity: similarity.Similarity
    normalize: bool
    truth: Any


TAYLOR, SQUARE, ODD = (1.0, 1.0, 0.5), (1.0, 2.0, 1.0), (0.3, -0.5, -2.0)
KINDS = {
    "taylor": Kind(
        similarity.quadratic(1.3, TAYLOR, True), True, partial(testing.truth_quadratic, scale=1.3, coefficients=TAYLOR)
    ),
    "square": Kind(
        similarity.quadratic(-0.7, SQUARE, True),
        True,
        partial(testing.truth_quadratic, scale=-0.7, coefficients=SQUARE),
    ),
    "polynomial": Kind(
        similarity.quadratic(1.3, ODD, False),
        False,
        partial(testing.truth_quadratic, scale=1.3, coefficients=ODD, normalize=False),
    ),
    "linear": Kind(
        similarity.linear(0.5), False, partial(testing.truth_linear, feature_map="identity", scale=0.5, normalize=False)
    ),
    "softmax": Kind(similarity.softmax(0.9), True, partial(testing.truth_softmax, scale=0.9)),
}


class Attend(torch.autograd.Function):
    """The launcher under autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.problem = direct.DirectProblem(q, k, v, *options)
        out, sums = direct.forward(ctx.problem)
        ctx.save_for_backward(out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        out, sums = ctx.saved_tensors
        return *direct.backward(ctx.problem, dout, out, sums, ctx.needs_input_grad[:3]), None


def run(kind: Kind, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    given = (options.get("key_mask"), options.get("cu_seqlens"), options.get("is_causal", False))
    return Attend.apply(q, k, v, (*given, options.get("q_offset", 0), kind.similarity, kind.normalize))


def check(name: str, tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    kind = KINDS[name]
    testing.assert_matches_truth(partial(run, kind, **options), partial(kind.truth, **options), tensors)


def inputs(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return testing.make_inputs(**{"dtype": torch.float32, "device": DEVICE, "batch": 1} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 15, 63, 129])
@pytest.mark.parametrize("name", ["taylor", "polynomial"])
def test_lengths_and_dtypes(name: str, length: int, dtype: torch.dtype) -> None:
    is_causal = length != 63
    check(
        name, inputs(keys=length, heads=1 + 15 // length, head_size=16, value_size=24, dtype=dtype), is_causal=is_causal
    )


@pytest.mark.parametrize("name", ["square", "linear"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_with_shared_heads(layout: testing.Layout, name: str) -> None:
    tensors = inputs(batch=2, keys=40, heads=2, kv_heads=1, head_size=20, value_size=8, layout=layout)
    check(name, tensors, is_causal=True)


@pytest.mark.parametrize("q_offset", [-20, 0, 11, 50])
@pytest.mark.parametrize("name", ["taylor", "polynomial"])
def test_offsets(name: str, q_offset: int) -> None:
    check(name, inputs(queries=35, keys=50), is_causal=True, q_offset=q_offset)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["taylor", "polynomial"])
def test_padding_and_packed_sequences(name: str, is_causal: bool) -> None:
    q, k, v = inputs(keys=90, kv_heads=1)
    cu_seqlens = torch.tensor([0, 0, 33, 34, 34, 80, 90, 90], device=DEVICE).repeat_interleave(2)[::2]
    key_mask = testing.make_key_mask(1, 90).to(DEVICE)
    check(name, (q, k, v), is_causal=is_causal, key_mask=key_mask, cu_seqlens=cu_seqlens)
    hidden = ~key_mask[:, None, :, None]
    spoilt = [q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)]
    for x in spoilt:
        x[:, :, 34:80] = torch.nan
    call = partial(run, KINDS[name], is_causal=is_causal, key_mask=key_mask, cu_seqlens=cu_seqlens)
    out, gradients = testing.evaluate(call, spoilt)
    assert all(x[:, :, [*range(34), *range(80, 90)]].isfinite().all() for x in (*out, *gradients))
    assert (gradients[1].masked_select(hidden)[:40] == 0).all()


def test_many_short_sequences_find_their_tiles() -> None:
    ends = torch.randint(0, 120, (30,), generator=torch.Generator().manual_seed(0)).sort().values
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends, torch.tensor([120])]).to(DEVICE)
    check("taylor", inputs(keys=120, heads=1), is_causal=True, cu_seqlens=cu_seqlens)


ROWS = [(name, *row) for name, rows in CONFIGURATIONS.items() if name != "interpreter" for row in rows]


@pytest.mark.parametrize(("architecture", "width", "size"), ROWS)
def test_every_configuration(architecture: str, width: int, size: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    tensors = inputs(keys=137, heads=1, head_size=size, value_size=max(16, size // 2), dtype=dtype)
    with as_architecture(architecture):
        check("taylor", tensors, is_causal=True)
        q, k, v = tensors
        check("taylor", (q[:, :, -1:], k, v), is_causal=True, q_offset=136)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", ["taylor", "polynomial", "softmax"])
def test_few_queries_of_many_keys(name: str, queries: int) -> None:
    """Decoding: the keys are split; heads that share them lie in one tile."""
    q, k, v = inputs(queries=queries, keys=290, heads=2, kv_heads=1, head_size=16, value_size=24, layout="transposed")
    key_mask = testing.make_key_mask(1, 290).to(DEVICE)
    check(name, (q, k, v), is_causal=True, q_offset=287)
    check(name, (q, k, v), is_causal=True, q_offset=60, key_mask=key_mask)
    check(name, tuple(x.half() for x in (q, k, v)), key_mask=key_mask)
    meta = (x.to("meta") for x in (q, k, v))
    with recording() as launches:
        direct.forward(direct.DirectProblem(*meta, None, None, True, 0, KINDS[name].similarity, KINDS[name].normalize))
    assert [x.kernel.__name__ for x in launches] == ["decode_kernel", "merge_kernel"]


def test_a_vanishing_row_sum_keeps_its_digits() -> None:
    """(1 + s)^2 near its zero: the few keys of a row give it a tiny sum. Summing the rounded weights makes a row of one
    key that key's value exactly."""
    q, k, v = inputs(keys=4, heads=1, dtype=torch.bfloat16)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., 0] = 1.0, 1 - 21 / 256  # representable; the weight, (21 / 256)^2, is not
    kind = Kind(similarity.quadratic(-1.0, SQUARE, True), True, None)
    out = run(kind, q, k, v, is_causal=True)
    assert torch.equal(out[:, :, 0], v[:, :, 0])
    truth = testing.truth_quadratic(q, k, v, scale=-1.0, is_causal=True)
    testing.assert_close_to_truth(out, truth)


@pytest.mark.parametrize("name", ["square", "taylor"])
def test_squares_beyond_the_range_of_fp16(name: str) -> None:
    tensors = inputs(keys=40, score_std=1000.0, dtype=torch.float16)
    check(name, tensors, is_causal=True)


def test_rows_without_a_sum_are_zero_with_zero_gradient() -> None:
    """Two of three scores are -1 exactly."""
    q, k, v = inputs(keys=3, heads=1, head_size=4)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0], k[..., :2, 0] = 1.0, -1.0
    kind = Kind(similarity.quadratic(1.0, SQUARE, True), True, None)
    (out,), (dq, _, dv) = testing.evaluate(partial(run, kind, is_causal=True), (q, k, v))
    assert (out[:, :, :2] == 0).all()
    assert torch.equal(out[:, :, 2], v[:, :, 2])
    assert (dq[:, :, :2] == 0).all()
    assert (dv[:, :, :2] == 0).all()


def test_results_repeat_bit_by_bit() -> None:
    tensors = inputs(keys=50, heads=2, kv_heads=1, dtype=torch.bfloat16)
    once, again = (testing.evaluate(partial(run, KINDS["taylor"], is_causal=True), tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once[0] + once[1], again[0] + again[1], strict=True))


@pytest.mark.parametrize("queries", [1, 1000])
@pytest.mark.parametrize("name", KINDS)
def test_one_launch_forward_and_two_backward(name: str, queries: int) -> None:
    """Whatever the flags; two forward where keys are split among programs, fewer backward for fewer gradients."""
    keys, kind = max(queries, 1000), KINDS[name]
    q, k, v = (x.to("meta") for x in inputs(queries=queries, keys=keys))
    key_mask, bounds = torch.ones(1, keys, dtype=torch.bool, device="meta"), torch.zeros(4, dtype=int, device="meta")
    flags = itertools.product((False, True), (None, key_mask), (None, bounds) if queries == keys else (None,))
    for is_causal, mask, cu_seqlens in flags:
        problem = direct.DirectProblem(q, k, v, mask, cu_seqlens, is_causal, 0, kind.similarity, kind.normalize)
        with recording() as launches, as_architecture("sm_90"):
            out, sums = direct.forward(problem)
        assert len(launches) == (2 if queries == 1 else 1)
        for wanted in itertools.product((False, True), repeat=3):
            with recording() as launches, as_architecture("sm_90"):
                direct.backward(problem, out, out, sums, wanted)
            assert len(launches) == (wanted[0] or kind.normalize) + (wanted[1] or wanted[2])


def test_gradients_that_nobody_reads_are_not_computed() -> None:
    q, k, v = inputs(keys=20)
    problem = direct.DirectProblem(q, k, v, None, None, True, 0, KINDS["taylor"].similarity, True)
    out, sums = direct.forward(problem)
    whole = direct.backward(problem, out, out, sums, (True, True, True))
    for i in range(3):
        wanted = (i == 0, i == 1, i == 2)
        gradients = direct.backward(problem, out, out, sums, wanted)
        for j, (x, y) in enumerate(zip(gradients, whole, strict=True)):
            assert torch.allclose(x, y, atol=1e-6) if j == i else x.isnan().all()
