"""Figures of a sweep, drawn from `results.json` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn._util import figures
from linattn.autoencoders.experiments.figures import OBJECTIVE_COLORS, band, size_colors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL_NAMES = {"linear": "linear: F-k-F", "relu": "ReLU: F-256-k-256-F"}
LOSS = "squared error of a sample"


def draw_all(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the results allow; return the files written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: the folder cannot be written.
    """
    written = []
    for objective in dict.fromkeys(cell["objective"] for cell in results["cells"]):
        path = folder / f"epochs-{objective}.png"
        figures.save(draw_epochs(results, objective), path)
        written.append(path)
    figures.save(draw_objectives(results), folder / "objectives.png")
    figures.save(draw_sizes(results), folder / "sizes.png")
    return [*written, folder / "objectives.png", folder / "sizes.png"]


def draw_epochs(results: dict[str, Any], objective: str) -> Figure:
    """Draw validation error of the clean reconstruction and probe accuracy against epoch; a colour a size."""
    models = _names(results, "model")
    figure = figures.new_figure(10.5, 3.4 * len(models) + 0.7)
    grid = figure.subplots(len(models), 2, squeeze=False, sharex=True)
    colors = size_colors([cell["k"] for cell in results["cells"]])
    for model, (left, right) in zip(models, grid, strict=True):
        for cell in _cells(results, model=model, objective=objective):
            style = {"color": colors[cell["k"]], "label": f"k = {cell['k']}"}
            band(left, cell["epochs"], cell["curves"]["reconstruction"], **style)
            band(right, cell["epochs"], cell["curves"]["accuracy"], **style)
            if model == "linear" and cell["pca"] > 0:
                left.axhline(cell["pca"], color=colors[cell["k"]], linestyle=":", linewidth=1.2)
        left.set(title=f"{MODEL_NAMES[model]}: reconstruction", ylabel=f"{LOSS}, validation")
        _losses(
            left,
            [c for cell in _cells(results, model=model, objective=objective) for c in cell["curves"]["reconstruction"]],
        )
        right.set(title=f"{MODEL_NAMES[model]}: linear probe", ylabel="accuracy on test split (%)")
    for axes in grid.flat:
        figures.add_grid(axes)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    figures.add_legend_below(figure, columns=len(colors))
    dotted = "; dotted: PCA" if "linear" in models else ""
    figure.suptitle(f"{results['set']}, {objective}: mean and range of the repeats, before training at 0{dotted}")
    return figure


def draw_objectives(results: dict[str, Any]) -> Figure:
    """Draw training (solid) and validation (dashed) losses, one colour an objective, a panel a size."""
    models, sizes = _names(results, "model"), _names(results, "k")
    figure = figures.new_figure(3.1 * len(sizes) + 0.8, 3.0 * len(models) + 0.9)
    grid = figure.subplots(len(models), len(sizes), squeeze=False, sharex=True)
    for model, panels in zip(models, grid, strict=True):
        for k, axes in zip(sizes, panels, strict=True):
            cells = _cells(results, model=model, k=k)
            for cell in cells:
                color = OBJECTIVE_COLORS[cell["objective"]]
                # Before training only the validation loss exists.
                train = [curve[1:] for curve in cell["curves"]["train"]]
                band(axes, cell["epochs"][1:], train, color=color, label=f"{cell['objective']}, training")
                band(
                    axes,
                    cell["epochs"],
                    cell["curves"]["validation"],
                    color=color,
                    linestyle="--",
                    label=f"{cell['objective']}, validation",
                )
            axes.set(title=f"{model}, k = {k}")
            _losses(axes, [curve for cell in cells for curve in cell["curves"]["validation"]])
            figures.add_grid(axes)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    for axes in grid[:, 0]:
        axes.set_ylabel(LOSS)
    figures.add_legend_below(figure, columns=3)
    figure.suptitle(f"{results['set']}: each objective's own loss, mean and range of the repeats")
    return figure


def draw_sizes(results: dict[str, Any]) -> Figure:
    """Draw reconstruction and probe at the end of training against k."""
    from matplotlib.ticker import NullLocator

    figure = figures.new_figure(10.5, 4.4)
    left, right = figure.subplots(1, 2)
    for model in _names(results, "model"):
        for objective in _names(results, "objective"):
            cells = sorted(_cells(results, model=model, objective=objective), key=lambda cell: cell["k"])
            if not cells:
                continue
            style = {
                "color": OBJECTIVE_COLORS[objective],
                "linestyle": "-" if model == "linear" else "--",
                "label": f"{model}, {objective}",
            }
            for axes, name in ((left, "reconstruction"), (right, "accuracy")):
                last = [[curve[-1] for curve in cell["curves"][name]] for cell in cells]
                middle = [sum(values) / len(values) for values in last]
                spread = [
                    [m - min(v) for m, v in zip(middle, last, strict=True)],
                    [max(v) - m for m, v in zip(middle, last, strict=True)],
                ]
                axes.errorbar(
                    [cell["k"] for cell in cells], middle, spread, marker="o", markersize=4, capsize=2, **style
                )
    bounds = sorted({(cell["k"], cell["pca"]) for cell in results["cells"] if cell["pca"] > 0})
    if bounds:
        left.plot(*zip(*bounds, strict=True), color=figures.GREY, linestyle=":", marker="x", label="PCA")
    left.set(ylabel=f"{LOSS}, validation", title="Clean reconstruction")
    _losses(left, [[cell["curves"]["reconstruction"][0][-1]] for cell in results["cells"]])
    right.set(ylabel="accuracy on test split (%)", title="Linear probe on the codes")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="size of the code, k")
        axes.set_xticks(sizes := _names(results, "k"), [str(k) for k in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        figures.add_grid(axes)
    figures.add_legend_below(figure, columns=4)
    figure.suptitle(f"{results['set']}: after training, mean and range of the repeats")
    return figure


def _cells(results: dict[str, Any], **chosen: object) -> list[dict[str, Any]]:
    return [cell for cell in results["cells"] if all(cell[name] == value for name, value in chosen.items())]


def _names(results: dict[str, Any], column: str) -> list[Any]:
    return list(dict.fromkeys(cell[column] for cell in results["cells"]))


def _losses(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Make the axis logarithmic, cut at 1e-5 of the largest loss: vanishing ones (1e-11) would take most of it."""
    if not curves:  # of a sweep that was stopped
        axes.set_axis_off()
        return
    figures.set_log_scale(axes)
    largest = max(max(curve) for curve in curves)
    if min(min(curve) for curve in curves) < 1e-5 * largest:
        axes.set_ylim(bottom=1e-5 * largest)
