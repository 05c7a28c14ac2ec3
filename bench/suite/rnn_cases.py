"""Recurrent layers beside torch.nn: what is timed, and the file that the times go to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linattn._dispatch.plan import use_backend
from linattn._util.files import write_json
from linattn.bench.measuring.timing import side_by_side, summarise
from linattn.rnn import LSTM, RNN, to_torch_state_dict
from linattn.testing import relative_error

if TYPE_CHECKING:
    from pathlib import Path

    from linattn.bench.measuring.environment import Environment

Call = Callable[[], tuple[Tensor, ...]]
NETWORKS = {"rnn": (RNN, nn.RNN), "lstm": (LSTM, nn.LSTM)}
OURS, THEIRS, LOOP = "linattn", "torch.nn", "plain loop"


@dataclass(frozen=True)
class RecurrentCase:
    """One layer of H units on B sequences of T steps with H inputs each, fp32.

    `goal`: the largest accepted time over that of torch.nn; None: no goal was set.
    """

    cell: str
    B: int
    T: int
    H: int
    direction: str = "training"
    goal: float | None = None

    def __str__(self) -> str:
        return f"{self.cell}-B{self.B}-T{self.T}-H{self.H}-{self.direction}"


CASES = tuple(
    RecurrentCase(cell, B, T, H, direction, goal)
    for cell in NETWORKS
    for B, T, H, direction, goal in (
        (32, 128, 128, "training", 1.5),
        (32, 128, 128, "forward", None),
        (32, 10, 32, "training", None),
        (64, 19, 128, "training", None),
        (8, 512, 256, "training", None),
        (1, 512, 128, "forward", None),
    )
)


@dataclass(frozen=True)
class RecurrentTiming:
    """Milliseconds of a call by network, and the largest relative error of what linattn's returned, against fp64."""

    case: RecurrentCase
    samples_ms: dict[str, list[float]]
    error: float

    def median(self, name: str) -> float:
        """Return the median of one network in milliseconds."""
        return summarise(self.samples_ms[name]).median

    @property
    def ratio(self) -> float:
        """Our time over that of torch.nn: below 1 is faster."""
        return self.median(OURS) / self.median(THEIRS)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {self.median(name):.2f} ms" for name in self.samples_ms)
        goal = "" if self.case.goal is None else f", goal {self.case.goal:.2f}"
        return f"{self.case}: {times}; ours / torch.nn {self.ratio:.2f}{goal}; error {self.error:.0e}"


def measure(case: RecurrentCase, budget_s: float) -> RecurrentTiming:
    """Time the three side by side on the same weights and inputs."""
    torch.manual_seed(0)
    make_ours, make_theirs = NETWORKS[case.cell]
    ours, theirs = make_ours(case.H, case.H), make_theirs(case.H, case.H, batch_first=True)
    theirs.load_state_dict(to_torch_state_dict(ours.state_dict()))
    x, upstream = torch.randn(case.B, case.T, case.H), torch.randn(case.B, case.T, case.H)
    plain = _call(ours, case, x, upstream)

    def loop() -> tuple[Tensor, ...]:
        with use_backend("reference"):
            return plain()

    calls = {OURS: plain, THEIRS: _call(theirs, case, x, upstream), LOOP: loop}
    samples, outputs = side_by_side(calls, device=torch.device("cpu"), budget_s=budget_s)
    true = _call(make_ours(case.H, case.H, dtype=torch.float64), case, x.double(), upstream.double(), like=ours)()
    error = max(relative_error(found, right) for found, right in zip(outputs[OURS], true, strict=True))
    return RecurrentTiming(case, samples, error)


def _call(net: nn.Module, case: RecurrentCase, x: Tensor, upstream: Tensor, like: nn.Module | None = None) -> Call:
    """Make a function that runs the network: outputs, and for training the gradients of inputs and parameters."""
    if like is not None:
        net.load_state_dict(like.state_dict())

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (net(x)[0],)

    if case.direction == "forward":
        return forward
    leaves = (x.clone().requires_grad_(), *net.parameters())

    def training() -> tuple[Tensor, ...]:
        all_h = net(leaves[0])[0]
        return (all_h.detach(), *torch.autograd.grad(all_h, leaves, upstream))

    return training


def save(path: Path, results: list[RecurrentTiming], environment: Environment) -> None:
    """Write every sample with the machine that it was taken on."""
    rows = [
        {
            **asdict(one.case),
            "median_ms": {name: one.median(name) for name in one.samples_ms},
            "ours_over_torch": one.ratio,
            "error": one.error,
            "samples_ms": one.samples_ms,
        }
        for one in results
    ]
    write_json(path, {"environment": asdict(environment), "rows": rows})
