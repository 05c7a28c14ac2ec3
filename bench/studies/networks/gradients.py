"""Follow gradients back through time: vanishing, exploding, and what keeps them alive.

Over one step back, dL/dh_{t-1} = W_h^T diag(act'(z_t)) dL/dh_t + what h_{t-1} is asked for itself. Without an
activation and with the last step alone as target, T - t such steps multiply dL/dh_T by (W_h^T)^(T-t): with W_h = rho Q,
Q orthogonal, the norm is rho^(T-t) times that at the end, to the last digit. An activation makes its factor smaller, a
target at every step adds a gradient on the way, and an LSTM's cell and a residual layer, h + f(h), let it pass beside
the weights.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor, nn

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.rnn import LSTMLayer, LSTMState, RecurrentRegressionModel, RNNLayer, running_average_batch
from linattn.rnn import running_average_loss as loss_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOAT = torch.float64
RHOS = (0.8, 0.95, 1.0, 1.05, 1.25)
FAR = 50
"""Steps over which cells are compared."""


@dataclass(frozen=True)
class Trace:
    """Norms at the steps 1 ... T of one sequence.

    Attributes:
        h: |h_t|.
        gradient: |dL/dh_t|, through all later steps; of an LSTM's cell |dL/dc_t|.
    """

    h: list[float]
    gradient: list[float]

    @property
    def ratio(self) -> float:
        """Return the gradient at the first step as a share of that at the last."""
        return self.gradient[0] / self.gradient[-1]


def trace(model: RecurrentRegressionModel, x: Tensor, y: Tensor, last_only: bool, part: int = 0) -> Trace:
    """Follow the running-average loss back through time; `part` 1 is the cell of an LSTM."""
    kept: list[Tensor | LSTMState] = []
    predictions, _ = model(x, kept_states=kept)
    loss_of(predictions, y, last_timestep_only=last_only).backward()  # type: ignore[no-untyped-call]
    states = [state if isinstance(state, Tensor) else state[part] for state in kept]
    norms = [torch.zeros(()) if state.grad is None else state.grad.norm() for state in states]
    return Trace([state.detach().norm().item() for state in states], [norm.item() for norm in norms])


def scaled_model(
    cell: str, nonlinearity: str, hidden: int, scale: float, bias_scale: float
) -> RecurrentRegressionModel:
    """Make a network as it is drawn at the start, its weights and biases multiplied."""
    net = LSTMLayer(1, hidden, dtype=FLOAT) if cell == "lstm" else RNNLayer(1, hidden, nonlinearity, dtype=FLOAT)
    with torch.no_grad():
        net.weight_x.mul_(scale)
        net.weight_h.mul_(scale)
        net.bias.mul_(bias_scale)
    return RecurrentRegressionModel(net)


def rotation_model(rho: float, hidden: int, nonlinearity: str = "identity") -> RecurrentRegressionModel:
    """Make a network with W_h = rho times a random orthogonal matrix."""
    net = RNNLayer(1, hidden, nonlinearity, dtype=FLOAT)
    nn.init.orthogonal_(net.weight_h, gain=rho)
    return RecurrentRegressionModel(net)


def largest_eigenvalue(weight: Tensor) -> float:
    """Compute the largest eigenvalue of the recurrence, by magnitude."""
    return float(torch.linalg.eigvals(weight.detach()).abs().max())


def slope(path: Trace) -> float:
    """Fit the change of log |dL/dh_t| in a step back, by least squares."""
    back = range(len(path.gradient), 0, -1)
    return linear_regression(back, [math.log(norm) for norm in path.gradient]).slope


def residual_path(hidden: int, residual: bool) -> Trace:
    """Trace a gradient from the top through FAR layers h + f(h), f(h) = tanh(W h + b), or f(h) alone, as they
    are drawn.
    """
    layers = [nn.Linear(hidden, hidden, dtype=FLOAT) for _ in range(FAR)]
    h = torch.randn(1, hidden, dtype=FLOAT, requires_grad=True)
    kept = []
    for layer in layers:
        h = h * float(residual) + layer(h).tanh()
        h.retain_grad()
        kept.append(h)
    (h @ torch.randn(hidden, 1, dtype=FLOAT)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [h.grad.norm().item() for h in kept if h.grad is not None]
    return Trace([h.detach().norm().item() for h in kept], gradients)


def far_paths(hidden: int) -> dict[str, Trace]:
    """Trace the gradient over FAR steps, of the last step's loss, for the cells that are compared."""
    x, y = running_average_batch(FAR, 1, dtype=FLOAT)

    def lstm(forget_bias: float) -> Trace:
        net = LSTMLayer(1, hidden, forget_bias=forget_bias, dtype=FLOAT)
        return trace(RecurrentRegressionModel(net), x, y, last_only=True, part=1)

    def plain(nonlinearity: str) -> Trace:
        return trace(rotation_model(1.0, hidden, nonlinearity), x, y, last_only=True)

    makers: dict[str, Callable[[], Trace]] = {
        "tanh RNN, orthogonal": lambda: plain("tanh"),
        "ReLU RNN, orthogonal": lambda: plain("relu"),
        "LSTM cell": lambda: lstm(0.0),
        "LSTM cell, forget bias +1": lambda: lstm(1.0),
        "LSTM cell, forget bias +4": lambda: lstm(4.0),
        "50 layers f(h)": lambda: residual_path(hidden, residual=False),
        "50 layers h + f(h)": lambda: residual_path(hidden, residual=True),
    }
    return {name: make() for name, make in makers.items()}


def both_targets(model: RecurrentRegressionModel, x: Tensor, y: Tensor) -> tuple[Trace, Trace]:
    """Trace with the last step alone as target, and with every step."""
    return trace(model, x, y, last_only=True), trace(model, x, y, last_only=False)


def claims_of(slopes: dict[float, float], far: dict[str, Trace], hidden: int) -> list[study.Claim]:
    """Claim slopes as in theory, the effect of targets on the way, and who carries a gradient over FAR steps."""
    last, every = both_targets(scaled_model("rnn", "tanh", hidden, 1, 1), *running_average_batch(20, 1, dtype=FLOAT))
    # A relative error, and at rho = 1, whose logarithm is 0, the slope itself.
    errors = [abs(s / math.log(rho) - 1) if rho != 1 else abs(s) for rho, s in slopes.items()]
    plain, forgetful = far["tanh RNN, orthogonal"].ratio, far["LSTM cell"].ratio
    return [
        study.Claim("identity RNN: largest relative error of the slope against log rho", max(errors), "<=", 0.01),
        study.Claim(
            "tanh RNN, |dL/dh_1| / |dL/dh_20|: every step a target over the last alone",
            every.ratio / last.ratio,
            ">=",
            100.0,
        ),
        study.Claim(
            f"gradient left after {FAR} steps, LSTM with forget bias +1 over +0",
            far["LSTM cell, forget bias +1"].ratio / forgetful,
            ">=",
            1e3,
        ),
        study.Claim(
            f"gradient left after {FAR} steps, LSTM with forget bias +4",
            far["LSTM cell, forget bias +4"].ratio,
            ">=",
            0.1,
        ),
        study.Claim("gradient left after 50 layers f(h)", far["50 layers f(h)"].ratio, "<=", 1e-6),
        study.Claim("gradient left after 50 layers h + f(h)", far["50 layers h + f(h)"].ratio, ">=", 0.5),
        study.Claim(f"gradient left after {FAR} steps, tanh RNN with an orthogonal W_h", plain, "<=", 0.5),
    ]


def draw(
    args: argparse.Namespace, last: Trace, every: Trace, rotations: dict[float, Trace], far: dict[str, Trace]
) -> Figure:
    """Draw the network that was asked for, then the law of the identity RNN, then the cells over FAR steps."""
    figure = figures.new_figure(12, 8.4)
    (states, gradients), (law, cells) = figure.subplots(2, 2)
    steps = range(1, len(last.h) + 1)
    what = f"{args.cell.upper()}{f' ({args.nonlinearity})' if args.cell == 'rnn' else ''}, weights x {args.scale:g}"
    states.plot(steps, last.h, "o-", color=figures.BLUE)
    states.set(title=f"{what}: the states", xlabel="step t", ylabel="|h$_t$|")
    states.set_ylim(bottom=0)
    gradients.plot(steps, _shown(last.gradient), "o-", color=figures.VERMILION, label="the last step is the target")
    gradients.plot(steps, _shown(every.gradient), "s-", color=figures.GREEN, label="every step is a target")
    gradients.set(title="... and the gradient that reaches them", xlabel="step t", ylabel="|dL/dh$_t$|", yscale="log")
    for (rho, path), color in zip(
        rotations.items(), (figures.VERMILION, figures.ORANGE, figures.GREY, figures.SKY, figures.BLUE), strict=True
    ):
        back = range(len(path.gradient))
        relative = [g / path.gradient[-1] for g in reversed(path.gradient)]
        law.plot(back, relative, "o", color=color, markersize=4, label=rf"$\rho$ = {rho:g}")
        law.plot(back, [rho**k for k in back], color=color, linewidth=1)
    law.set(
        title=r"Identity RNN, W$_h$ = $\rho$ x orthogonal (lines: $\rho^{T-t}$)",
        xlabel="steps back, T - t",
        yscale="log",
    )
    law.set_ylabel("|dL/dh$_t$| / |dL/dh$_T$|")
    colors = (figures.BLUE, figures.SKY, figures.ORANGE, figures.VERMILION, figures.PURPLE, figures.GREY, figures.GREEN)
    for (name, path), color in zip(far.items(), colors, strict=True):
        relative = [g / path.gradient[-1] for g in reversed(path.gradient)]
        cells.plot(range(len(relative)), _shown(relative), color=color, label=name)
    cells.set(title="Who carries a gradient over 50 steps", xlabel="steps (or layers) back", yscale="log")
    cells.set_ylabel("gradient / gradient at the end")
    for axes in (states, gradients, law, cells):
        _finish_axes(axes)
    return figure


def _shown(values: Sequence[float]) -> list[float]:
    """Leave a gap in the line where a gradient is exactly 0 (all units of a ReLU off)."""
    return [value if value > 0 else math.nan for value in values]


def _finish_axes(axes: Axes) -> None:
    figures.add_grid(axes)
    axes.locator_params(axis="x", integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study gradients`."""
    study.add_common_arguments(parser, "gradients")
    parser.add_argument("--cell", choices=("rnn", "lstm"), default="rnn", help="of the network shown (%(default)s)")
    parser.add_argument(
        "--nonlinearity", choices=("tanh", "relu", "identity"), default="tanh", help="of an RNN (%(default)s)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on its weights (%(default)s)")
    parser.add_argument("--bias-scale", type=float, default=1.0, help="factor on its biases (%(default)s)")
    parser.add_argument("--hidden", type=whole, default=16, help="units (%(default)s)")
    parser.add_argument("--steps", type=whole, default=20, help="length of its sequence (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Trace, print, draw."""
    study.require_matplotlib()
    torch.manual_seed(args.seed)
    x, y = running_average_batch(args.steps, 1, dtype=FLOAT)
    model = scaled_model(args.cell, args.nonlinearity, args.hidden, args.scale, args.bias_scale)
    last, every = both_targets(model, x, y)
    rotations = {rho: trace(rotation_model(rho, args.hidden), x, y, last_only=True) for rho in RHOS}
    slopes = {rho: slope(path) for rho, path in rotations.items()}
    far = far_paths(args.hidden)

    text = text_table(
        ("t", "|h_t|", "|dL/dh_t|, last target", "all targets"),
        [(str(t + 1), last.h[t], last.gradient[t], every.gradient[t]) for t in range(args.steps)],
    )
    if args.cell == "rnn":
        text += f"\nlargest |eigenvalue| of W_h: {largest_eigenvalue(model.net.weight_h):.4g}\n"  # type: ignore[arg-type]
    text += "\nIdentity RNN, W_h = rho x orthogonal: slope of log |dL/dh_t| in a step back\n" + text_table(
        ("rho", "log rho", "slope"), [(rho, math.log(rho), s) for rho, s in slopes.items()]
    )
    text += f"\n\nGradient left after {FAR} steps\n" + text_table(
        ("network", "first / last"), [(name, path.ratio) for name, path in far.items()]
    )
    return study.finish(
        "gradients", text, claims_of(slopes, far, args.hidden), draw(args, last, every, rotations, far), args
    )


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "gradients", *sys.argv[1:]]))
