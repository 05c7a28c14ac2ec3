"""`linattn fuzz`: random calls on a backend, held against the truth in float64. Each call is a seed, so that it can be
repeated; the line that repeats it is printed with every failure.

Outputs, states and gradients are compared by norm within `testing.BUDGETS`. What cancellation alone takes is allowed
for: a norm counts as no smaller than that of the same sum with random signs, and an output is besides compared place
by place with 4 eps times the sum of its terms' absolute values. Rows whose kappa passes KAPPA_LIMIT (section "numerics"
of `quadratic_condition`) are judged place by place alone and get no upstream gradient.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linattn._util.environment import pick_device
from linattn._util.progress import progress
from linattn.errors import BackendError
from linattn.kernels.common.op.allocation import empty_in_storage_order
from linattn.testing import BUDGETS, TRUE_FEATURE_MAPS, poisoned_memory, truth_feature_state, visible_keys
from linattn.testing.random_calls import (
    CALLABLE,
    EXTENTS,
    OPS,
    Arguments,
    RandomCall,
    draw,
    make_arguments,
    perform,
    state_of,
    truth,
)

if TYPE_CHECKING:
    import argparse

KAPPA_LIMIT = 32.0
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"reference": (torch.float64, *FUSED_DTYPES)}
STATE_FIELDS = {"quadratic": ("n", "k_sum", "kk", "v_sum", "kv", "kkv"), "feature_map": ("n", "f_sum", "fv")}

Runner = Callable[[RandomCall, str, Arguments, dict[str, Tensor]], list[Tensor]]


class Verdict(NamedTuple):
    """The outcome of a call: one of `refused` and `wrong` is not empty if it did not pass."""

    refused: str = ""
    wrong: tuple[str, ...] = ()


def judge(call: RandomCall, backend: str, device: torch.device | str = "cpu", runner: Runner = perform) -> Verdict:
    """Run a call on a backend and compare everything it returns. `runner` stands in for the public functions."""
    arguments = make_arguments(call, device)
    before = {name: x.clone() for name, x in arguments.tensors.items()}
    noise = Noise(call, arguments)
    try:
        with poisoned_memory():
            results, gradients = _differentiated(call, backend, arguments, noise.steady_rows, runner)
            if call.twice:
                again = _differentiated(call, backend, arguments, noise.steady_rows, runner)
    except BackendError as refusal:
        return Verdict(refused=str(refusal))
    except Exception as error:  # whatever a kernel raises is a finding, and the other seeds still have to run
        return Verdict(wrong=(f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",))
    wrong = list(noise.complaints(results, gradients))
    for name, x in arguments.tensors.items():
        if not torch.equal(x.nan_to_num(), before[name].nan_to_num()):
            wrong.append(f"{name} was written to")
    if call.twice:
        pairs = zip([*results, *gradients.values()], [*again[0], *again[1].values()], strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            wrong.append("a second run gave other bits")
    return Verdict(wrong=tuple(wrong))


def _differentiated(
    call: RandomCall, backend: str, arguments: Arguments, steady_rows: Tensor, runner: Runner
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return results, and the requested gradients by name, under upstream gradients drawn from the call's seed."""
    leaves = {name: x.detach() for name, x in arguments.tensors.items()}
    asked = [name for name in leaves if name.removesuffix("_k").removesuffix("_v") in call.needs_grad]
    for name in asked:
        leaves[name].requires_grad_()
    results = runner(call, backend, arguments, leaves)
    gradients = _gradients(upstream_of(call, results, steady_rows), [leaves[name] for name in asked])
    return [x.detach() for x in results], dict(zip(asked, gradients, strict=True))


def _gradients(upstream: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    if not leaves:
        return []
    given = [dx.to(x.dtype) for x, dx in upstream]
    found = torch.autograd.grad([x for x, _ in upstream], leaves, given, allow_unused=True)
    return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(leaves, found, strict=True)]


def upstream_of(call: RandomCall, results: Sequence[Tensor], steady_rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair differentiable results with their upstream gradients, in float64 but rounded to the call's dtype.

    None for rows that are no steady ones. Those of a state are scaled so that they do not drown the output's.
    """
    generator = torch.Generator().manual_seed(call.seed)
    out, *state = results
    pairs = []
    for x in (out, *state[1:]):  # n is an integer
        drawn = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device)
        drawn = drawn * steady_rows[..., None] if x is out else drawn / x[0, 0].numel() ** 0.5
        if x is out or (call.state_needs_grad and x.requires_grad):
            pairs.append((x, drawn.to(call.dtype).double()))
    return pairs


class Noise:
    """The truth of a call, and how much of each result rounding may take."""

    def __init__(self, call: RandomCall, arguments: Arguments) -> None:
        self.call, self.arguments = call, arguments
        self.clean = {name: x.detach().double() for name, x in arguments.visible().items()}
        dense = _Dense(call, arguments, self.clean)
        self.steady_rows = dense.kappa <= KAPPA_LIMIT
        self._dense = dense

    def complaints(self, results: list[Tensor], gradients: dict[str, Tensor]) -> Iterator[str]:
        """List one line for everything that is wrong."""
        leaves = {name: x.requires_grad_() for name, x in self.clean.items()}
        expected = truth(self.call, self.arguments, leaves)
        (_, dout), *_ = upstream = upstream_of(self.call, expected, self.steady_rows)
        exact_gradients = _gradients(upstream, [leaves[name] for name in gradients])
        with torch.no_grad():
            yield from self._about_out(results[0], expected[0])
            yield from self._about_state(results[1:], expected[1:])
            spreads, limit = self._dense.gradient_spreads(dout, expected[0]), BUDGETS[self.call.dtype].gradient
            for (name, actual), exact in zip(gradients.items(), exact_gradients, strict=True):
                yield from _by_norm(f"gradient of {name}", actual, exact, spreads[name], limit, self.call.dtype)

    def _about_out(self, out: Tensor, exact: Tensor) -> Iterator[str]:
        budget, q = BUDGETS[self.call.dtype].forward, self.arguments.tensors["q"]
        steady = self.steady_rows[..., None]
        if out.shape == exact.shape:
            own_map = self.call.op == "feature_map" and self.call.feature_map == CALLABLE
            stored = q.abs() if own_map else q  # what the kernel is given
            expected = empty_in_storage_order(stored, self.call.M)
            # Where a size is 1 its stride means nothing, and compiled code does not look at it.
            if any(a != b for n, a, b in zip(out.shape, out.stride(), expected.stride(), strict=True) if n > 1):
                yield f"out has strides {out.stride()}, q {q.stride()}: not in the order in which q is stored"
            # Rounding by less than the smallest normal number is no error of fp16.
            allowed = max(4 * torch.finfo(out.dtype).eps, budget) * self._dense.absolute + torch.finfo(out.dtype).tiny
            over = (out.double() - exact).abs() / allowed
            if not bool((over <= 1).all()):
                worst = int(torch.nan_to_num(over, nan=torch.inf).argmax())
                place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), out.shape))
                yield f"out{list(place)} is {out[place].item():.6g}, truth {exact[place].item():.6g}"
            out, exact = out * steady, exact * steady
        yield from _by_norm("out", out, exact, self._dense.out_spread * steady, budget, self.call.dtype)

    def _about_state(self, state: list[Tensor], exact: list[Tensor]) -> Iterator[str]:
        if not state:
            return
        _n, *names = STATE_FIELDS[self.call.op]
        if not torch.equal(state[0], exact[0].to(state[0])):
            yield f"state n is {state[0].tolist()}, truth {exact[0].tolist()}"
        spreads = self._dense.state_spreads()
        dtype = torch.float64 if self.call.dtype == torch.float64 else torch.float32
        for name, actual, true, spread in zip(names, state[1:], exact[1:], spreads[1:], strict=True):
            yield from _by_norm(f"state {name}", actual, true, spread, BUDGETS[self.call.dtype].forward, dtype)


def _by_norm(
    what: str, actual: Tensor, exact: Tensor, spread: Tensor, limit: float, dtype: torch.dtype
) -> Iterator[str]:
    if actual.shape != exact.shape or actual.dtype != dtype:
        yield f"{what} is {actual.dtype} {tuple(actual.shape)}, expected {dtype} {tuple(exact.shape)}"
        return
    size = max(exact.norm().item(), spread.norm().item())
    error = (actual.double() - exact).norm().item()
    number = max(1, actual.numel())
    limit *= 1 + 3 / number**0.5  # budgets are for many numbers, whose roundings average out
    tiny = torch.finfo(dtype).tiny * number**0.5
    if not error <= limit * size + tiny:
        yield f"{what} is off by {error / size if size else error:.2e} of its norm, limit {limit:.0e}"


class _Dense:
    """All similarities of a call at once: which terms each result is a sum of.

    Keys of the initial state stand before the others; a packed row sees those of its own sequence.
    """

    def __init__(self, call: RandomCall, arguments: Arguments, clean: dict[str, Tensor]) -> None:
        self.call, self.clean, self.key_mask = call, clean, arguments.key_mask
        self.cu_seqlens = arguments.cu_seqlens
        q, k, v, self.past = clean["q"], clean["k"], clean["v"], call.past or 0
        seen = self._visible(q.device)
        if self.past:
            k, v = (self._before(clean[f"past_{name}"], x) for name, x in (("k", k), ("v", v)))
        self.group = call.H // call.Hkv
        (self.q, self.q_slope), (self.k, self.k_slope) = self._features(q), self._features(k)
        self.v = v
        k_all, v_all = (x.repeat_interleave(self.group, 1) for x in (self.k, self.v))
        p, slope, bound = (torch.where(seen, x, 0.0) for x in self._similarity(self.q, k_all, seen))
        row_sum = p.sum(-1, keepdim=True) if call.normalize else torch.ones_like(p[..., :1])
        bounds = bound.sum(-1, keepdim=True)
        live = row_sum > 0
        divisor = torch.where(live, row_sum, 1.0)
        self.p, self.slope = p / divisor * live, slope / divisor * live
        condition = torch.where(live, bounds / divisor, torch.where(bounds > 0, torch.inf, 1.0))
        if call.op != "quadratic":  # terms of one sign: a sum of zeros is exact
            condition = torch.where(live, condition, 1.0)
        self.kappa = (condition if call.normalize else torch.ones_like(condition))[..., 0]
        out = self.p @ v_all
        self.absolute = (bound / divisor) @ v_all.abs() + (condition * out.abs() if call.normalize else 0)
        # A row whose sum is lost may be 0 or any mean of its values.
        lost = (~live & (bounds > 0)) & torch.tensor(call.op == "quadratic" and call.normalize, device=q.device)
        self.absolute = torch.where(lost, torch.inf, self.absolute)
        self.out_spread = (self.p.square() @ v_all.square()).sqrt()

    def _visible(self, device: torch.device) -> Tensor:
        call = self.call
        if not call.lengths:
            seen = visible_keys(
                call.T, call.Tk, is_causal=call.is_causal, q_offset=call.q_offset, key_mask=self.key_mask, device=device
            )
            return torch.cat([seen.new_ones(*seen.shape[:-1], self.past), seen], -1)
        lengths = torch.tensor(call.lengths, device=device)
        index = torch.arange(len(call.lengths), device=device)
        of_row = index.repeat_interleave(lengths)
        seen = of_row[:, None] == of_row
        if call.is_causal:
            i = torch.arange(call.T, device=device)
            seen = seen & (i <= i[:, None] + (call.q_offset or 0))
        if self.key_mask is not None:
            seen = seen & self.key_mask
        return torch.cat([of_row[:, None] == index.repeat_interleave(self.past), seen], -1)[None, None]

    def _before(self, past: Tensor, x: Tensor) -> Tensor:
        """Put past keys [S,Hkv,P,*] before the others; those of packed sequences one after the other."""
        if self.call.lengths:
            past = past.transpose(0, 1).flatten(1, 2)[None]
        return torch.cat([past, x], dim=2)

    def _after(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take apart the tensor that `_before` joined."""
        past, rest = x[:, :, : x.shape[2] - self.call.Tk], x[:, :, x.shape[2] - self.call.Tk :]
        if self.call.lengths and self.past:
            past = past[0].reshape(self.call.Hkv, -1, self.past, past.shape[3]).transpose(0, 1)
        return past, rest

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return phi(x) and its derivative; x and 1 where the operation has no feature map."""
        if self.call.op != "feature_map":
            return x.detach(), torch.ones_like(x)
        phi = self.call.similarity
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            features = (TRUE_FEATURE_MAPS[phi] if isinstance(phi, str) else phi)(leaf)
            (slope,) = torch.autograd.grad(features.sum(), leaf)
        return features.detach(), slope

    def _similarity(self, q: Tensor, k: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p, dp/ds with s = q.k, and the sum of the absolute values of the terms of p."""
        scale = q.shape[-1] ** -0.5 if self.call.scale is None else self.call.scale
        s, t = scale * (q @ k.mT), abs(scale) * (q.abs() @ k.abs().mT)
        if self.call.op == "softmax":
            p = torch.exp(s - torch.where(seen, s, -torch.inf).amax(-1, keepdim=True).clamp(min=-1e300))
            return p, scale * p, p
        if self.call.op == "feature_map":
            return s, torch.full_like(s, scale), t
        c0, c1, c2 = self.call.coefficients
        return c0 + c1 * s + c2 * s * s, scale * (c1 + 2 * c2 * s), abs(c0) + abs(c1) * t + abs(c2) * t * t

    def gradient_spreads(self, dout: Tensor, out: Tensor) -> dict[str, Tensor]:
        """Return the norm that each gradient would have if its terms had random signs, place by place."""
        k, v = (x.repeat_interleave(self.group, 1) for x in (self.k, self.v))
        dp, dp_noise = dout @ v.mT, dout.square() @ v.square().mT
        coherent = torch.zeros_like(dout[..., :1])
        if self.call.normalize:
            dp = dp - (dout * out).sum(-1, keepdim=True)
            coherent = (dout.square().sum(-1) * out.square().sum(-1))[..., None]
        terms = self.slope.square() * (dp.square() + dp_noise)
        dq = terms @ k.square() + coherent * (self.slope @ k).square()
        dk = self._grouped((terms + self.slope.square() * coherent).mT @ self.q.square())
        dv = self._grouped(self.p.square().mT @ dout.square())
        past_k, dk = self._after(dk.sqrt() * self.k_slope.abs())
        past_v, dv = self._after(dv.sqrt())
        return {"q": dq.sqrt() * self.q_slope.abs(), "k": dk, "v": dv, "past_k": past_k, "past_v": past_v}

    def _grouped(self, x: Tensor) -> Tensor:
        """Add up the query heads that share a key head."""
        return x.reshape(x.shape[0], self.call.Hkv, self.group, *x.shape[2:]).sum(2)

    def state_spreads(self) -> list[Tensor]:
        """Return the same for the fields of the state: the root of the state of all squares."""
        past_k, k = self._after(self.k.square())
        past_v, v = self._after(self.v.square())
        features = self.call.op == "feature_map"
        collect = partial(truth_feature_state, feature_map="identity") if features else state_of(self.call)
        total = collect(k, v, key_mask=self.key_mask, cu_seqlens=self.cu_seqlens)
        if self.past:
            total = tuple(a + b for a, b in zip(total, collect(past_k, past_v), strict=True))
        return [x.double().sqrt() for x in total]


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of passed, refused and wrong calls so far."""

    passed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def add(self, op: str, seed: int, backend: str, extent: str, device: torch.device | str) -> RandomCall:
        """Judge the call of a seed; print a failure on stderr at once."""
        call = draw(op, seed, EXTENTS[extent], DTYPES.get(backend, FUSED_DTYPES))
        verdict = judge(call, backend, device)
        if verdict.refused:
            self.refused[f"{op}: {verdict.refused}"] += 1
        elif verdict.wrong:
            again = reproduction(call, backend, extent, device)
            self.failed.append(f"{'; '.join(verdict.wrong)}\n           {again}\n           {call}")
            print(f"failed: {self.failed[-1]}", file=sys.stderr, flush=True)
        else:
            self.passed[op] += 1
        return call

    def __str__(self) -> str:
        lines = [f"{sum(self.passed.values())} passed, {len(self.failed)} failed, {sum(self.refused.values())} refused"]
        lines += [f"  passed   {count:5d}  {op}" for op, count in self.passed.items()]
        lines += [f"  refused  {count:5d}  {reason}" for reason, count in self.refused.most_common()]
        lines += [f"  failed   {line}" for line in self.failed]
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the duration, the seeds and the backends to test."""
    parser.add_argument("--backend", default="reference", help="the backend to try (%(default)s)")
    parser.add_argument("--op", action="append", choices=OPS, help="may be repeated (all)")
    parser.add_argument("--seed", type=int, help="this call alone, with all that is known of it")
    parser.add_argument("--start", type=int, default=0, metavar="SEED", help="first seed (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (%(default)s)")
    parser.add_argument("--extent", choices=EXTENTS, default="small", help="how large calls become (%(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: what the backend runs on)")


def run(args: argparse.Namespace) -> int:
    """Try seed after seed until time is up. Exit status 1 if a call was wrong."""
    cuda = args.backend == "triton" and torch.cuda.is_available()
    device = pick_device(args.device or ("cuda" if cuda else "cpu"))
    end, tally, seed = time.monotonic() + args.seconds, Tally(), args.start
    alone = args.seed is not None
    with progress(round(args.seconds), "s") as bar:
        for seed in [args.seed] if alone else itertools.count(args.start):
            if not alone and time.monotonic() > end:
                break
            for op in args.op or OPS:
                call = tally.add(op, seed, args.backend, args.extent, device)
                if alone:
                    print(call)
            spent = args.seconds - (end - time.monotonic())
            bar.update(round(min(spent, args.seconds)) - bar.n)
            bar.set_postfix_str(f"seed {seed}")
    print(tally)
    if not alone:
        print(f"  next     --start {seed}")
    return 1 if tally.failed else 0


def reproduction(call: RandomCall, backend: str, extent: str, device: torch.device | str) -> str:
    """Return the command that repeats a call."""
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return (
        f"{interpreted}python -m linattn fuzz --op {call.op} --seed {call.seed} --backend {backend} "
        f"--extent {extent} --device {torch.device(device).type}"
    )
