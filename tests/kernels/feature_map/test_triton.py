"""Triton's feature-map attention against the definition in float64. Without a GPU: TRITON_INTERPRET=1 pytest ..."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import linattn
from linattn.kernels.common.op.backend import TRITON_ABSENT
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Plan
from linattn.kernels.feature_map.contract import Options, state_shapes
from linattn.testing import (
    LAYOUTS,
    TRUE_FEATURE_MAPS,
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    make_key_mask,
    poisoned_memory,
    relative_error,
    truth_feature_state,
    truth_linear,
)
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = NEEDS_TRITON
if not TRITON_ABSENT:
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.common.gpu.launch import recording
    from linattn.kernels.feature_map.gpu import launch
    from linattn.kernels.feature_map.gpu.config import BYTES_32BIT, CONFIGURATIONS, configuration, splits_for

# Over tiles of 16: several chunks with a ragged end, slices of features and values with ragged ends, grouped queries.
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "keys": 37, "head_size": 18, "value_size": 24, "score_std": 1.0}
PACKED = torch.tensor([0, 0, 5, 22, 22, 37], dtype=torch.int32).repeat_interleave(2)[::2]


def inputs(**changes) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs(**{**SMALL, "dtype": torch.float32, "device": DEVICE, **changes})


def attend(q: Tensor, k: Tensor, v: Tensor, *, form: str = "chunked", **options):
    on_device = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    return linattn.linear_attention(q, k, v, form=form, backend="triton", enable_gqa=True, **on_device)


def check(tensors: tuple[Tensor, Tensor, Tensor], *, form: str = "chunked", **options) -> None:
    on_device = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    assert_matches_truth(
        lambda q, k, v: attend(q, k, v, form=form, **options),
        lambda q, k, v: truth_linear(q, k, v, **on_device),
        tensors,
    )


# ---- one call against the definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "is_causal"),
    [("chunked", True), ("chunked", False), ("direct", True), ("direct", False), ("recurrent", True)],
)
def test_forms(form, is_causal):
    check(inputs(), form=form, is_causal=is_causal, scale=0.7)


@pytest.mark.parametrize("feature_map", ["relu", "relu2", "exp", "identity"])
def test_maps(feature_map):
    check(inputs(), feature_map=feature_map, normalize=feature_map != "identity", scale=0.5, is_causal=True)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("dtype", "feature_map"), [(torch.bfloat16, "relu"), (torch.float16, "elu+1")])
def test_low_precision(dtype, feature_map, is_causal):
    """Not elu+1 in bf16: its features lie around 1, and in dq their common part cancels (next test)."""
    check(inputs(dtype=dtype, keys=70), feature_map=feature_map, is_causal=is_causal)


def gradients_of_rounded_factors(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv of elu+1 for one key head, in float64 but for out and the factors of products: those are rounded to
    bf16, as any kernel must that feeds a matrix unit."""

    def low(x: Tensor) -> Tensor:
        return x.bfloat16().double()

    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    phi, slope = TRUE_FEATURE_MAPS["elu+1"], lambda x: torch.where(x > 0, 1.0, x.exp())
    fq, fk = low(phi(q)), low(phi(k))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.float64, device=q.device)
    seen = seen.tril() if is_causal else seen
    p = low(fq @ fk.mT * seen)
    row_sums = p.sum(-1, keepdim=True)
    out, do = low(p @ v / row_sums), low(dout / row_sums)
    dA = low((do @ v.mT - (do * out).sum(-1, keepdim=True)) * seen)
    dk, dv = ((x.mT @ y).sum(1, keepdim=True) for x, y in ((dA, fq), (p, do)))
    return dA @ fk * slope(q), dk * slope(k), dv


@pytest.mark.parametrize("is_causal", [True, False])
def test_bf16_gradients_of_elu(is_causal):
    """At most twice the error of the same numbers rounded elsewhere, and the rounding of the result."""
    tensors = inputs(dtype=torch.bfloat16, keys=70)
    dout = torch.randn(1, 2, 70, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)

    def pulled_back(function, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves), leaves, dout.to(dtype))

    gradients = pulled_back(lambda *x: attend(*x, is_causal=is_causal), torch.bfloat16)
    truth = pulled_back(lambda *x: truth_linear(*x, is_causal=is_causal), torch.float64)
    emulated = gradients_of_rounded_factors(*tensors, dout, is_causal)
    for name, actual, true, low in zip("qkv", gradients, truth, emulated, strict=True):
        error, emulated_error = relative_error(actual, true), relative_error(low, true)
        assert emulated_error < 0.03, f"the emulation of d{name} is itself off: {emulated_error:.2e}"
        allowed = 2 * emulated_error + torch.finfo(torch.bfloat16).eps / 2
        assert error <= allowed, f"gradient of {name}: {error:.2e} exceeds {allowed:.2e}"


@pytest.mark.parametrize("feature_map", ["relu", "identity"])
def test_direct_in_low_precision(feature_map):
    normalize = feature_map != "identity"
    check(inputs(dtype=torch.bfloat16), form="direct", feature_map=feature_map, normalize=normalize, is_causal=True)


@pytest.mark.parametrize("is_causal", [True, False])
def test_long_sequences_are_split(is_causal):
    config = configuration("interpreter", torch.float32, 16, 16)
    assert splits_for(config, programs=1, chunks=260 // config.output.BLOCK_T) > 1
    check(inputs(heads=1, keys=260, head_size=16, value_size=16), is_causal=is_causal)


@pytest.mark.parametrize(("queries", "keys", "q_offset"), [(20, 45, 25), (45, 20, -9), (18, 33, -40), (7, 20, 60)])
def test_offsets(queries, keys, q_offset):
    check(inputs(queries=queries, keys=keys, head_size=8, value_size=8), is_causal=True, q_offset=q_offset)


def test_recurrent_offset():
    check(inputs(queries=6, keys=9, kv_heads=2), form="recurrent", is_causal=True, q_offset=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    q, k, v = inputs(layout=layout, batch=2, keys=19, head_size=8, value_size=8)
    check((q, k, v), is_causal=True)
    out = attend(q, k, v, is_causal=True)
    assert out.transpose(1, 2).is_contiguous() == (layout in ("transposed", "fused"))


@pytest.mark.parametrize(
    ("head_size", "value_size", "keys"), [(1, 1, 1), (3, 40, 2), (40, 5, 15), (16, 16, 16), (130, 2, 3), (2, 70, 3)]
)
def test_sizes(head_size, value_size, keys):
    check(inputs(head_size=head_size, value_size=value_size, keys=keys, heads=1), is_causal=True)


@pytest.mark.parametrize("form", ["chunked", "direct", "recurrent"])
def test_masked_keys_may_hold_nan(form):
    q, k, v = inputs(batch=2, keys=21)
    mask = make_key_mask(2, 21).to(DEVICE)
    check((q, k, v), form=form, key_mask=mask, is_causal=True)
    clean, gradients = evaluate(lambda *x: attend(*x, form=form, key_mask=mask, is_causal=True), (q, k, v))
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    dirty, dirty_gradients = evaluate(lambda *x: attend(*x, form=form, key_mask=mask, is_causal=True), (q, k, v))
    for before, after in zip(clean + gradients, dirty + dirty_gradients, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("q_offset", [None, 3, -4])
def test_packed_sequences(q_offset):
    check(inputs(), cu_seqlens=PACKED, is_causal=True, q_offset=q_offset)


@pytest.mark.parametrize("form", ["chunked", "direct"])
def test_packed_sequences_not_causal(form):
    check(inputs(), form=form, cu_seqlens=PACKED)


def test_packed_sequences_are_apart():
    q, k, v = inputs()
    before = attend(q, k, v, cu_seqlens=PACKED, is_causal=True)
    for x in (q, k, v):
        x[:, :, 5:22] = torch.nan
    after = attend(q, k, v, cu_seqlens=PACKED, is_causal=True)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert torch.equal(before[:, :, 22:], after[:, :, 22:])


def test_rows_without_a_shared_feature_are_zero():
    q, k, v = inputs(positive=True)
    q[:, :, 3] = -1
    k[:, :, :20] = -1
    check((q, k, v), feature_map="relu", is_causal=True)
    out = attend(q, k, v, feature_map="relu", is_causal=True)
    assert not out[:, :, :20].any()


# ---- states ----------------------------------------------------------------------------------------------------------


def drawn_state(sequences: int, heads: int, D: int, M: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    past = make_inputs(
        batch=sequences, heads=heads, keys=11, head_size=D, value_size=M, score_std=1.0, seed=5, device=DEVICE
    )[1:]
    n, *sums = truth_feature_state(*past)
    return n.to(DEVICE), *(x.to(dtype) for x in sums)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("chunked", {"is_causal": True}),
        ("chunked", {}),
        ("chunked", {"is_causal": True, "cu_seqlens": PACKED}),
        ("direct", {"is_causal": True, "q_offset": -3}),
        ("recurrent", {"is_causal": True, "cu_seqlens": PACKED}),
    ],
)
def test_states_and_their_gradients(form, options):
    """Against the reference in float64, which tests/linattn/attention holds to the definition."""
    tensors = inputs()
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    sequences = len(PACKED) - 1 if "cu_seqlens" in options else 1
    n, *sums = drawn_state(sequences, 1, 18, 24, torch.float32)

    def run(backend: str):
        def function(q, k, v, f_sum, fv):
            state = linattn.FeatureMapState(n, f_sum, fv)
            out, after = linattn.linear_attention(
                q, k, v, initial_state=state, return_state=True, enable_gqa=True, backend=backend, form=form, **options
            )
            counts.append(after.n)
            return out, after.f_sum, after.fv

        return function

    counts: list[Tensor] = []
    names = ("q", "k", "v", "f_sum", "fv")
    assert_matches_truth(run("triton"), run("reference"), (*tensors, *sums), names=names)
    assert torch.equal(*counts)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_state_in_pieces(form):
    q, k, v = inputs()
    mask = make_key_mask(1, 37)
    whole, after = attend(q, k, v, form=form, is_causal=True, key_mask=mask, return_state=True)
    state, outs = None, []
    for a, b in itertools.pairwise((0, 7, 8, 30, 37)):
        piece = (x[:, :, a:b] for x in (q, k, v))
        out, state = attend(
            *piece, form=form, is_causal=True, key_mask=mask[:, a:b], initial_state=state, return_state=True
        )
        outs.append(out)
    assert_close_to_truth(torch.cat(outs, dim=2), whole)
    assert torch.equal(state.n, after.n)
    assert_close_to_truth(state.f_sum, after.f_sum)
    assert_close_to_truth(state.fv, after.fv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_step(dtype):
    q, k, v = inputs(batch=3, heads=4, kv_heads=2, keys=1, dtype=dtype)
    before = linattn.FeatureMapState(*drawn_state(3, 2, 18, 24, torch.float32))
    out, after = attend(q, k, v, is_causal=True, initial_state=before, return_state=True, form="auto")
    true_out, true_after = linattn.linear_attention(
        q.double(),
        k.double(),
        v.double(),
        is_causal=True,
        enable_gqa=True,
        backend="reference",
        return_state=True,
        initial_state=linattn.FeatureMapState(before.n, before.f_sum.double(), before.fv.double()),
    )
    assert_close_to_truth(out, true_out)
    assert torch.equal(after.n, true_after.n)
    assert_close_to_truth(after.f_sum, true_after.f_sum)
    assert_close_to_truth(after.fv, true_after.fv)


# ---- what must not change, and what must not matter ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["chunked", "direct"])
def test_later_keys_do_not_reach_earlier_rows(form):
    q, k, v = inputs()
    before = attend(q, k, v, form=form, is_causal=True)
    k[:, :, 21:], v[:, :, 21:] = 5.0, -3.0
    after = attend(q, k, v, form=form, is_causal=True)
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


def test_repeats_bit_by_bit_on_poisoned_memory():
    """Everything that a kernel reads has been written: memory starts as NaN the second time."""
    q, k, v = inputs(queries=20, keys=29)
    first = evaluate(lambda *x: attend(*x, is_causal=True, q_offset=-5), (q, k, v))
    with poisoned_memory():
        second = evaluate(lambda *x: attend(*x, is_causal=True, q_offset=-5), (q, k, v))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_wanted(wanted):
    q, k, v = inputs(keys=20)
    _, every = evaluate(lambda *x: attend(*x, is_causal=True), (q, k, v))
    some = [x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=True)]
    out = attend(*some, is_causal=True)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(upstream)
    for x, gradient, want in zip(some, every, wanted, strict=True):
        assert torch.equal(x.grad, gradient) if want else x.grad is None


# ---- configurations --------------------------------------------------------------------------------------------------


def entries():
    """Every entry of the table, once: by architecture, dtype and a head size that leads to it."""
    seen = set()
    for (architecture, width), sizes in CONFIGURATIONS.items() if not TRITON_ABSENT else ():
        for size, config in sizes.items():
            if config not in seen:
                seen.add(config)
                yield pytest.param(architecture, width, size, id=f"{architecture}-{8 * width}bit-{size}")


@pytest.mark.parametrize(("architecture", "width", "size"), entries())
def test_every_configuration(architecture, width, size):
    dtype = torch.float32 if width == BYTES_32BIT else torch.bfloat16
    with as_architecture(architecture):
        chunk = configuration(architecture, dtype, size, 1).output.BLOCK_T
        tensors = inputs(heads=1, keys=chunk + 5, head_size=size - 8, value_size=12, dtype=dtype)
        check(tensors, feature_map="relu", is_causal=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("form", ["chunked", "direct", "recurrent"])
def test_number_of_launches(form, is_causal, with_state, packed, masked):
    """Two forward and three backward at most, with nothing but shapes to go by."""
    q, k, v = (x.to("meta") for x in inputs(keys=4096, heads=8, kv_heads=8))
    state, needs_grad = [], [True, True, True, with_state]
    if with_state:
        sequences = len(PACKED) - 1 if packed else 1
        state = [torch.empty(shape, device="meta") for shape in state_shapes(sequences, 8, 18, 24)]
    masks = (torch.ones(1, 4096, dtype=bool, device="meta") if masked else None, PACKED.to("meta") if packed else None)
    options, plan = Options(is_causal, 0, 1.0, "elu+1", True), Plan(form, "triton")
    with recording() as forward, as_architecture("sm_90"):
        out, row_sums, after, _ = launch.forward(ForwardInputs(q, k, v, *masks, state, options, with_state, True, plan))
    with recording() as backward, as_architecture("sm_90"):
        tensors = (torch.empty_like(out), after[1:], q, k, v, out, row_sums, [])
        launch.backward(BackwardInputs(*tensors, *masks, state, options, needs_grad, plan))
    assert 1 <= len(forward) <= 2
    assert 1 <= len(backward) <= 3


def test_explain_names_the_kernels():
    q, k, v = inputs(keys=300)
    explained = linattn.explain(q, k, v, kernel="elu+1", is_causal=True, backend="triton", enable_gqa=True)
    assert "chunk_state_kernel, chunk_output_kernel: chunks of" in explained.runs


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": torch.float64}, "float64"), ({"head_size": 257}, "head sizes beyond 256")],
)
def test_refused(change, message):
    with pytest.raises(linattn.errors.BackendError, match=message):
        attend(*inputs(keys=3, **change))


def test_bad_bounds_are_named():
    if DEVICE == "cuda":
        pytest.skip("asserted asynchronously on a GPU, which ends the process")
    with pytest.raises(linattn.errors.ArgumentError, match="must start at 0 and end at T=37"):
        attend(*inputs(), cu_seqlens=torch.tensor([0, 36]))
