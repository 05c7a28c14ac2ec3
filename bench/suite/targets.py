"""The speed that the CPU kernels are to reach, case by case, and a table of what a result file says they reached.

A target is a ratio: the time of a rival divided by ours, measured side by side, B = 1, 2 threads. The figures come from
a prototype that reached them, or are goals that nobody had reached when they were set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from linattn.bench.measuring.cases import ELU_CHUNKED, QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from linattn.bench.measuring.results import Measurement

FLEX = Method("FlexAttention", "quadratic", "direct", "flex")
ONE_HEAD_SHARE = 0.75
"""One head may lose a quarter of the fp32 ratios of four."""


@dataclass(frozen=True)
class Target:
    """`goal` times as fast as the rival; `kind`: "P" a prototype reached it, "G" a goal, "1" follows from the P of
    four heads.
    """

    method: Method
    problem: Problem
    goal: float
    kind: str
    rival: Method = SDPA

    def reached(self, measurements: Iterable[Measurement]) -> float | None:
        """Compute the rival's time divided by ours, None where either is missing."""
        here = {
            measurement.method.name: measurement for measurement in measurements if measurement.problem == self.problem
        }
        ours, theirs = here.get(self.method.name), here.get(self.rival.name)
        if ours is None or theirs is None or not ours.median_ms or not theirs.median_ms:
            return None
        return theirs.median_ms / ours.median_ms


def _both(method: Method, N: int, D: int, fp32: float, bf16: float, kinds: str = "PP", **rest: object) -> list[Target]:
    """Make one case in fp32 and bf16; causal unless `rest` says otherwise."""
    rest = {"is_causal": True, **rest}
    pairs = zip(("fp32", "bf16"), (fp32, bf16), kinds, strict=True)
    return [Target(method, Problem(N, D, D, dtype=dtype, **rest), goal, kind) for dtype, goal, kind in pairs]  # type: ignore[arg-type]


TARGETS: tuple[Target, ...] = (
    *(t for N in (1024, 2048, 4096, 8192, 16384) for t in _both(QUADRATIC_DIRECT, N, 64, 1.4, 2.7)),
    *_both(QUADRATIC_CHUNKED, 16384, 64, 4.5, 7.0),
    *_both(QUADRATIC_CHUNKED, 16384, 32, 12.0, 20.0),
    *_both(QUADRATIC_CHUNKED, 16384, 128, 1.1, 1.5),
    *_both(QUADRATIC_DIRECT, 8192, 64, 1.35, 2.6, is_causal=False),
    *_both(QUADRATIC_CHUNKED, 8192, 64, 4.5, 7.0, is_causal=False),
    *_both(QUADRATIC_DIRECT, 4096, 64, 1.4, 2.5, "PG", direction="training"),
    *_both(QUADRATIC_CHUNKED, 16384, 64, 4.0, 6.0, "GG", direction="training"),
    *_both(ELU_CHUNKED, 4096, 64, 20.0, 10.0, "PG"),
    Target(QUADRATIC_DIRECT, Problem(4096, 64, 64, is_causal=True), 3.5, "P", FLEX),
    *(
        Target(method, Problem(16384, 64, 64, H=1, is_causal=True), ONE_HEAD_SHARE * goal, "1")
        for method, goal in ((QUADRATIC_DIRECT, 1.4), (QUADRATIC_CHUNKED, 4.5))
    ),
)
AVX2_TARGETS: tuple[Target, ...] = tuple(
    Target(QUADRATIC_DIRECT, Problem(N, 64, 64, is_causal=True), 1.2, "P") for N in (1024, 4096, 16384)
)
"""With ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS and LINATTN_CPU_CAPABILITY all set to avx2: without the second,
SDPA's matrix products stay on AVX-512."""


def of_this_process() -> tuple[Target, ...]:
    """Return the targets for the instruction set that torch uses here."""
    return AVX2_TARGETS if torch.backends.cpu.get_cpu_capability() == "AVX2" else TARGETS


def methods_on(problem: Problem, targets: Sequence[Target]) -> list[Method]:
    """Return everything that the targets on one problem compare, SDPA apart."""
    wanted = [m for t in targets if t.problem == problem for m in (t.method, t.rival) if m != SDPA]
    return list(dict.fromkeys(wanted))


def table(measurements: Sequence[Measurement], targets: Sequence[Target]) -> str:
    """Format one line a target that was measured: the case, the goal, what was reached; empty if none was."""
    lines = [
        (
            f"{t.method.name} {t.problem}",
            f"vs {t.rival.name}",
            f"{t.goal:.2f}x {t.kind}",
            f"{reached:.2f}x",
            "reached" if reached >= t.goal else f"short by {100 * (1 - reached / t.goal):.0f} %",
        )
        for t in targets
        if (reached := t.reached(measurements)) is not None
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
