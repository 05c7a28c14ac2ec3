"""Hold the comparisons of `make gpu` and the speed that is to be reached, as tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from linattn.bench.measuring.cases import Method, Problem
from linattn.cost import Kernel, state_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Quantity = Literal["TFLOP/s", "ms", "speedup", "share of limit", "share of bandwidth", "GiB", "N*/D^2"]

DIRECT = Method("quadratic direct", "quadratic", "direct", "triton")
CHUNKED = Method("quadratic chunked", "quadratic", "chunked", "triton")
POWER = Method("power chunked", "power", "chunked", "triton")
SOFTMAX = Method("softmax", "softmax", "direct", "triton")
ELU = Method("elu+1 chunked", "elu+1", "chunked", "triton")
PLAIN = Method("plain chunked", "plain", "chunked", "triton")
FLASH = Method("SDPA flash", "softmax", "direct", "sdpa-flash")
CUDNN = Method("SDPA cuDNN", "softmax", "direct", "sdpa-cudnn")
FLEX = Method("FlexAttention", "quadratic", "direct", "flex")
REBASED = Method("fla parallel_rebased", "quadratic", "direct", "fla-rebased")
FLA = Method("fla chunk_linear_attn, elu+1 before", "elu+1", "chunked", "fla-linear")
FLA_PLAIN = Method("fla chunk_linear_attn", "plain", "chunked", "fla-plain")
LIGHTNING = Method("lightning-attn", "plain", "chunked", "lightning")
RETENTION = Method("retention, degree 2", "power", "chunked", "retention")
FASTEST_SOFTMAX = (FLASH, CUDNN)
OURS = "triton"


@dataclass(frozen=True)
class Goal:
    """A goal for `method`: at least `goal` and, if all goes well, `stretch`; at most, for ms and GiB.

    A speedup is over the fastest of `rivals`, among those whose error shows that they compute what they stand for.
    """

    method: Method
    quantity: Quantity
    goal: float
    stretch: float | None = None
    rivals: tuple[Method, ...] = ()

    def __str__(self) -> str:
        over = f" over the fastest of {', '.join(m.name for m in self.rivals)}" if self.rivals else ""
        return f"{self.method.name}: {self.quantity}{over}"

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.quantity in ("ms", "GiB", "N*/D^2")

    def is_met_by(self, value: float) -> bool:
        """Say whether a measured value reaches the goal."""
        return value <= self.goal if self.at_most else value >= self.goal


@dataclass(frozen=True)
class Comparison:
    """Methods on one problem, in one process, and the goals that their rows decide."""

    problem: Problem
    methods: tuple[Method, ...]
    goals: tuple[Goal, ...] = ()


def _bf16(N: int, D: int, B: int, H: int, *, training: bool = False, causal: bool = True) -> Problem:
    return Problem(N, D, D, B, H, "bf16", is_causal=causal, direction="training" if training else "forward")


def _faster(method: Method, goal: float, stretch: float | None, *rivals: Method) -> Goal:
    return Goal(method, "speedup", goal, stretch, rivals)


_SOFTMAX_GOALS = (_faster(SOFTMAX, 1.0, None, FLASH), _faster(SOFTMAX, 0.9, None, CUDNN))
_ALL_DIRECT = (DIRECT, SOFTMAX, FLASH, CUDNN)

DIRECT_CASES = (
    *(
        Comparison(
            _bf16(16384, D, 1, 16),
            _ALL_DIRECT,
            (
                Goal(DIRECT, "TFLOP/s", goal, stretch),
                _faster(DIRECT, 1.0, None, *FASTEST_SOFTMAX),
                *_SOFTMAX_GOALS,
            ),
        )
        for D, goal, stretch in ((128, 560.0, 680.0), (64, 450.0, 600.0))
    ),
    *(
        Comparison(
            _bf16(16384, D, 1, 16, training=True),
            _ALL_DIRECT,
            (_faster(DIRECT, 0.85, 1.2, *FASTEST_SOFTMAX), _faster(DIRECT, 1.3, None, FLASH), *_SOFTMAX_GOALS),
        )
        for D in (128, 64)
    ),
    # Beyond the table: not causal, and grouped heads are the tests' business.
    Comparison(_bf16(16384, 128, 1, 16, causal=False), _ALL_DIRECT),
)

CHUNKED_CASES = (
    Comparison(
        _bf16(65536, 64, 1, 8, training=True),
        (CHUNKED, FLASH, CUDNN),
        (Goal(CHUNKED, "ms", 4.2, 2.5), _faster(CHUNKED, 8.0, None, *FASTEST_SOFTMAX)),
    ),
    Comparison(_bf16(65536, 64, 1, 8), (CHUNKED, FLASH, CUDNN), (Goal(CHUNKED, "ms", 1.0, 0.7),)),
    Comparison(
        _bf16(65536, 128, 1, 16),
        (CHUNKED, FLASH, CUDNN),
        (Goal(CHUNKED, "share of limit", 0.45, 0.65), _faster(CHUNKED, 1.0, None, *FASTEST_SOFTMAX)),
    ),
    Comparison(_bf16(65536, 128, 1, 16, training=True), (CHUNKED, FLASH, CUDNN)),
    Comparison(_bf16(65536, 64, 1, 8, causal=False), (CHUNKED, FLASH, CUDNN)),
)

FEATURE_MAP_SHAPES = (
    (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256),
    (8, 1024, 8, 64),
)  # fmt: skip
"""B, T, H, D: those of fla's own benchmark."""
FEATURE_MAP_CASES = tuple(
    Comparison(_bf16(T, D, B, H, training=True), (ELU, PLAIN), (Goal(ELU, "share of bandwidth", 0.5),))
    for B, T, H, D in FEATURE_MAP_SHAPES
)

FLEX_CASES = tuple(
    Comparison(_bf16(16384, D, 1, 16, training=training), (DIRECT, FLEX), (_faster(DIRECT, 1.5, 2.0, FLEX),))
    for D in (128, 64)
    for training in (False, True)
)

PEER_CASES = (
    Comparison(
        _bf16(65536, 64, 1, 8, training=True), (CHUNKED, POWER, RETENTION), (_faster(CHUNKED, 4.0, None, RETENTION),)
    ),
    Comparison(_bf16(16384, 64, 1, 16), (DIRECT, REBASED), (_faster(DIRECT, 4.0, None, REBASED),)),
    Comparison(_bf16(16384, 64, 1, 16, training=True), (DIRECT, REBASED), (_faster(DIRECT, 4.0, None, REBASED),)),
)
FLA_CASES = tuple(
    Comparison(
        _bf16(T, D, B, H, training=True),
        (ELU, FLA, PLAIN, FLA_PLAIN, LIGHTNING),
        (_faster(ELU, 1.5, 2.5, FLA), _faster(PLAIN, 1.5, 2.5, FLA_PLAIN)),
    )
    for B, T, H, D in FEATURE_MAP_SHAPES
)


@dataclass(frozen=True)
class LengthSweep:
    """Lengths over which the chunked form overtakes softmax, and what N* is to be at most, in D^2."""

    problem: Problem
    sizes: tuple[int, ...]
    target: Goal

    def __str__(self) -> str:
        p = self.problem
        return f"D{p.D} B{p.B} H{p.H} {'causal' if p.is_causal else 'non-causal'}"

    def problems(self) -> list[Problem]:
        """Return the problem at every size."""
        return [replace(self.problem, N=N) for N in self.sizes]


SWEPT = (CHUNKED, DIRECT, *FASTEST_SOFTMAX)
SWEEPS = tuple(
    LengthSweep(
        _bf16(D * D, D, B, H, causal=causal),
        tuple(D * D * 2**i // 8 for i in range(1 if causal else 0, 6)),
        Goal(CHUNKED, "N*/D^2", 1.3, 1.0) if causal else Goal(CHUNKED, "N*/D^2", 0.8, 0.6),
    )
    for D in (64, 128)
    for B, H in ((1, 8), (4, 16))
    for causal in (True, False)
)

MILLION = Comparison(
    _bf16(2**20, 64, 1, 8, training=True),
    (CHUNKED,),
    (Goal(CHUNKED, "GiB", 20e9 / 2**30), Goal(CHUNKED, "speedup", 80.0)),
)
MILLION_SOFTMAX = Comparison(_bf16(2**17, 64, 1, 8, training=True), FASTEST_SOFTMAX)
"""Softmax where it can be waited for; its time at the length of MILLION is extrapolated by N^2."""


@dataclass(frozen=True)
class DecodeStep:
    """A step of decoding: D = M, bf16 inputs, a state in fp32 that is read and written."""

    op: str
    B: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"{self.op} D{self.D} B{self.B} H{self.H}"

    @property
    def goal(self) -> Goal:
        """Share of the measured copy bandwidth."""
        return Goal(Method("step", self.op, "recurrent", OURS), "share of bandwidth", 0.80, 0.92)

    @property
    def state_bytes(self) -> int:
        """Size of the state of all heads."""
        kernel: Kernel = "quadratic" if self.op == "quadratic" else "feature_map"
        return 4 * self.B * self.H * state_size(kernel, self.D, self.D)


# The quadratic state of D = 128 would be 4.4 GB.
STEPS = tuple(DecodeStep(op, 64, 16, D) for op, D in (("elu+1", 64), ("elu+1", 128), ("quadratic", 64)))


# ---- sizes for a rehearsal -------------------------------------------------------------------------------------------


def small(comparison: Comparison) -> Comparison:
    """Shrink a problem to sizes that Triton's interpreter can be waited for."""
    return replace(comparison, problem=_small(comparison.problem))


def small_sweep(sweep: LengthSweep) -> LengthSweep:
    """Shrink a sweep to two short lengths."""
    return replace(sweep, problem=_small(sweep.problem), sizes=(16, 32))


def small_step(step: DecodeStep) -> DecodeStep:
    """Shrink a step to one head."""
    return replace(step, B=1, H=1, D=16)


def _small(problem: Problem) -> Problem:
    return replace(problem, N=min(problem.N, 40), D=16, M=16, B=1, H=1)


T = TypeVar("T", Comparison, LengthSweep, DecodeStep)


def distinct(items: Iterable[T]) -> list[T]:
    """Keep those that are still different at small sizes, whatever their goals."""

    def measured(item: T) -> object:
        return (item.problem, item.methods) if isinstance(item, Comparison) else str(item)

    return list({measured(item): item for item in items}.values())


# ---- what the goals come to ------------------------------------------------------------------------------------------


def value_of(goal: Goal, rows: Mapping[str, Mapping[str, object]], honest: Sequence[str]) -> float | None:
    """Return the measured value of a goal's quantity, from measurements by method name; None where one is missing.

    `honest` names the methods whose error shows that they computed what they stand for.
    """
    ours = rows.get(goal.method.name, {})
    if goal.quantity != "speedup":
        value = ours.get(goal.quantity)
        return float(value) if isinstance(value, int | float) else None
    theirs = [rows[m.name].get("ms") for m in goal.rivals if m.name in honest]
    times = [ms for ms in theirs if isinstance(ms, int | float)]
    ms = ours.get("ms")
    return min(times) / ms if times and isinstance(ms, int | float) else None
