"""A trained softmax model becomes a linear one: swap the kernel, distil attention, fine-tune.

    linattn study conversion --text book.txt        without --text it learns this library's own source

A small character model is trained with softmax attention. Then its layers get feature maps instead, and what is lost
is measured at each step of the way back:

    swapped       Hedgehog maps phi(x) = softmax([W x, -W x]), W the identity: nothing is trained
    distilled     only the maps are trained: each layer's rows phi(q).phi(k) / sum imitate the teacher's softmax rows
    fine-tuned    all weights are trained on the text, a fraction of the teacher's steps

beside controls that fine-tune as long: without distilling, with elu+1, with the exact Taylor kernel, and the teacher
itself. Stages are kept in the folder: a run that was interrupted goes on where it was.

Source: Zhang et al. 2024, "The hedgehog & the porcupine: expressive linear attentions with softmax mimicry".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor

import linattn
from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.lm.text import Characters, consecutive_windows, random_windows
from linattn.modules import Attention, rotate
from linattn.training.checkpoint import CHECKPOINT_NAME, read_checkpoint
from linattn.training.trainer import Trainer, TrainingConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from matplotlib.figure import Figure

BATCH = 8
FINE_TUNING_RATE, DISTILLING_RATE = 1e-3, 1e-2


@dataclass
class Conversion:
    """One text, one teacher, and where stages are kept."""

    text: Characters
    config: CausalLMConfig
    folder: Path
    seed: int

    def validation_loss(self, model: CausalLM) -> float:
        """Compute the nats per character on held-out text."""
        windows = consecutive_windows(self.text.validation, self.config.context)[:200]
        model.eval()
        with torch.no_grad():
            return sum(float(model.loss(part)) * len(part) for part in torch.split(windows, 25)) / len(windows)

    def windows(self, step: int) -> Tensor:
        """Draw the training windows of one step."""
        return random_windows(self.text.train, BATCH, self.config.context + 1, seed=self.seed, step=step)

    def trained(
        self, stage: str, model: CausalLM, steps: int, rate: float, loss: Callable[[int], Tensor] | None = None
    ) -> CausalLM:
        """Train, and return the model after a stage of training, which goes on from its checkpoint if there is one.

        Raises:
            KeyboardInterrupt: it was interrupted, and is saved.
        """
        print(f"{stage}: {steps} steps", file=sys.stderr, flush=True)
        config = TrainingConfig(steps=steps, learning_rate=rate, validate_every=max(1, steps // 4))
        loss = loss or (lambda step: model.loss(self.windows(step)))
        path = self.folder / stage / CHECKPOINT_NAME
        trainer = Trainer(model, loss, lambda: self.validation_loss(model), config, folder=path.parent)
        if path.is_file():
            trainer.restore(read_checkpoint(path), path)
        if not trainer.run():
            raise KeyboardInterrupt
        return model


def swap_kernel(teacher: CausalLM, kernel: str) -> CausalLM:
    """Copy the teacher with another kernel and the same weights; maps that learn stand at their first values."""
    student = CausalLM(replace(teacher.config, kernel=kernel, form="chunked"))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert all(".kernel." in name for name in missing)
    return student


def attentions(model: CausalLM) -> list[Attention]:
    """List the attention layers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def distilling_loss(teacher: CausalLM, student: CausalLM, tokens: Tensor) -> Tensor:
    """Return the cross entropy of the student's attention rows against the teacher's, mean over layers, heads and
    positions.

        - sum_j a_ij log b_ij,    a = softmax(q k^T / sqrt(D)),    b_ij = phi(q_i).phi(k_j) / sum_j phi(q_i).phi(k_j)

    Both from the teacher's queries and keys, so the layers learn independently. O(T^2) memory: windows are short.
    """
    inputs: list[Tensor] = []
    layers = attentions(teacher)
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    with torch.no_grad():
        teacher(tokens)
        queries_and_keys = [queries_keys(layer, x) for layer, x in zip(layers, inputs, strict=True)]
    for hook in hooks:
        hook.remove()
    hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    total = torch.zeros(())
    for (q, k), layer in zip(queries_and_keys, attentions(student), strict=True):
        phi = layer.kernel
        assert callable(phi)
        target = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        weights = (phi(q) @ phi(k).mT).masked_fill(hidden, 0)
        logarithms = (weights / weights.sum(-1, keepdim=True)).clamp(min=1e-9).log()
        total = total - (target * logarithms).sum(-1).mean()
    return total / len(queries_and_keys)


def queries_keys(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer's kernel is given for the input x: q and k, [B, H, T, D]."""
    heads = layer.qkv(x).unflatten(-1, (-1, layer.head_dim))
    q, k, _ = heads.split((layer.heads, layer.kv_heads, layer.kv_heads), dim=2)
    assert layer.rotary is not None
    q, k = rotate(layer.q_norm(q), layer.rotary), rotate(layer.k_norm(k), layer.rotary)
    return q.transpose(1, 2), k.transpose(1, 2)


def convert(conversion: Conversion, steps: int) -> dict[str, float]:
    """Convert, and return losses by the model's name: of the teacher, after each step of the conversion, and of the
    controls.
    """
    torch.manual_seed(conversion.seed)
    teacher = conversion.trained("teacher", CausalLM(conversion.config), steps, 4e-3)
    losses = {"softmax, the teacher": conversion.validation_loss(teacher)}
    short = max(1, steps // 3)

    def fine_tune(stage: str, model: CausalLM) -> float:
        model.requires_grad_(True)
        return conversion.validation_loss(conversion.trained(stage, model, short, FINE_TUNING_RATE))

    student = swap_kernel(teacher, "hedgehog")
    losses["hedgehog, swapped"] = conversion.validation_loss(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".kernel." in name)
    conversion.trained(
        "distilled", student, short, DISTILLING_RATE,
        lambda step: distilling_loss(teacher, student, conversion.windows(step)[:, :-1]),
    )  # fmt: skip
    losses["hedgehog, distilled"] = conversion.validation_loss(student)
    losses["hedgehog, distilled and fine-tuned"] = fine_tune("hedgehog-fine-tuned", student)
    for kernel in ("hedgehog", "elu+1", "taylor"):
        control = swap_kernel(teacher, kernel)
        losses.setdefault(f"{kernel}, swapped", conversion.validation_loss(control))
        losses[f"{kernel}, fine-tuned"] = fine_tune(f"{kernel}-only-fine-tuned", control)
    again = CausalLM(teacher.config)
    again.load_state_dict(teacher.state_dict())
    losses["softmax, fine-tuned as long"] = fine_tune("softmax-fine-tuned", again)
    return losses


def recovered(losses: dict[str, float], name: str) -> float:
    """Compute the share of what swapping in Hedgehog lost that this model has back."""
    teacher, lost = losses["softmax, the teacher"], losses["hedgehog, swapped"]
    return (lost - losses[name]) / (lost - teacher)


def claims(losses: dict[str, float]) -> list[study.Claim]:
    """Claim what swapping loses and what distilling and fine-tuning give back."""
    best, teacher = "hedgehog, distilled and fine-tuned", losses["softmax, the teacher"]
    return [
        study.Claim("swapping the kernel alone loses (nats)", losses["hedgehog, swapped"] - teacher, ">", 0.1),
        study.Claim("distilling the maps alone gives back (share)", recovered(losses, "hedgehog, distilled"), ">", 0.4),
        study.Claim("distilling and fine-tuning give back (share)", recovered(losses, best), ">", 0.85),
        study.Claim("loss without distilling - with (nats)", losses["hedgehog, fine-tuned"] - losses[best], ">", 0.0),
    ]


def draw(losses: dict[str, float]) -> Figure:
    """Draw held-out losses as points, the teacher's as a line."""
    figure = figures.new_figure(9, 4.5)
    axes = figure.subplots()
    colors = {"softmax": figures.GREY, "hedgehog": figures.BLUE, "elu+1": figures.ORANGE, "taylor": figures.GREEN}
    names = list(losses)[::-1]
    for row, name in enumerate(names):
        axes.plot(losses[name], row, "o", color=colors[name.split(",")[0]], markersize=9)
        below = losses[name] < losses["softmax, the teacher"]
        offset, side = (-9, "right") if below else (9, "left")
        axes.annotate(f"{losses[name]:.3f}", (losses[name], row), (offset, -4), textcoords="offset points", ha=side)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(losses["softmax, the teacher"], color="black", linestyle="--", linewidth=1)
    axes.margins(x=0.12)
    figures.add_grid(axes, axis="x")
    axes.set_xlabel("held-out loss (nats per character); dashed: the teacher")
    axes.set_title("From softmax to linear attention")
    return figure


def own_source() -> str:
    """Return this library's Python source: a text that is there offline."""
    root = Path(linattn.__file__).parent
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study conversion`."""
    study.add_common_arguments(parser, "conversion")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to learn (default: this library's source)"
    )
    parser.add_argument("--steps", type=whole, default=1500, help="of the teacher; later stages take a third (1500)")
    parser.add_argument("--dim", type=whole, default=64, help="width of the model (default %(default)s)")
    parser.add_argument("--context", type=whole, default=128, help="characters in a window (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Convert, print, draw; 0 when every claim holds."""
    study.require_matplotlib()
    text = Characters.from_file(args.text) if args.text else Characters.from_text(own_source())
    config = CausalLMConfig(len(text.alphabet), context=args.context, layers=2, dim=args.dim, heads=2)
    losses = convert(Conversion(text, config, args.out / "stages", args.seed), args.steps)
    rows = [(name, loss, recovered(losses, name)) for name, loss in losses.items()]
    table = text_table(("model", "held-out loss (nats)", "recovered"), rows)
    return study.finish("conversion", f"{table}\n", claims(losses), draw(losses), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "conversion", *sys.argv[1:]]))
