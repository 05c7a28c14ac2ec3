"""The cost model: the numbers it must give, how they grow, and that it can be called while torch traces shapes."""

from __future__ import annotations

import dataclasses
import math

import pytest

from linattn.cost import (
    attention_cost,
    crossover,
    feature_count,
    flops,
    flops_implemented,
    padded_feature_count,
    state_size,
)
from linattn.errors import ArgumentError

LINEAR = [(kernel, form) for kernel in ("quadratic", "feature_map") for form in ("chunked", "recurrent")]


def exponent(amount: dict[int, float]) -> float:
    """Slope of log(amount) over log(N) between the two sizes given."""
    (small, a), (large, b) = sorted(amount.items())
    return math.log(b / a) / math.log(large / small)


@pytest.mark.parametrize(("D", "features"), [(1, 3), (16, 153), (32, 561), (64, 2145), (128, 8385)])
def test_feature_count(D: int, features: int) -> None:
    assert feature_count(D) == features
    assert feature_count(D) == 1 + D + sum(1 for i in range(D) for j in range(i + 1))


@pytest.mark.parametrize("D", [1, 7, 8, 9, 16, 64, 100])
def test_padded_feature_count_is_the_sum_over_block_rows(D: int) -> None:
    products = sum((min(a + 8, D) - a) * min(a + 8, D) for a in range(0, D, 8))
    assert padded_feature_count(D) == 1 + D + products
    assert padded_feature_count(D) >= feature_count(D)


@pytest.mark.parametrize(
    ("D", "is_causal", "expected"),
    [(16, False, 153), (32, False, 561), (64, False, 2145), (64, True, 4290), (128, True, 16770), (16, True, 306)],
)
def test_crossover_without_duplicates(D: int, is_causal: bool, expected: float) -> None:
    assert crossover(D, is_causal=is_causal) == expected
    assert crossover(D, is_causal=is_causal, chunk=512) == expected + (512 if is_causal else 0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_textbook_crossover_is_d_squared(is_causal: bool) -> None:
    assert crossover(64, is_causal=is_causal, chunk=256, count="textbook") == 64**2
    assert crossover(64, 32, count="textbook") == 64 * 32


@pytest.mark.parametrize(("is_causal", "chunk"), [(False, 512), (True, 128), (True, 512)])
@pytest.mark.parametrize(("D", "M"), [(16, 16), (64, 64), (64, 32), (32, 96)])
def test_implemented_crossover_balances_implemented_flops(D: int, M: int, is_causal: bool, chunk: int) -> None:
    at = crossover(D, M, is_causal=is_causal, chunk=chunk, count="implemented")

    def ratio(N: int) -> float:
        sizes = {"B": 1, "H": 1, "N": N, "D": D, "M": M, "is_causal": is_causal, "chunk": chunk, "tile": chunk}
        return flops_implemented("quadratic", "direct", **sizes) / flops_implemented("quadratic", "chunked", **sizes)

    assert ratio(math.floor(at)) <= 1 <= ratio(math.ceil(at) + 1)
    assert at > crossover(D, M, is_causal=is_causal, chunk=chunk)


def test_flops_by_hand() -> None:
    sizes = {"B": 2, "H": 3, "N": 1000, "D": 64, "M": 32}
    assert flops("softmax", "direct", **sizes) == 6 * 2 * 1000 * 1000 * 96
    assert flops("quadratic", "direct", is_causal=True, **sizes) == 6 * 1000 * 1000 * 96
    assert flops("quadratic", "chunked", **sizes) == 6 * 1000 * 4 * 2145 * 33
    assert flops("quadratic", "recurrent", is_causal=True, **sizes) == 6 * 1000 * 4 * 2145 * 33
    assert flops("quadratic", "chunked", is_causal=True, chunk=100, **sizes) == 6 * 1000 * (4 * 2145 * 33 + 100 * 96)
    assert flops("feature_map", "chunked", features=128, **sizes) == 6 * 1000 * 4 * 128 * 33
    assert flops("feature_map", "chunked", **sizes) == 6 * 1000 * 4 * 64 * 33


def test_queries_and_keys_may_differ_in_number() -> None:
    sizes = {"B": 1, "H": 1, "D": 8, "M": 8}
    assert flops("softmax", "direct", N=1, keys=1000, **sizes) == 2 * 1000 * 16
    # The last two queries of five keys see 4 and 5 of them; on average over the diagonal half a key is saved.
    assert flops("softmax", "direct", N=2, keys=5, is_causal=True, **sizes) == 2 * (3 + 5) * 16
    assert flops("quadratic", "chunked", N=10, keys=30, **sizes) == 40 * 2 * 45 * 9


def test_backward_takes_five_products_for_two() -> None:
    for kernel, form in [("softmax", "direct"), ("quadratic", "chunked"), ("feature_map", "chunked")]:
        sizes = {"B": 1, "H": 1, "N": 4096, "D": 64, "M": 64, "is_causal": True}
        assert flops(kernel, form, backward=True, **sizes) == 2.5 * flops(kernel, form, **sizes)


@pytest.mark.parametrize("count", [flops, flops_implemented])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("kernel", "form"), LINEAR)
def test_linear_forms_grow_linearly(count, backward: bool, kernel: str, form: str) -> None:
    work = {N: count(kernel, form, B=1, H=1, N=N, D=64, M=64, is_causal=True, backward=backward) for N in (4096, 65536)}
    assert exponent(work) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("count", [flops, flops_implemented])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "feature_map"])
def test_direct_forms_grow_quadratically(count, is_causal: bool, kernel: str) -> None:
    work = {N: count(kernel, "direct", B=1, H=1, N=N, D=64, M=64, is_causal=is_causal) for N in (2**18, 2**22)}
    assert exponent(work) == pytest.approx(2.0, abs=1e-3)


def test_memory_grows_linearly_in_every_form() -> None:
    for form in ("direct", "chunked", "recurrent"):
        memory = {
            N: attention_cost("quadratic", form, B=1, H=1, N=N, D=64, is_causal=True, training=True).memory_bytes
            for N in (2**20, 2**24)
        }
        assert exponent(memory) == pytest.approx(1.0, abs=0.01)


def test_prefix_states_are_what_recomputing_saves() -> None:
    sizes = {"B": 2, "H": 4, "N": 10_000, "D": 32, "M": 16, "is_causal": True, "chunk": 1000, "training": True}
    saved = attention_cost("quadratic", "chunked", recompute=False, **sizes).memory_bytes
    recomputed = attention_cost("quadratic", "chunked", **sizes).memory_bytes
    assert saved - recomputed == 2 * 4 * 10 * state_size("quadratic", 32, 16) * 4
    assert attention_cost("quadratic", "direct", recompute=False, **sizes) == attention_cost(
        "quadratic", "direct", **sizes
    )


def test_state_size_is_that_of_the_canonical_state() -> None:
    D, M = 5, 3
    k_sum, kk, v_sum, kv, kkv = D, D * D, M, D * M, D * (D + 1) // 2 * M
    assert state_size("quadratic", D, M) == k_sum + kk + v_sum + kv + kkv
    assert state_size("feature_map", D, M, features=7) == 7 + 7 * M


def test_cost_sums_forward_and_backward_and_cannot_be_changed() -> None:
    sizes = {"B": 1, "H": 2, "N": 512, "D": 16, "M": 16}
    trained = attention_cost("quadratic", "chunked", training=True, **sizes)
    assert trained.flops == flops("quadratic", "chunked", **sizes) + flops(
        "quadratic", "chunked", backward=True, **sizes
    )
    assert trained.intensity == trained.flops / trained.bytes_moved
    assert trained.bytes_moved > attention_cost("quadratic", "chunked", **sizes).bytes_moved
    with pytest.raises(dataclasses.FrozenInstanceError):
        trained.flops = 0


def counted_by_torch(
    monkeypatch, form: str, *, H: int, N: int, D: int, M: int, is_causal: bool, chunk: int, tile: int, backward: bool
) -> int:
    """Flops of the matrix products in one pass of the reference path, as torch counts them."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode, bmm_flop

    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Plan
    from linattn.kernels.common.reference import tiles
    from linattn.kernels.quadratic import reference
    from linattn.kernels.quadratic.contract import Options

    monkeypatch.setattr(tiles, "TILE_ELEMENTS", H * tile * tile)
    q, k, v = (torch.randn(1, H, N, size) for size in (D, D, M))
    options = Options(is_causal, 0, 1.0, 1.0, 2.0, 1.0, True)
    plan = Plan(form, "reference", chunk)
    inputs = ForwardInputs(q, k, v, None, None, [], options, return_state=False, save=True, plan=plan)

    def baddbmm_flop(out, a, b, **_):
        return bmm_flop(a, b)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: baddbmm_flop}) as counter:
        out, row_sums, _, saved = reference.forward(inputs)
        counted = counter.get_total_flops()
        if backward:
            dout, needs_grad = torch.ones_like(out), [True] * 4
            reference.backward(
                BackwardInputs(dout, [], q, k, v, out, row_sums, saved, None, None, [], options, needs_grad, plan)
            )
            counted = counter.get_total_flops() - counted
    return counted


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["direct", "chunked"])
@pytest.mark.parametrize("D", [16, 20])
def test_implemented_flops_are_those_of_the_reference_path(
    D: int, form: str, is_causal: bool, backward: bool, monkeypatch
) -> None:
    sizes = {"H": 2, "N": 2048, "D": D, "M": 24, "is_causal": is_causal, "chunk": 64, "tile": 256, "backward": backward}
    expected = flops_implemented("quadratic", form, B=1, **sizes)
    # Products of matrices only are counted, not the making of features; the first chunk and the last fold are left out.
    assert counted_by_torch(monkeypatch, form, **sizes) == pytest.approx(expected, rel=0.06)


def multiply_adds(form: str, is_causal: bool, N: int, D: int, M: int, F: int, chunk: int) -> int:
    """Multiply-adds of one head, forward, counted query by query and key by key."""
    count = 0
    for i in range(N):
        if form == "direct":
            # A causal query sees its own key by half, so that pairs come to N^2 / 2.
            seen = i + 0.5 if is_causal else N
            count += seen * (D + M)
            continue
        # Fold this key into the state of F features, values and normaliser; read it with this query.
        count += 2 * F * (M + 1)
        if form == "chunked" and is_causal:
            # Of its own chunk a query sees half the keys on average.
            count += chunk / 2 * (D + M)
    return round(count)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("kernel", "form"), [("softmax", "direct"), ("quadratic", "direct"), ("feature_map", "direct"), *LINEAR]
)
def test_flops_are_those_counted_pair_by_pair(kernel: str, form: str, is_causal: bool) -> None:
    if form == "recurrent" and not is_causal:
        pytest.skip("the recurrent form is causal")
    D, M, chunk = 6, 4, 16
    F = sum(1 for i in range(D + 1) for j in range(i + 1)) if kernel == "quadratic" else D
    counted = {N: 2 * multiply_adds(form, is_causal, N, D, M, F, chunk) for N in (64, 256)}
    for N, count in counted.items():
        assert flops(kernel, form, B=1, H=1, N=N, D=D, M=M, is_causal=is_causal, chunk=chunk) == count
    assert exponent(counted) == pytest.approx(2.0 if form == "direct" else 1.0, abs=1e-9)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["direct", "chunked"])
def test_flops_that_torch_counts_grow_as_the_model_says(
    form: str, is_causal: bool, backward: bool, monkeypatch
) -> None:
    sizes = {"D": 8, "M": 8, "is_causal": is_causal, "chunk": 64, "backward": backward}
    counted = {N: counted_by_torch(monkeypatch, form, H=1, N=N, tile=64, **sizes) for N in (2048, 8192)}
    predicted = {N: flops("quadratic", form, B=1, H=1, N=N, **sizes) for N in counted}
    assert exponent(predicted) == pytest.approx(2.0 if form == "direct" else 1.0, abs=1e-9)
    # Whole tiles on the diagonal, and a first chunk that has no state to read, shift it by a little.
    assert exponent(counted) == pytest.approx(exponent(predicted), abs=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flops("quadratik", "direct", B=1, H=1, N=1, D=1, M=1), "'quadratic'"),
        (lambda: flops("quadratic", "chunky", B=1, H=1, N=1, D=1, M=1), "'chunked'"),
        (lambda: flops("softmax", "chunked", B=1, H=1, N=1, D=1, M=1), "has no state"),
        (lambda: flops("quadratic", "recurrent", B=1, H=1, N=1, D=1, M=1), "is_causal=True"),
        (lambda: flops_implemented("quadratic", "direct", B=1, H=1, N=1, D=0, M=1), "D=0"),
        (lambda: crossover(64, count="dedupe"), "'dedup'"),
        (lambda: attention_cost("quadratic", "chunked", B=1, H=1, N=1, D=1, chunk=0), "chunk=0"),
        (lambda: crossover(64, -1), "M=-1"),
        (lambda: state_size("softmax", 4, 4), "got form 'recurrent'"),
    ],
)
def test_errors_name_what_was_given_and_accepted(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_symbolic_length_compiles_once() -> None:
    torch = pytest.importorskip("torch")
    testing = pytest.importorskip("torch._dynamo.testing")

    def choose(x):
        sizes = {"B": 1, "H": 1, "N": x.shape[0], "D": 4, "M": 4, "is_causal": True}
        cheaper = flops("quadratic", "chunked", chunk=8, **sizes) < flops("quadratic", "direct", **sizes)
        return x + 1 if cheaper else x - 1

    counter = testing.CompileCounter()
    compiled = torch.compile(choose, backend=counter, fullgraph=True, dynamic=True)
    for N in (10, 11, 25, 100, 1000, 2000):
        assert compiled(torch.zeros(N))[0] == choose(torch.zeros(N))[0]
    # One graph for each form that was chosen, however many lengths were seen.
    assert counter.frame_count == 2
