"""Figures of one run: its curves, what it reconstructs, what lies along its codes, its filters and singular values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn._util import figures
from linattn.autoencoders.analysis.principal import principal_components
from linattn.autoencoders.experiments.figures import OBJECTIVE_COLORS, band
from linattn.autoencoders.models.autoencoder import Autoencoder
from linattn.autoencoders.models.patches import PatchAutoencoder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from linattn.autoencoders.experiments.experiment import Experiment
    from linattn.training.trainer import Record

IMAGES = 12
FILTERS = 32
DIRECTIONS = 6
STEPS = (-3, -2, -1, 0, 1, 2, 3)
POINTS = 2000


@torch.no_grad()
def draw_all(experiment: Experiment, history: Sequence[Record], folder: Path) -> dict[str, Figure]:
    """Draw what the first repeat of the experiment allows and write it into the folder; figures by name.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: the folder cannot be written.
    """
    model = experiment.models.member(0)
    shape = experiment.data.image_shape
    drawings = {"curve": draw_curve(experiment, history), "latent": draw_latent(experiment, model)}
    if shape is not None:
        drawings["reconstructions"] = draw_reconstructions(experiment, model)
    if isinstance(model, Autoencoder):
        drawings["spectrum"] = draw_spectrum(experiment, model)
        if shape is not None:
            drawings["filters"] = draw_filters(experiment, model)
    for name, drawing in drawings.items():
        figures.save(drawing, folder / f"{name}.png")
    return drawings


def draw_curve(experiment: Experiment, history: Sequence[Record]) -> Figure:
    """Draw losses and probe accuracy against epoch, mean and range of the repeats."""
    settings = experiment.settings
    with_probe = "accuracy" in history[-1].measures
    figure = figures.new_figure(10.5 if with_probe else 5.5, 4)
    panels = figure.subplots(1, 1 + with_probe, squeeze=False)[0]

    def curves(name: str, records: Sequence[Record]) -> list[list[float]]:
        return [list(column) for column in zip(*(r.measures[name] for r in records), strict=True)]

    color = OBJECTIVE_COLORS[settings.objective]
    trained = [r for r in history if "train" in r.measures]
    epochs = [experiment.epoch(r.step) for r in history]
    if trained:
        x = [experiment.epoch(r.step) for r in trained]
        band(panels[0], x, curves("train", trained), color=color, label="training")
    band(panels[0], epochs, curves("validation", history), color=color, linestyle="--", label="validation")
    if settings.objective != "vanilla":
        band(panels[0], epochs, curves("reconstruction", history), color=figures.GREY, label="validation, clean input")
    what = "squared error of a sample" if settings.loss == "sum" else "squared error of an entry"
    panels[0].set(title="Loss", ylabel=what)
    figures.set_log_scale(panels[0])
    panels[0].legend()
    if with_probe:
        band(panels[1], epochs, curves("accuracy", history), color=color)
        panels[1].set(title=f"Linear probe, {len(experiment.labelled)} labels", ylabel="accuracy on test split (%)")
    for axes in panels:
        axes.set_xlabel("epoch")
        figures.add_grid(axes)
    figure.suptitle(_title(experiment))
    return figure


def draw_reconstructions(experiment: Experiment, model: Autoencoder | PatchAutoencoder) -> Figure:
    """Draw test images, the model's inputs made from them, and its outputs."""
    x = experiment.data.test.x[:IMAGES]
    generator = torch.Generator(x.device).manual_seed(experiment.settings.seed)
    rows = {"image": x}
    if isinstance(model, PatchAutoencoder):
        filled, hidden = model.inpaint(x, generator)
        rows |= {"shown": x.masked_fill(hidden, 0.5), "filled in": filled}
    elif model.corruption is not None:
        shown = model.corruption(x, generator)
        rows |= {"shown": shown, "filled in" if experiment.settings.objective == "masked" else "restored": model(shown)}
    rows["reconstructed"] = model(x)
    figure = figures.new_figure(0.75 * IMAGES + 1.2, 0.78 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), IMAGES)
    for (name, images), panels in zip(rows.items(), grid, strict=True):
        for image, axes in zip(images, panels, strict=True):
            _image(axes, image, experiment)
        panels[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(f"{_title(experiment)}: test images")
    return figure


def draw_latent(experiment: Experiment, model: Autoencoder | PatchAutoencoder) -> Figure:
    """Draw codes of the test split on their two widest principal directions; images along the widest ones."""
    data = experiment.data
    with_images = isinstance(model, Autoencoder) and data.image_shape is not None
    codes = _codes(model, data.test.x[:POINTS])
    k = codes.shape[1]
    found = principal_components(codes, min(k, DIRECTIONS))
    figure = figures.new_figure(11 if with_images else 5.8, 4.8)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.05)) if with_images else [figure]
    parts = list(halves)
    axes = parts[0].subplots()
    plane = (codes.double() - found.mean) @ found.directions[:, :2]
    if k == 1:
        plane = torch.cat([plane, torch.zeros_like(plane)], 1)
    y = data.test.y[:POINTS].cpu() if data.has_labels else torch.zeros(len(plane))
    points = axes.scatter(
        plane[:, 0].tolist(), plane[:, 1].tolist(), c=y.tolist(), s=5, cmap="tab10" if data.classes > 2 else "coolwarm"
    )
    if data.has_labels:
        axes.legend(
            *points.legend_elements(num=None), title="class", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    share = found.variances / found.variances.sum()
    axes.set(
        xlabel=f"first principal direction of the codes ({100 * share[0]:.0f} % of variance)",
        title="Codes of test samples",
    )
    if k > 1:
        axes.set_ylabel(f"second ({100 * share[1]:.0f} %)")
    for part in parts[1:]:
        assert isinstance(model, Autoencoder)
        grid = part.subplots(found.directions.shape[1], len(STEPS), squeeze=False)
        for direction, variance, panels in zip(found.directions.T, found.variances, grid, strict=False):
            for step, panel in zip(STEPS, panels, strict=True):
                code = (found.mean + step * variance.sqrt() * direction).float().to(experiment.device)
                _image(panel, model.decode(code), experiment)
        for step, panel in zip(STEPS, grid[0], strict=True):
            panel.set_title(f"{step:+d} σ" if step else "mean", fontsize=9)  # noqa: RUF001  # sigma is meant
        for number, panel in enumerate(grid[:, 0]):
            panel.set_ylabel(number + 1, rotation=0, ha="right", va="center")
        part.suptitle("Images decoded along the principal directions of the codes")
    figure.suptitle(_title(experiment))
    return figure


def draw_filters(experiment: Experiment, model: Autoencoder) -> Figure:
    """Draw the largest weights into the first layer's units and out of the last hidden layer's, as images."""
    halves = {
        "encoder: into each unit of the first layer": _weights(model)[0],
        "decoder: out of each unit of the last": _weights(model)[-1].T,
    }
    figure = figures.new_figure(10.5, 3.3)
    parts: Any = figure.subfigures(1, 2)
    for part, (name, filters) in zip(parts, halves.items(), strict=True):
        strongest = filters[filters.norm(dim=1).argsort(descending=True)[:FILTERS]]
        grid = part.subplots(4, FILTERS // 4)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, weights in zip(grid.flat, strongest, strict=False):
            _image(axes, weights, experiment, signed=True)
        part.suptitle(name, fontsize=10)
    figure.suptitle(
        f"{_title(experiment)}: filters of largest norm, blue negative, red positive, each to its own scale"
    )
    return figure


def draw_spectrum(experiment: Experiment, model: Autoencoder) -> Figure:
    """Draw singular values of every weight matrix, and of the centred codes of the test split over sqrt(n)."""
    figure = figures.new_figure(10.5, 4)
    left, right = figure.subplots(1, 2)
    depth = len(_weights(model)) // 2
    for number, weights in enumerate(_weights(model)):
        half, layer = ("encoder", number) if number < depth else ("decoder", number - depth)
        values = torch.linalg.svdvals(weights).tolist()
        style = {
            "linestyle": "-" if half == "encoder" else "--",
            "color": figures.PALETTE[min(number, 2 * depth - 1 - number) % len(figures.PALETTE)],
        }
        left.plot(range(1, len(values) + 1), values, label=f"{half}, layer {layer + 1}", **style)
    left.set(
        title="Singular values of the weights", ylabel="singular value", xlabel="number", xscale="log", ylim=(0, None)
    )
    left.legend(fontsize=8)
    codes = _codes(model, experiment.data.test.x)
    values = principal_components(codes, 1).variances.sqrt()
    right.plot(
        range(1, len(values) + 1), values.clamp_min(1e-6 * float(values[0])).tolist(), color=figures.BLACK, marker="."
    )
    right.set(
        title="Singular values of the codes / √n",
        ylabel="standard deviation",
        xlabel="number",
        xscale="log",
        yscale="log",
    )
    for axes in (left, right):
        figures.add_grid(axes)
    figure.suptitle(_title(experiment))
    return figure


def _codes(model: Autoencoder | PatchAutoencoder, x: Tensor) -> Tensor:
    parts: tuple[Tensor, ...] = x.split(500)  # type: ignore[no-untyped-call]
    return torch.cat([model.encode(part) for part in parts]).cpu()


def _weights(model: Autoencoder) -> list[Tensor]:
    layers: list[Any] = [*model.encoder, *model.decoder]
    return [layer.weight.cpu() for layer in layers if isinstance(layer, torch.nn.Linear)]


def _image(axes: Axes, pixels: Tensor, experiment: Experiment, *, signed: bool = False) -> None:
    assert experiment.data.image_shape is not None
    image = pixels.reshape(experiment.data.image_shape).cpu().numpy()
    high = float(abs(image).max()) or 1.0
    style: dict[str, Any] = (
        {"cmap": "RdBu_r", "vmin": -high, "vmax": high} if signed else {"cmap": "gray", "vmin": 0, "vmax": 1}
    )
    axes.set_axis_on()
    axes.imshow(image, interpolation="nearest", **style)
    axes.set(xticks=[], yticks=[])


def _title(experiment: Experiment) -> str:
    settings = experiment.settings
    if settings.patch:
        what = f"{settings.kernel} attention on {settings.patch} x {settings.patch} patches"
        return f"{experiment.data.name}, {settings.objective}, {what}"
    sizes = "-".join(map(str, (experiment.data.input_size, *settings.hidden)))
    return f"{experiment.data.name}, {settings.objective}, encoder {sizes}, {settings.activation}"
