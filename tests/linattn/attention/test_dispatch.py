"""Which path a call takes, and that it can be asked for and forced."""

from __future__ import annotations

import threading

import pytest
import torch

import linattn
from linattn.errors import BackendError
from linattn.testing import assert_close_to_truth, make_inputs, truth_quadratic, truth_softmax


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "taylor", "elu+1", "relu", "relu2", "exp"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_explain_says_what_and_why(kernel: str, is_causal: bool) -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    told = linattn.explain(q, k, v, kernel=kernel, is_causal=is_causal)
    assert told.backend in ("native", "reference", "torch")
    assert told.form
    assert told.reason
    assert told.backend in str(told)
    assert told.form in str(told)


def test_short_sequences_go_direct_and_long_ones_by_chunks() -> None:
    """The cost model's promise: the linear form pays from about N = D^2 on."""
    short = make_inputs(batch=1, keys=64, head_size=64, dtype=torch.float32)
    long = make_inputs(batch=1, keys=8192, head_size=16, dtype=torch.float32)
    for is_causal in (False, True):
        assert linattn.explain(*short, kernel="quadratic", is_causal=is_causal).form == "direct"
        assert linattn.explain(*long, kernel="quadratic", is_causal=is_causal).form == "chunked"


@pytest.mark.parametrize("keys", [40, 2500])
def test_auto_runs_what_explain_promised(keys: int) -> None:
    q, k, v = make_inputs(batch=1, keys=keys, head_size=8, dtype=torch.float32)
    form = linattn.explain(q, k, v, kernel="quadratic", is_causal=True).form
    auto = linattn.quadratic_attention(q, k, v, is_causal=True)
    assert torch.equal(auto, linattn.quadratic_attention(q, k, v, is_causal=True, form=form))


def test_explain_honours_the_options_given() -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    assert linattn.explain(q, k, v, kernel="quadratic", is_causal=True, form="recurrent").form == "recurrent"
    assert linattn.explain(q, k, v, kernel="softmax", backend="reference").backend == "reference"


def test_explain_names_what_was_refused() -> None:
    """A padding mask on a causal call is beyond some paths; whatever is refused carries its reason."""
    q, k, v = make_inputs(dtype=torch.float32)
    told = linattn.explain(q, k, v, kernel="softmax", backend="reference")
    for refusal in told.refused:
        assert str(refusal)
    assert told.cost is not None


def test_explain_computes_nothing() -> None:
    q, k, v = (t.to("meta") for t in make_inputs(keys=100))
    large = [t[:, :1, :1].expand(1, 8, 2**20, 8) for t in (q[:1], k[:1], v[:1])]
    assert linattn.explain(*large, kernel="quadratic", is_causal=True).form == "chunked"


def test_use_backend_forces_and_restores() -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    usual = linattn.explain(q, k, v, kernel="softmax").backend
    with linattn.use_backend("reference"):
        assert linattn.explain(q, k, v, kernel="softmax").backend == "reference"
        with linattn.use_backend("auto"):
            assert linattn.explain(q, k, v, kernel="softmax").backend == usual
        assert linattn.explain(q, k, v, kernel="softmax").backend == "reference"
        inside = linattn.softmax_attention(q, k, v)
    assert torch.equal(inside, linattn.softmax_attention(q, k, v, backend="reference"))
    with pytest.raises(ZeroDivisionError), linattn.use_backend("reference"):
        raise ZeroDivisionError
    assert linattn.explain(q, k, v, kernel="softmax").backend == usual


def test_an_argument_wins_over_use_backend() -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    with linattn.use_backend("reference"):
        assert linattn.explain(q, k, v, kernel="softmax", backend="torch").backend == "torch"


def test_use_backend_belongs_to_its_thread() -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    usual = linattn.explain(q, k, v, kernel="softmax").backend
    assert usual != "reference", "the test needs a default that differs"
    seen: list[str] = []
    with linattn.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(linattn.explain(q, k, v, kernel="softmax").backend))
        thread.start()
        thread.join()
    assert seen == [usual]


def test_a_named_backend_never_falls_back() -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    with pytest.raises(BackendError, match="torch"):
        linattn.quadratic_attention(q, k, v, backend="torch")
    with pytest.raises(BackendError):
        linattn.explain(q, k, v, kernel="quadratic", backend="torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_size", "value_size"), [(1, 1), (3, 130), (200, 2)])
def test_auto_always_ends_at_a_correct_path(dtype: torch.dtype, head_size: int, value_size: int) -> None:
    q, k, v = make_inputs(
        batch=1,
        heads=2,
        kv_heads=1,
        queries=9,
        keys=40,
        head_size=head_size,
        value_size=value_size,
        dtype=dtype,
        layout="strided",
        positive=True,
    )
    mask = torch.arange(40)[None] != 20
    options = {"is_causal": True, "q_offset": 31, "key_mask": mask}
    out = linattn.softmax_attention(q, k, v, enable_gqa=True, **options)
    assert_close_to_truth(out, truth_softmax(q, k, v, **options))
    out = linattn.quadratic_attention(q, k, v, enable_gqa=True, **options)
    # A weighted mean of values of both signs may come out small; weights rounded to bf16 err by the size of its terms.
    size = float(truth_quadratic(q, k, v.abs(), **options).norm())
    assert_close_to_truth(out, truth_quadratic(q, k, v, **options), floor=size)


def test_without_the_native_module_auto_computes_elsewhere_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linattn.kernels.common.op.backend.NATIVE_ABSENT", "the native module is not built")
    q, k, v = make_inputs(dtype=torch.float32)
    for kernel in ("quadratic", "elu+1"):
        told = linattn.explain(q, k, v, kernel=kernel)
        assert told.backend == "reference"
        assert "not built" in told.refused["native"]
        assert "not built" in str(told)
    with pytest.raises(BackendError, match="not built"):
        linattn.quadratic_attention(q, k, v, backend="native")
    assert_close_to_truth(linattn.quadratic_attention(q, k, v), truth_quadratic(q, k, v))
