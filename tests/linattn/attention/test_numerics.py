"""Where the arithmetic is hard: scores near -1, float16 overflow, cancelled sums, NaN, very long sequences."""

from __future__ import annotations

import math

import pytest
import torch

import linattn
from linattn.states import QuadraticState
from linattn.testing import (
    assert_close_to_truth,
    condition_number,
    evaluate,
    make_inputs,
    relative_error,
    row_errors,
    truth_linear,
    truth_quadratic,
)

FORMS = ("direct", "chunked", "recurrent")
EPS = torch.finfo(torch.float32).eps


def _inputs_with_scores_near_minus_one(keys: int, distance: float) -> tuple[torch.Tensor, ...]:
    q, k, v = make_inputs(keys=keys, head_size=8, value_size=5, score_std=1.0)
    u = torch.nn.functional.normalize(torch.ones(8, dtype=torch.float64), dim=0)
    q = u + distance * (q - (q @ u)[..., None] * u)
    k = -u + distance * k
    return q.float(), k.float(), v.float()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("distance", [0.3, 1e-2])
def test_near_the_zero_of_the_kernel_rows_keep_their_budget(form: str, distance: float) -> None:
    q, k, v = _inputs_with_scores_near_minus_one(40 if form == "recurrent" else 200, distance)
    kappa = condition_number(q, k, is_causal=True)
    assert kappa.median() > 10, "the inputs are not hard enough to mean anything"
    out = linattn.quadratic_attention(q, k, v, is_causal=True, form=form)
    errors = row_errors(out, truth_quadratic(q, k, v, is_causal=True), v)
    assert (errors <= 4 * EPS * kappa).all(), f"worst row: {(errors / (EPS * kappa)).max():.1f} eps kappa"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_on_plain_gaussian_data_rows_keep_their_budget(form: str, is_causal: bool) -> None:
    if form == "recurrent" and not is_causal:
        pytest.skip("this form is causal only")
    keys = 40 if form == "recurrent" else 200
    q, k, v = make_inputs(keys=keys, head_size=8, value_size=5, score_std=math.sqrt(8), dtype=torch.float32)
    kappa = condition_number(q, k, is_causal=is_causal)
    out = linattn.quadratic_attention(q, k, v, is_causal=is_causal, form=form)
    errors = row_errors(out, truth_quadratic(q, k, v, is_causal=is_causal), v)
    assert (errors <= 4 * EPS * kappa).all(), f"worst row: {(errors / (EPS * kappa)).max():.1f} eps kappa"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["the first rows", "sparse keys", "sparse keys over all"])
def test_rows_of_few_keys_are_computed_directly(form: str, case: str) -> None:
    """Squaring `1 + s` costs eps sqrt(kappa); expanding the square, as a sum over a state does, costs eps kappa.

    A mask moves the rows that have seen few keys past the first chunk.
    """
    is_causal = case != "sparse keys over all"
    if form == "recurrent" and not is_causal:
        pytest.skip("this form is causal only")
    keys = 15 if case == "the first rows" else 150 if form == "chunked" and is_causal else 60
    q, k, v = make_inputs(batch=40, heads=4, keys=keys, head_size=8, value_size=3, score_std=10.0, dtype=torch.float32)
    real = torch.arange(keys) % 30 == 3 if case != "the first rows" else torch.ones(keys, dtype=torch.bool)
    options = {"is_causal": is_causal, "key_mask": real.expand(40, keys)}
    kappa = condition_number(q, k, **options)
    out = linattn.quadratic_attention(q, k, v, form=form, **options)
    errors = row_errors(out, truth_quadratic(q, k, v, **options), v)
    seen = kappa.isfinite()
    assert kappa[seen].max() > 1e4
    worst = (errors / (EPS * kappa.sqrt()))[seen].max()
    assert worst <= 2, f"{worst:.1f} eps sqrt(kappa)"


def test_the_condition_shows_which_rows_to_distrust() -> None:
    q, k, _ = make_inputs(keys=40, positive=True)
    good = linattn.quadratic_condition(q, k, is_causal=True)
    assert (good < 1 + 1e-9).all(), "no cancellation where all products are positive"
    bad = linattn.quadratic_condition(q, -k / (q * k).sum(-1, keepdim=True) * 0.999, is_causal=True)
    assert (bad[:, :, 0] > 1e5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision_scores_whose_square_overflows(form: str, dtype: torch.dtype) -> None:
    """(1 + s)^2 exceeds float16's 65504 from |1 + s| = 256 on."""
    q, k, v = make_inputs(keys=30, head_size=16, value_size=5, positive=True, score_std=400.0, dtype=dtype)
    assert (q.double() @ k.double().mT).max() > 500
    outputs, gradients = evaluate(lambda *t: linattn.quadratic_attention(*t, is_causal=True, form=form), (q, k, v))
    assert_close_to_truth(outputs[0], truth_quadratic(q, k, v, is_causal=True))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_the_division_comes_before_the_cast(form: str) -> None:
    """The numerator leaves float16 though the quotient does not, and the result is rounded once."""
    keys = 60 if form == "recurrent" else 400
    q, k, v = make_inputs(keys=keys, head_size=16, value_size=5, positive=True, score_std=40.0, dtype=torch.float16)
    numerator = truth_quadratic(q, k, v.abs(), is_causal=True, normalize=False)
    assert numerator.max() > 65504
    out = linattn.quadratic_attention(q, k, v, is_causal=True, form=form)
    assert out.isfinite().all()
    rounded_once = truth_quadratic(q, k, v, is_causal=True).half()
    assert (out == rounded_once).double().mean() > 0.98


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_that_is_exactly_zero(form: str) -> None:
    """s = -1 on every key a row sees."""
    q, k, v = make_inputs(keys=24, head_size=1, value_size=3, dtype=torch.float32)
    q.fill_(1.0)
    k.fill_(-1.0)
    (out,), gradients = evaluate(lambda *t: linattn.quadratic_attention(*t, is_causal=True, form=form), (q, k, v))
    assert not out.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_that_rounding_makes_zero_or_less(form: str) -> None:
    """The state of keys at s = -1 sums to rounding noise of either sign; row and gradients must stay finite."""
    q, k, v = make_inputs(keys=1, head_size=3, value_size=3, batch=200, dtype=torch.float32)
    past_k = -q / (q * q).sum(-1, keepdim=True) * torch.ones(1, 1, 50, 1)
    past_v = torch.randn(200, 2, 50, 3)
    k = past_k[:, :, :1].clone()
    _, state = linattn.quadratic_attention(past_k, past_k, past_v, is_causal=True, return_state=True)
    (out,), gradients = evaluate(
        lambda *t: linattn.quadratic_attention(*t, is_causal=True, form=form, initial_state=state), (q, k, v)
    )
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)
    zero = ~out.any(dim=-1)
    assert zero.any(), "no row cancelled: the inputs do not test what they should"
    assert not gradients[0][zero].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_too_small_to_invert(form: str) -> None:
    """Where 1/l overflows, the quotient is still the average of the values."""
    q, k, v = make_inputs(batch=1, heads=1, keys=40, head_size=4, positive=True, dtype=torch.float32)
    out = linattn.quadratic_attention(q, k, v, scale=3e-20, coefficients=(0, 0, 1), is_causal=True, form=form)
    truth = truth_quadratic(q, k, v, scale=3e-20, coefficients=(0, 0, 1), is_causal=True)
    # Subnormal weights have few digits.
    assert relative_error(out, truth) < 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_negative_sum_is_zero_with_zero_gradient(form: str) -> None:
    """A user's own feature map may have negative products; the row is 0 where their sum is not positive."""
    q, k, v = make_inputs(keys=40, score_std=1.0)
    options = {"feature_map": lambda x: x, "is_causal": True}
    outputs, gradients = evaluate(lambda *t: linattn.linear_attention(*t, form=form, **options), (q, k, v))
    expected, true_gradients = evaluate(lambda *t: truth_linear(*t, **options), (q, k, v))
    dead = ~expected[0].any(dim=-1)
    assert 0.2 < dead.double().mean() < 0.8
    assert not outputs[0][dead].any()
    assert not gradients[0][dead].any()
    assert relative_error(outputs[0], expected[0]) < 1e-9
    for actual, truth in zip(gradients, true_gradients, strict=True):
        assert relative_error(actual, truth) < 1e-8


@pytest.mark.parametrize("is_causal", [True, False])
def test_nan_stays_in_its_batch_element_and_head(operation, is_causal: bool) -> None:
    if operation.causal_only and not is_causal:
        pytest.skip("this form is causal only")
    clean = make_inputs(batch=3, heads=3, keys=40, value_size=5)
    dirty = [t.clone() for t in clean]
    for t in dirty:
        t[1, 2, 7] = float("nan")
    alone = evaluate(lambda *t: operation.run(*t, is_causal=is_causal), clean)
    beside = evaluate(lambda *t: operation.run(*t, is_causal=is_causal), dirty)
    untouched = torch.ones(3, 3, dtype=torch.bool)
    untouched[1, 2] = False
    assert beside[0][0][1, 2].isnan().any(), "the NaN was swallowed"
    for a, b in zip(alone[0] + alone[1], beside[0] + beside[1], strict=True):
        assert torch.equal(a[untouched], b[untouched])


def test_nan_stays_in_its_packed_sequence(operation) -> None:
    clean = make_inputs(batch=1, keys=45, value_size=5)
    dirty = [t.clone() for t in clean]
    for t in dirty:
        t[:, :, 15] = float("nan")
    options = {"is_causal": True, "cu_seqlens": torch.tensor([0, 10, 20, 45])}
    alone = evaluate(lambda *t: operation.run(*t, **options), clean)
    beside = evaluate(lambda *t: operation.run(*t, **options), dirty)
    assert beside[0][0][:, :, 15].isnan().any(), "the NaN was swallowed"
    for a, b in zip(alone[0] + alone[1], beside[0] + beside[1], strict=True):
        assert torch.equal(a[:, :, :10], b[:, :, :10])
        assert torch.equal(a[:, :, 20:], b[:, :, 20:])


def _empty_state(size: int) -> tuple[torch.Tensor, ...]:
    shapes = [(size,), (size, size), (size,), (size, size), (size * (size + 1) // 2, size)]
    return torch.zeros(1, dtype=torch.int64), *(torch.zeros(1, 1, *shape) for shape in shapes)


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_counted_beyond_what_float32_can(form: str) -> None:
    """2^24 + 1 is not a float32: the count is an integer."""
    q, k, v = make_inputs(batch=1, heads=1, keys=1, dtype=torch.float32)
    state = QuadraticState(*(t if t.dtype == torch.int64 else t.float() for t in _empty_state(8)))
    state = state._replace(n=torch.tensor([2**24]))
    for step in range(1, 4):
        _, state = linattn.quadratic_attention(
            q, k, v, is_causal=True, initial_state=state, return_state=True, form=form
        )
        assert state.n.item() == 2**24 + step


@pytest.mark.usual_tiles
@pytest.mark.parametrize("form", ["direct", "chunked"])
@pytest.mark.parametrize("function", ["quadratic_attention", "linear_attention"])
def test_sums_over_very_many_keys_do_not_stagnate(function: str, form: str) -> None:
    """300,000 equal terms: a float32 running sum, added to one term at a time, is off by 1e-3 by then."""
    q, k, _ = make_inputs(batch=1, heads=1, queries=2, keys=1, head_size=2, dtype=torch.float32)
    k = k.abs().expand(1, 1, 300_000, 2)
    v = torch.linspace(0.5, 1.5, 300_000).view(1, 1, -1, 1)
    out = getattr(linattn, function)(q.abs(), k, v, form=form)
    assert (out - 1).abs().max() < 1e-5


@pytest.mark.usual_tiles
def test_a_causal_sum_over_many_keys_does_not_stagnate() -> None:
    q, k, v = make_inputs(batch=1, heads=1, keys=20_000, head_size=2, value_size=1, dtype=torch.float32)
    out = linattn.quadratic_attention(q, k, v, is_causal=True, form="chunked")
    s = [t.double() for t in (q, k, v)]
    phi = [
        torch.stack(
            [
                torch.ones_like(x[..., 0]),
                2**0.5 * x[..., 0],
                2**0.5 * x[..., 1],
                x[..., 0] ** 2,
                x[..., 1] ** 2,
                2**0.5 * x[..., 0] * x[..., 1],
            ],
            dim=-1,
        )
        for x in s[:2]
    ]
    top = (phi[0] * (phi[1] * s[2]).cumsum(dim=2)).sum(-1)
    bottom = (phi[0] * phi[1].cumsum(dim=2)).sum(-1)
    assert_close_to_truth(out[..., 0], top / bottom)


@pytest.mark.parametrize("form", FORMS)
def test_the_taylor_similarity_is_never_below_one_half(form: str) -> None:
    scores = torch.linspace(-3, 3, 31, dtype=torch.float64)
    q, one = scores[:, None, None, None], torch.ones(31, 1, 1, 1, dtype=torch.float64)
    options = {"coefficients": (1, 1, 0.5), "normalize": False, "is_causal": True, "form": form}
    sims = linattn.quadratic_attention(q, one, one, **options).flatten()
    assert sims.min().item() == pytest.approx(0.5, abs=1e-12) == sims[10].item(), "s = -1 is the minimum"
    assert torch.allclose(sims, 1 + scores + scores**2 / 2)


def test_why_rows_of_few_keys_are_computed_from_their_scores() -> None:
    """The experiment behind the rule of 16 keys (kernels/quadratic/README.md): the same rows read from a state."""
    draws, D = 400, 64
    q, k, v = (torch.randn(draws, 1, 20, D, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    truth = truth_quadratic(q.double(), k.double(), v.double(), is_causal=True, scale=D**-0.5)
    out = linattn.quadratic_attention(q, k, v, is_causal=True, scale=D**-0.5, form="recurrent")
    nothing, unseen = torch.zeros(draws, 1, 1, D), torch.zeros(draws, 1, dtype=torch.bool)

    def errors(rows: torch.Tensor, i: int) -> torch.Tensor:
        expected = truth[:, :, i : i + 1]
        return ((rows - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()

    read, computed = [], []
    for i in range(20):
        row = q[:, :, i : i + 1]
        _, state = linattn.quadratic_attention(row, k[:, :, : i + 1], v[:, :, : i + 1], return_state=True)
        through_state = linattn.quadratic_attention(
            row, nothing, nothing, key_mask=unseen, initial_state=state, scale=D**-0.5, form="chunked"
        )
        read.append(errors(through_state, i))
        computed.append(errors(out[:, :, i : i + 1], i))
    first_three = torch.stack(read[:3])
    assert 0.05 < (first_three > 1e-5).any(0).double().mean() < 0.3
    assert first_three.max() > 1e-2
    assert max(e.max() for e in read[15:]) < 1e-5
    assert max(e.max() for e in computed) < 1e-5
