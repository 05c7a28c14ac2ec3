"""Who joins whom when Zachary's karate club splits: node classification by graph convolution and graph attention.

Graph convolution, with A the friendships, A~ = A + I and D~ its row sums:

    H_0 = I        H_l = tanh(D~^-1/2 A~ D~^-1/2 H_(l-1) W_l^T)        34 -> 16 -> 2        then linear and softmax

Graph attention replaces the fixed weights by learned ones among the same neighbours:

    H_l,i = tanh(sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j))        sim(q_i, k_j) = A~_ij exp(q_i.k_j / sqrt(d))

The mask is itself a kernel, A~_ij = a_i.e_j with a_i row i of A~ and e_j a unit vector. So [q_i, a_i] and [k_j, e_j] go
into `kernel_attention`, which needs to know nothing of graphs and still works tile by tile. 24 members have labels
in training, 10 are held out; loss and weight decay are averaged over the 24. Plain gradient descent, 5,000 steps.

Zachary's own method, for comparison: the cheapest cut of the graph between the two leaders, where a friendship costs
the number of contexts in which the two met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linattn import kernel_attention
from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.bench.studies.graphs.karate_club import (
    CLUBS,
    INSTRUCTOR,
    MEMBERS,
    OFFICER,
    adjacency,
    capacities,
    clubs,
    edges,
)

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT = (0, 1, 3, 8, 15, 16, 20, 25, 28, 30)
SIZES = (MEMBERS, 16, 2)
LEARNING_RATE, WEIGHT_DECAY = 2e-2, 2.5e-2
EPSILON = 1e-4


class GraphConvolution(nn.Module):
    """Compute tanh(A^ H W^T) with A^ = D~^-1/2 (A + I) D~^-1/2.

    Source: Kipf and Welling 2017, "Semi-supervised classification with graph convolutional networks".
    """

    propagation: Tensor

    def __init__(self, inputs: int, outputs: int, adjacency: Tensor) -> None:
        super().__init__()
        looped = adjacency + torch.eye(len(adjacency), dtype=adjacency.dtype)
        root = looped.sum(1).rsqrt()
        self.register_buffer("propagation", root[:, None] * looped * root)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs, dtype=adjacency.dtype)))

    def forward(self, h: Tensor) -> Tensor:
        """Return `[34, outputs]` of node features `[34, inputs]`."""
        return torch.tanh(self.propagation @ h @ self.weight.mT)


class GraphAttention(nn.Module):
    """tanh of attention among neighbours, in this library's `kernel_attention`; one head of `outputs` dimensions.

    Source: Velickovic et al. 2018, "Graph attention networks", here with products of queries and keys as in Eq. 6.
    """

    neighbours: Tensor
    names: Tensor

    def __init__(self, inputs: int, outputs: int, adjacency: Tensor) -> None:
        super().__init__()
        identity = torch.eye(len(adjacency), dtype=adjacency.dtype)
        self.register_buffer("neighbours", adjacency + identity)
        self.register_buffer("names", identity)
        self.size = outputs
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(outputs, inputs, dtype=adjacency.dtype)) for _ in range(3)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Return `[34, outputs]` of node features `[34, inputs]`."""
        q, k, v = (h @ weight.mT for weight in self.weights)
        q, k = torch.cat((q, self.neighbours), 1), torch.cat((k, self.names), 1)
        return torch.tanh(kernel_attention(q[None, None], k[None, None], v[None, None], sim=self.similarity)[0, 0])

    def similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """Return exp(q.k / sqrt(d)) between neighbours, 0 between others: a product of two kernels."""
        d = self.size
        among_neighbours: Tensor = (q[..., :d] @ k[..., :d].mT / d**0.5).exp() * (q[..., d:] @ k[..., d:].mT)
        return among_neighbours


Layer = Callable[[int, int, Tensor], nn.Module]
LAYERS: dict[str, Layer] = {"graph convolution": GraphConvolution, "graph attention": GraphAttention}


class NodeClassifier(nn.Module):
    """Layers over the whole graph from one-hot features, then a linear layer; `[34, 2]` logits and embeddings."""

    def __init__(self, layer: Layer, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", torch.eye(len(adjacency), dtype=adjacency.dtype))
        self.layers = nn.Sequential(*(layer(a, b, adjacency) for a, b in itertools.pairwise(SIZES)))
        self.head = nn.Linear(SIZES[-1], len(CLUBS), dtype=adjacency.dtype)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the logits `[34, 2]` and the embedding they are read from."""
        embedding = self.layers(self.features)
        return self.head(embedding), embedding


@dataclass(frozen=True)
class Trained:
    """A trained network: curves over the epochs (index 0 training, 1 held out), and how it ended."""

    losses: tuple[list[float], list[float]]
    accuracies: tuple[list[float], list[float]]
    embedding: Tensor
    wrong: list[int]


def held_out() -> Tensor:
    """Return `[34]` bool: True for the members whose club is not seen in training."""
    mask = torch.zeros(MEMBERS, dtype=torch.bool)
    mask[list(HELD_OUT)] = True
    return mask


def train(layer: Layer, epochs: int, seed: int) -> Trained:
    """Train by full-batch gradient descent on the mean cross entropy of the 24, in float64."""
    torch.manual_seed(seed)
    net = NodeClassifier(layer, adjacency(torch.float64))
    labels, test = clubs(), held_out()
    decay = WEIGHT_DECAY / int((~test).sum())
    matrices = [p for p in net.parameters() if p.ndim == 2]
    biases = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}], lr=LEARNING_RATE
    )
    losses: tuple[list[float], list[float]] = ([], [])
    accuracies: tuple[list[float], list[float]] = ([], [])

    def evaluate(logits: Tensor) -> Tensor:
        each = F.cross_entropy(logits, labels, reduction="none")
        right = logits.argmax(1) == labels
        for index, mask in enumerate((~test, test)):
            losses[index].append(each.detach()[mask].mean().item())
            accuracies[index].append(right[mask].double().mean().item())
        return each[~test].mean()

    for _ in range(epochs):
        loss = evaluate(net()[0])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        logits, embedding = net()
        evaluate(logits)
    wrong = (logits.argmax(1) != labels).nonzero().flatten().tolist()
    return Trained(losses, accuracies, embedding, wrong)


def gradient_error(layer: Layer, seed: int) -> float:
    """Compute |g - c| / (|g| + |c|) for the gradient g of the training loss and c, by central differences in every
    parameter.

    c = (L(w + eps) - L(w - eps)) / (2 eps)
    """
    torch.manual_seed(seed)
    net = NodeClassifier(layer, adjacency(torch.float64))
    labels, seen = clubs(), ~held_out()

    def loss() -> Tensor:
        return F.cross_entropy(net()[0][seen], labels[seen])

    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), list(net.parameters()))])
    differences = []
    with torch.no_grad():
        for parameter in net.parameters():
            flat = parameter.view(-1)
            for index in range(len(flat)):
                original = flat[index].item()
                ends = []
                for moved in (original + EPSILON, original - EPSILON):
                    flat[index] = moved
                    ends.append(loss().item())
                flat[index] = original
                differences.append((ends[0] - ends[1]) / (2 * EPSILON))
    central = torch.tensor(differences, dtype=torch.float64)
    return float((gradient - central).norm() / (gradient.norm() + central.norm()))


def zachary() -> list[int]:
    """Find the members whom Zachary's own method assigns wrongly: the cheapest cut between the two leaders.

    Ford and Fulkerson's maximum flow along shortest paths (Edmonds and Karp 1972); the cut separates those whom the
    instructor still reaches through spare capacity.
    """
    spare = capacities().tolist()
    while True:
        came_from = {INSTRUCTOR: INSTRUCTOR}
        queue = [INSTRUCTOR]
        for member in queue:
            reached = [other for other in range(MEMBERS) if spare[member][other] and other not in came_from]
            came_from.update(dict.fromkeys(reached, member))
            queue += reached
        if OFFICER not in came_from:
            break
        path, member = [], OFFICER
        while member != INSTRUCTOR:
            path.append((came_from[member], member))
            member = came_from[member]
        flow = min(spare[first][second] for first, second in path)
        for first, second in path:
            spare[first][second] -= flow
            spare[second][first] += flow
    return [member for member, club in enumerate(clubs().tolist()) if (member not in came_from) != club]


def claims_of(trained: dict[str, Trained], errors: dict[str, float], by_zachary: Sequence[int]) -> list[study.Claim]:
    """Claim that both networks learn the split from 24 labels; convolution misses exactly the member that Zachary's
    method did.
    """
    claims = []
    for name, result in trained.items():
        claims += [
            study.Claim(f"{name}: accuracy on the 24 members of training", result.accuracies[0][-1], ">=", 1.0),
            study.Claim(f"{name}: accuracy on the 10 members held out", result.accuracies[1][-1], ">=", 0.9),
            study.Claim(f"{name}: relative error of the gradient, by central differences", errors[name], "<=", 1e-7),
        ]
    others = set(trained["graph convolution"].wrong) - set(by_zachary)
    claims.append(study.Claim("Zachary's own method: members wrong", len(by_zachary), "==", 1))
    claims.append(
        study.Claim("graph convolution: members wrong whom Zachary's own method gets right", len(others), "==", 0)
    )
    return claims


def positions(seed: int = 3, rounds: int = 300) -> Tensor:
    """Place the members, `[34, 2]`: friends pulled together, all pushed apart (Fruchterman and Reingold 1991), leaders
    side by side.
    """
    a = adjacency()
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(MEMBERS, 2, generator=generator)
    ideal = 0.6
    for step in range(rounds):
        apart = place[:, None] - place
        distance = apart.norm(dim=2).clamp(min=1e-2)
        force = (ideal**2 / distance**2 - a * distance / ideal)[..., None] * apart / distance[..., None]
        move = force.sum(1)
        length = move.norm(dim=1, keepdim=True).clamp(min=1e-6)
        place = place + move / length * length.clamp(max=0.3 * (1 - step / rounds))
    place = place - place.mean(0)
    axis = F.normalize(place[OFFICER] - place[INSTRUCTOR], dim=0)
    turn = torch.stack((axis, torch.stack((-axis[1], axis[0]))))
    return place @ turn.mT


def draw(trained: dict[str, Trained], by_zachary: Sequence[int]) -> Figure:
    """Draw the graph with both clubs, then for each network its embedding, losses and accuracies."""
    figure = figures.new_figure(15, 9)
    grid: Any = figure.add_gridspec(2, 4, width_ratios=(1.35, 1, 1, 1))
    _draw_graph(figure.add_subplot(grid[:, 0]), trained["graph convolution"].wrong, by_zachary)
    for row, (name, result) in enumerate(trained.items()):
        _draw_embedding(figure.add_subplot(grid[row, 1]), name, result)
        curves = figure.add_subplot(grid[row, 2])
        rates = figure.add_subplot(grid[row, 3])
        for index, (label, color) in enumerate((("24 in training", figures.BLUE), ("10 held out", figures.ORANGE))):
            curves.plot(result.losses[index], color=color, label=label)
            rates.plot([100 * share for share in result.accuracies[index]], color=color, label=label)
        curves.set(title=f"{name}: loss", ylabel="mean cross entropy (nats)", yscale="log")
        rates.set(title=f"{name}: accuracy", ylabel="members assigned rightly (%)", ylim=(0, 105))
        for axes in (curves, rates):
            axes.set_xlabel("epoch")
            figures.add_grid(axes)
            axes.legend()
    return figure


def _draw_graph(axes: Axes, wrong: Sequence[int], by_zachary: Sequence[int]) -> None:
    place = positions()
    labels, test = clubs(), held_out()
    for first, second in edges():
        axes.plot(*_columns(place[[first, second]]), color=figures.GREY, linewidth=0.6, alpha=0.6, zorder=1)
    for club, color in enumerate((figures.BLUE, figures.ORANGE)):
        for is_test, marker in ((False, "o"), (True, "s")):
            mask = (labels == club) & (test == is_test)
            where = "held out" if is_test else "in training"
            axes.scatter(
                *_columns(place[mask]),
                s=230,
                color=color,
                marker=marker,
                zorder=2,
                label=f"joined {CLUBS[club]}, {where}",
            )
    for member in range(MEMBERS):
        axes.annotate(str(member), _point(place[member]), ha="center", va="center", fontsize=8, color="white", zorder=3)
    for members, size, color, label in (
        (wrong, 450, "black", "convolution is wrong"),
        (by_zachary, 900, figures.VERMILION, "Zachary's own method is wrong"),
    ):
        style: dict[str, Any] = {"s": size, "facecolors": "none", "edgecolors": color, "linewidths": 2, "zorder": 4}
        axes.scatter(*_columns(place[list(members)]), label=label, **style)
    axes.set(title="78 friendships, two clubs\n(0 is Mr. Hi, 33 the officer)", xticks=[], yticks=[])
    axes.margins(0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, markerscale=0.5)


def _draw_embedding(axes: Axes, name: str, result: Trained) -> None:
    labels = clubs()
    for club, color in enumerate((figures.BLUE, figures.ORANGE)):
        mask = labels == club
        axes.scatter(*_columns(result.embedding[mask]), s=36, color=color, alpha=0.8, label=f"joined {CLUBS[club]}")
    for member in {*result.wrong, INSTRUCTOR, OFFICER}:
        note = f"{member} (wrong)" if member in result.wrong else str(member)
        axes.annotate(note, _point(result.embedding[member]), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.margins(0.18)
    axes.locator_params(nbins=5)
    axes.set(title=f"{name}: embedding", xlabel="second layer, unit 1", ylabel="second layer, unit 2")
    figures.add_grid(axes)
    axes.legend()


def _columns(points: Tensor) -> tuple[list[float], list[float]]:
    return points[:, 0].tolist(), points[:, 1].tolist()


def _point(point: Tensor) -> tuple[float, float]:
    return point[0].item(), point[1].item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study karate`."""
    study.add_common_arguments(parser, "karate")
    parser.add_argument("--epochs", type=whole, default=5_000, help="of gradient descent (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train both, check both gradients, print, draw."""
    study.require_matplotlib()
    errors = {name: gradient_error(layer, args.seed) for name, layer in LAYERS.items()}
    trained = {name: train(layer, args.epochs, args.seed) for name, layer in LAYERS.items()}
    text = text_table(
        ("network", "loss 24", "loss 10", "right of 24 (%)", "right of 10 (%)", "wrong members", "gradient error"),
        [
            (
                name,
                result.losses[0][-1],
                result.losses[1][-1],
                100 * result.accuracies[0][-1],
                100 * result.accuracies[1][-1],
                ", ".join(map(str, result.wrong)) or "none",
                errors[name],
            )
            for name, result in trained.items()
        ],
    )
    by_zachary = zachary()
    text += f"\nZachary's own method, the cheapest cut of the graph, is wrong about: {', '.join(map(str, by_zachary))}"
    return study.finish("karate", text, claims_of(trained, errors, by_zachary), draw(trained, by_zachary), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "karate", *sys.argv[1:]]))
