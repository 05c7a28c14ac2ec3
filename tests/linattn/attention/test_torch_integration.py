"""The ops as PyTorch sees them: registration, compile, export, functional transforms, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import linattn
from linattn.errors import DoubleBackwardError, LinattnError
from linattn.testing import (
    Layout,
    assert_close_to_truth,
    make_inputs,
    truth_feature_state,
    truth_quadratic,
    truth_quadratic_state,
)

pytestmark = [pytest.mark.unpoisoned, pytest.mark.usual_tiles]

CALLS: dict[str, Callable[..., Any]] = {
    "softmax": lambda q, k, v: linattn.softmax_attention(q, k, v, is_causal=True, backend="reference"),
    "softmax torch": lambda q, k, v: linattn.softmax_attention(q, k, v, is_causal=True, backend="torch"),
    "quadratic direct": lambda q, k, v: linattn.quadratic_attention(q, k, v, is_causal=True, form="direct"),
    "quadratic chunked": lambda q, k, v: linattn.quadratic_attention(q, k, v, is_causal=True, form="chunked"),
    "quadratic recurrent": lambda q, k, v: linattn.quadratic_attention(q, k, v, is_causal=True, form="recurrent"),
    "quadratic auto": lambda q, k, v: linattn.quadratic_attention(q, k, v),
    "quadratic in two calls": lambda q, k, v: _in_two_calls(linattn.quadratic_attention, q, k, v),
    "linear direct": lambda q, k, v: linattn.linear_attention(q, k, v, is_causal=True, form="direct"),
    "linear chunked": lambda q, k, v: linattn.linear_attention(q, k, v, is_causal=True, form="chunked"),
    "linear by a callable": lambda q, k, v: linattn.linear_attention(q, k, v, feature_map=torch.nn.functional.softplus),
    "linear in two calls": lambda q, k, v: _in_two_calls(linattn.linear_attention, q, k, v),
}


def _in_two_calls(function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    first, state = function(q[:, :, :9], k[:, :, :9], v[:, :, :9], is_causal=True, return_state=True)
    rest = function(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], is_causal=True, initial_state=state)
    return torch.cat([first, rest], dim=2)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- registration ----------------------------------------------------------------------------------------------------


def _masks(keys: int, case: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if case == "masked":
        return torch.arange(keys)[None] != 3, None
    if case == "packed":
        return None, torch.tensor([0, 5, 5, keys], dtype=torch.int32)
    return None, None


def _op_arguments(name: str, case: str, layout: Layout) -> tuple[Any, ...]:
    """One call of `torch.ops.linattn.<name>`; the backward's are what its forward returned."""
    operation, direction = name.rsplit("_", 1)
    q, k, v = make_inputs(
        batch=1, heads=4, kv_heads=2, keys=20, head_size=4, value_size=3, layout=layout, dtype=torch.float32
    )
    key_mask, cu_seqlens = _masks(20, case)
    if operation == "softmax":
        options = (key_mask, cu_seqlens, True, 0, 0.5, "reference")
        if direction == "fwd":
            return q, k, v, *options
        out, lse = torch.ops.linattn.softmax_fwd(q, k, v, *options)
        return torch.randn_like(out), q, k, v, out, lse, *options
    form = "chunked" if case == "packed" else "direct"
    kind = (1.0, 2.0, 1.0) if operation == "quadratic" else ("elu+1",)
    state: list[torch.Tensor] = []
    if case == "stateful":
        collect = truth_quadratic_state if operation == "quadratic" else truth_feature_state
        state = [t.float() if t.is_floating_point() else t for t in collect(k, v)]
    options = (True, 0, 0.5, *kind, True)
    forward = (q, k, v, key_mask, cu_seqlens, state, *options, case == "stateful", True, form, 0, "reference")
    if direction == "fwd":
        return forward
    out, row_sums, final, saved = getattr(torch.ops.linattn, f"{operation}_fwd")(*forward)
    upstream = [torch.randn_like(t) for t in final[1:]]
    return (
        torch.randn_like(out),
        upstream,
        q,
        k,
        v,
        out,
        row_sums,
        saved,
        key_mask,
        cu_seqlens,
        state,
        *options,
        [True] * 4,
        form,
        0,
        "reference",
    )


def _registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("linattn::") for name in names if name.startswith("linattn::"))


OPS = ("feature_map_bwd", "feature_map_fwd", "quadratic_bwd", "quadratic_fwd", "softmax_bwd", "softmax_fwd")


def test_every_registered_op_of_attention_is_checked_here() -> None:
    for call in CALLS.values():
        call(*make_inputs(keys=12))
    # Those of recurrent layers are checked beside their kernels.
    assert tuple(name for name in _registered() if not name.startswith("recurrent_")) == OPS


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused", "strided"])
@pytest.mark.parametrize("case", ["plain", "masked", "packed", "stateful"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, case: str, layout: Layout) -> None:
    if case == "stateful" and name.startswith("softmax"):
        pytest.skip("softmax has no state")
    if case != "plain" and layout in ("fused", "contiguous"):
        pytest.skip("layouts are covered by the plain case")
    CALLS["softmax"](*make_inputs(keys=2))
    arguments = _op_arguments(name, case, layout)
    torch.library.opcheck(
        getattr(torch.ops.linattn, name),
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("form", ["direct", "chunked", "recurrent"])
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
def test_any_chunk_size_gives_the_same(form: str, chunk_size: int) -> None:
    q, k, v = make_inputs(batch=1, keys=41, head_size=4, value_size=3)
    linattn.quadratic_attention(q, k, v)
    options = (True, 0, 1.0, 1.0, 2.0, 1.0, True)
    out, row_sums, state, saved = torch.ops.linattn.quadratic_fwd(
        q, k, v, None, None, [], *options, True, True, form, chunk_size, "reference"
    )
    assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True))
    for actual, expected in zip(state[1:], truth_quadratic_state(k, v)[1:], strict=True):
        assert_close_to_truth(actual, expected)
    upstream = torch.randn_like(out)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(truth_quadratic(*leaves, is_causal=True), leaves, upstream)
    zeros = [torch.zeros_like(t) for t in state[1:]]
    *actual, initial = torch.ops.linattn.quadratic_bwd(
        *(upstream, zeros, q, k, v, out, row_sums, saved, None, None, []),
        *(*options, [True] * 4, form, chunk_size, "reference"),
    )
    assert initial == []
    for a, e in zip(actual, expected, strict=True):
        assert_close_to_truth(a, e, gradient=True)


# ---- compile and export ----------------------------------------------------------------------------------------------


def _gradients(call: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused"])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_in_one_graph_forward_and_backward(name: str, layout: Layout) -> None:
    if layout != "fused" and name not in ("softmax", "quadratic chunked", "linear direct"):
        pytest.skip("one of each operation covers the layouts")
    tensors = make_inputs(batch=1, keys=20, layout=layout, dtype=torch.float32)
    compiled = torch.compile(CALLS[name], backend="aot_eager", fullgraph=True)
    for actual, expected in zip(_gradients(compiled, tensors), _gradients(CALLS[name], tensors), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    """Neighbouring code is fused around the op; a fused projection gives it strided views."""
    weight = torch.randn(16, 3 * 16) / 4

    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (x @ weight).chunk(3, dim=-1))
        y = linattn.quadratic_attention(q / 3, k, v, is_causal=True, form="chunked")
        return torch.nn.functional.silu(y.transpose(1, 2).flatten(2)) + x

    tensors = (torch.randn(2, 20, 16), weight)
    compiled = torch.compile(block, fullgraph=True)
    for actual, expected in zip(_gradients(compiled, tensors), _gradients(block, tensors), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "quadratic direct", "quadratic chunked", "linear chunked"])
def test_one_compilation_serves_every_length(name: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True, dynamic=True)
    for keys in (20, 33, 47, 150, 301):
        tensors = make_inputs(batch=1, keys=keys, dtype=torch.float32)
        assert torch.allclose(compiled(*tensors), CALLS[name](*tensors), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_auto_compiles_at_most_once_a_form() -> None:
    counter = CompileCounter()
    call = lambda q, k, v: linattn.quadratic_attention(q, k, v, is_causal=True)  # noqa: E731
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for keys in (20, 33, 47, 150, 2000, 2500, 3001):
        tensors = make_inputs(batch=1, heads=1, keys=keys, head_size=8, dtype=torch.float32)
        assert torch.allclose(compiled(*tensors), call(*tensors), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_compiles_under_use_backend() -> None:
    tensors = make_inputs(batch=1, keys=20, dtype=torch.float32)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with linattn.use_backend("reference"):
            return linattn.softmax_attention(q, k, v, is_causal=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), CALLS["softmax"](*tensors))


@pytest.mark.parametrize("name", ["softmax", "quadratic direct", "quadratic chunked", "linear chunked"])
def test_exports(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return CALLS[name](q, k, v)

    keys = torch.export.Dim("keys", min=16, max=512)
    shapes = {name: {2: keys} for name in "qkv"}
    program = torch.export.export(Module(), make_inputs(batch=1, keys=20), dynamic_shapes=shapes)
    assert any("linattn" in str(node.target) for node in program.graph.nodes)
    longer = make_inputs(batch=1, keys=77)
    assert torch.equal(program.module()(*longer), CALLS[name](*longer))


# ---- transforms and second derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if "callable" not in name])
def test_functional_gradient(name: str) -> None:
    tensors = make_inputs(batch=1, keys=20)
    gradients = torch.func.grad(lambda *t: CALLS[name](*t).square().sum(), argnums=(0, 1, 2))(*tensors)
    for actual, expected in zip(gradients, _gradients(CALLS[name], tensors)[1:], strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_right_or_refused(name: str) -> None:
    q, k, v = (t.requires_grad_() for t in make_inputs(batch=1, heads=1, keys=12, head_size=3))

    def gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(CALLS[name](q, k, v).square().sum(), q, create_graph=True)[0]

    first = gradient(q, k, v)
    try:
        second = torch.autograd.grad(first.square().sum(), k)[0]
    except DoubleBackwardError:
        return
    except RuntimeError as error:
        # PyTorch's own attention says in its own words that it has none.
        if name == "softmax torch" and "not implemented" in str(error):
            return
        raise
    step = 1e-6 * torch.randn_like(k)
    ahead, behind = (gradient(q, k.detach() + sign * step, v).square().sum() for sign in (1, -1))
    assert ((ahead - behind) / 2).item() == pytest.approx((second * step).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_forward_mode_derivative_is_right_or_refused(name: str, needs_gradient: bool) -> None:
    """Never silently zero."""
    q, k, v = (t.requires_grad_(needs_gradient) for t in make_inputs(batch=1, heads=1, keys=12, head_size=3))
    direction = torch.randn_like(k)
    try:
        _, tangent = torch.func.jvp(lambda k: CALLS[name](q, k, v), (k,), (direction,))
    except RuntimeError as error:
        if isinstance(error, LinattnError) or "jvp" in str(error) or "forward" in str(error).lower():
            return
        raise
    ahead, behind = (CALLS[name](q, k + sign * 1e-6 * direction, v) for sign in (1, -1))
    assert torch.allclose(tangent, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-8)


def test_asking_to_keep_the_graph_is_harmless() -> None:
    """`create_graph=True` alone asks for no second derivative."""
    leaves = [t.requires_grad_() for t in make_inputs(keys=20)]
    plain = torch.autograd.grad(linattn.quadratic_attention(*leaves).sum(), leaves)
    kept = torch.autograd.grad(linattn.quadratic_attention(*leaves).sum(), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.parametrize("name", ["softmax", "quadratic direct", "linear chunked"])
def test_checkpointing_recomputes_the_same(name: str) -> None:
    tensors = make_inputs(batch=1, keys=20)
    again = lambda *t: torch.utils.checkpoint.checkpoint(CALLS[name], *t, use_reentrant=False)  # noqa: E731
    for actual, expected in zip(_gradients(again, tensors), _gradients(CALLS[name], tensors), strict=True):
        assert torch.equal(actual, expected)


def test_inference_mode() -> None:
    tensors = make_inputs(batch=1, keys=20)
    for call in CALLS.values():
        with torch.inference_mode():
            inside = call(*tensors)
        assert torch.equal(inside, call(*tensors))


def test_an_input_that_needs_no_gradient_saves_nothing_for_backward() -> None:
    out = linattn.quadratic_attention(*make_inputs(keys=20))
    assert not out.requires_grad
    assert out.grad_fn is None
