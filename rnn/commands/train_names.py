"""`linattn train names`: learn which language a surname comes from, and say where such a model misleads.

What a training leaves in its folder: `results.json`, `confusion.png`, `curve.png`, `model-card.md`, and for each seed a
folder with `checkpoint.pt` and `history.jsonl`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn._util import figures
from linattn._util.environment import describe
from linattn._util.files import write_json, write_text
from linattn._util.tables import text_table
from linattn.errors import ArgumentError, refusal
from linattn.rnn.commands.common import add_counts, add_run_arguments, mean_and_sd, require_matplotlib
from linattn.rnn.tasks.name_model import CELLS, NameClassifier
from linattn.rnn.tasks.names import Duplicates, Names, duplicates, embedded_names, encode, load_names
from linattn.training.resume import train_or_resume
from linattn.training.trainer import Record, Trainer, TrainingConfig

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure


POOL = 20
"""Batches that are drawn at random together before they are sorted by length."""


@dataclass(frozen=True)
class Score:
    """How one trained model does on its test names.

    Attributes:
        accuracy, loss: share of right answers, and cross entropy in nats.
        majority: accuracy of always naming the language that is most frequent in training.
        unseen: accuracy on the test names whose spelling is not in the training set.
        confusion: names by true language (rows) and answer (columns).
    """

    seed: int
    accuracy: float
    loss: float
    majority: float
    unseen: float
    confusion: list[list[int]]
    duplicates: Duplicates
    history: list[Record]

    def recalls(self) -> list[float | None]:
        """Compute the share of each language's test names that is recognised; None where there are none."""
        return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(self.confusion)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the names, the network, and its training."""
    parser.add_argument("--data", type=Path, help="folder or zip archive of LANGUAGE.txt files (the embedded names)")
    parser.add_argument("--cell", choices=sorted(CELLS), default="lstm", help="(%(default)s)")
    counts = (
        ("hidden", 128, "width of embedding and layers"),
        ("layers", 1, "layers"),
        ("batch", 64, "names in a step"),
        ("epochs", 20, "passes over the training names"),
    )
    add_counts(parser, counts)
    parser.add_argument("--dropout", type=float, default=0.4, help="of the last state (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam (%(default)s)")
    parser.add_argument(
        "--final-lr", type=float, default=0.02, help="share of it that is left at the end of a cosine (%(default)s)"
    )
    add_run_arguments(parser, "names")


def run(args: argparse.Namespace) -> int:
    """Train a model for each seed, then write what they learned and where they fail."""
    require_matplotlib()
    for name in ("batch", "epochs"):
        if getattr(args, name) < 1:
            raise refusal(
                ArgumentError, f"{name} is too small", given=f"{name}={getattr(args, name)}", accepted="at least 1"
            )
    names = embedded_names() if args.data is None else load_names(args.data)
    scores = []
    for seed in args.seeds:
        score = train_one(names, seed, args)
        if score is None:
            return 130
        print(f"seed {seed}: {score.accuracy:.1%} of the test names, always the most frequent: {score.majority:.1%}")
        scores.append(score)
    write_results(names, scores, args)
    return 0


def train_one(names: Names, seed: int, args: argparse.Namespace) -> Score | None:
    """Train on four fifths of the names, test on the rest; None when interrupted."""
    training, test = names.split(0.8, seed)
    tokens, lengths = encode(training.names)
    labels = torch.tensor(training.labels)
    test_tokens, test_lengths = encode(test.names)
    test_labels = torch.tensor(test.labels)
    torch.manual_seed(seed)
    shape = {name: getattr(args, name) for name in ("cell", "hidden", "layers", "dropout")}
    model = NameClassifier(len(names.languages), **shape)
    rates = {name: getattr(args, name) for name in ("batch", "lr", "final_lr")}
    steps_per_epoch = -(-len(labels) // args.batch)

    @lru_cache(maxsize=1)
    def batches(epoch: int) -> list[Tensor]:
        return batches_by_length(lengths, args.batch, torch.Generator().manual_seed(seed * 1_000_003 + epoch))

    def loss(step: int) -> Tensor:
        epoch, batch = divmod(step, steps_per_epoch)
        chosen = batches(epoch)[batch]
        longest = int(lengths[chosen].max())
        return F.cross_entropy(model(tokens[chosen, :longest], lengths[chosen]), labels[chosen])

    def test_logits() -> Tensor:
        logits: Tensor = model(test_tokens, test_lengths)
        return logits

    trainer = Trainer(
        model,
        loss,
        lambda: F.cross_entropy(test_logits(), test_labels).item(),
        TrainingConfig.adam(
            steps=args.epochs * steps_per_epoch,
            learning_rate=args.lr,
            validate_every=steps_per_epoch,
            final_learning_rate=args.final_lr,
        ),
        folder=args.out / f"seed-{seed}",
        settings={**shape, "seed": seed, **rates, "languages": list(names.languages)},
    )
    if not train_or_resume(trainer, args):
        return None
    model.eval()
    with torch.no_grad():
        answers = test_logits().argmax(-1).tolist()
    return score_of(seed, training, test, answers, trainer.history)


def batches_by_length(lengths: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Draw random batches of names of about one length, as indices, so that little is computed for padding.

    >>> lengths = torch.tensor([3, 9, 4, 8, 5])
    >>> [lengths[b].tolist() for b in batches_by_length(lengths, 2, torch.Generator().manual_seed(0))]
    [[5, 4], [3], [9, 8]]
    """
    order = torch.randperm(len(lengths), generator=generator)
    batches: list[Tensor] = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[lengths[pool].argsort(stable=True, descending=True)]
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def score_of(seed: int, training: Names, test: Names, answers: list[int], history: list[Record]) -> Score:
    """Count the answers given to the test names."""
    right = [answer == label for answer, label in zip(answers, test.labels, strict=True)]
    counts = training.counts()
    most_frequent = counts.index(max(counts))
    known = set(training.names)
    unseen = [ok for ok, name in zip(right, test.names, strict=True) if name not in known]
    confusion = [[0] * len(test.languages) for _ in test.languages]
    for answer, label in zip(answers, test.labels, strict=True):
        confusion[label][answer] += 1
    return Score(
        seed=seed,
        accuracy=sum(right) / len(right),
        loss=history[-1].validation_loss,
        majority=test.labels.count(most_frequent) / len(test.labels),
        unseen=sum(unseen) / len(unseen) if unseen else 0.0,
        confusion=confusion,
        duplicates=duplicates(training, test),
        history=history,
    )


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation over the seeds, for the result file."""
    return dict(zip(("mean", "sd"), mean_and_sd(values), strict=True))


def write_results(names: Names, scores: list[Score], args: argparse.Namespace) -> None:
    """Write results.json, the figures and the model card; print the table of languages."""
    recalls = {
        language: [recall for score in scores if (recall := score.recalls()[label]) is not None]
        for label, language in enumerate(names.languages)
    }
    results: dict[str, Any] = {
        "settings": {
            **{
                name: getattr(args, name)
                for name in ("cell", "hidden", "layers", "dropout", "batch", "lr", "final_lr", "epochs")
            },
            "data": "embedded" if args.data is None else args.data.name,
            "seeds": args.seeds,
        },
        "names": len(names.names),
        "languages": dict(zip(names.languages, names.counts(), strict=True)),
        "accuracy": spread([score.accuracy for score in scores]),
        "majority_baseline": spread([score.majority for score in scores]),
        "accuracy_on_unseen_spellings": spread([score.unseen for score in scores]),
        "recall": {language: spread(found) for language, found in recalls.items() if found},
        "seeds": [asdict(score) for score in scores],
        "environment": asdict(describe(torch.device("cpu"))),
    }
    card = model_card(results, scores)
    write_json(args.out / "results.json", results)
    write_text(args.out / "model-card.md", card)
    for name, figure in (("confusion", draw_confusion(names.languages, scores)), ("curve", draw_curves(scores))):
        figures.save(figure, args.out / f"{name}.png")
    print(_recall_table(results))
    print(f"\n{_accuracy_lines(results)}\nresults, figures and model card in {args.out}")


def _recall_table(results: dict[str, Any]) -> str:
    return text_table(
        ("language", "names", "recall", "sd"),
        [
            (language, results["languages"][language], recall["mean"], recall["sd"])
            for language, recall in sorted(results["recall"].items(), key=lambda item: item[1]["mean"])
        ],
    )


def _accuracy_lines(results: dict[str, Any]) -> str:
    accuracy, majority, unseen = (
        results[name] for name in ("accuracy", "majority_baseline", "accuracy_on_unseen_spellings")
    )
    return (
        f"accuracy {accuracy['mean']:.1%} (standard deviation {accuracy['sd']:.1%}, seeds: {len(results['seeds'])}),\n"
        f"{unseen['mean']:.1%} on spellings not seen in training; "
        f"always the most frequent language: {majority['mean']:.1%}"
    )


def model_card(results: dict[str, Any], scores: list[Score]) -> str:
    """Write down the model's data, results and limits, and the uses that are misuse."""
    settings, recalls, shared = results["settings"], results["recall"], scores[0].duplicates
    tested = sum(map(sum, scores[0].confusion))
    ordered = sorted(recalls, key=lambda language: recalls[language]["mean"])
    worst = ", ".join(f"{recalls[language]['mean']:.0%} ({language})" for language in ordered[:3])
    best = f"{recalls[ordered[-1]]['mean']:.0%} ({ordered[-1]})"
    largest = max(results["languages"], key=results["languages"].get)
    return f"""# Model card: which language does a surname come from?

A character model ({settings["cell"]}, layers: {settings["layers"]} of {settings["hidden"]}, dropout
{settings["dropout"]}), trained for {settings["epochs"]} epochs on four fifths of {results["names"]} surnames in
{len(recalls)} languages (data: {settings["data"]}). Input: letters without accents. Output: a probability for each
language.

- On the other fifth: {_accuracy_lines(results)}.
- **Read the recall of a language, not the accuracy.** {largest} makes up {results["languages"][largest]} of
  {results["names"]} names: whoever always answers that is right in as many cases. Recall reaches from
  {worst} to {best}.
- **Test and training overlap.** Of {tested} test names, {shared.test_in_train} are spelled like a training name,
  {shared.test_same_label} of them in the same language; {shared.ambiguous} spellings stand under two languages or
  more, which no model can tell apart, and {shared.repeated} entries repeat another (split of seed {scores[0].seed}).

## Not for people

A spelling says little about a person: names are taken on marriage, changed at borders, given by adoption, and carried
for generations by people who speak another language. The labels are one compiler's lists of a few languages out of
thousands, unequally represented, and a name from anywhere else still gets a confident answer. Using such a guess to
infer ethnicity, nationality, origin or religion, or to decide about anybody (hiring, lending, policing, moderation,
prices), is misuse: wrong most often for those who are few in the data, and discrimination even where it is right. The
model is made to study recurrent networks, and for nothing else.

## Recall of each language

```
{_recall_table(results)}
```
"""


def draw_confusion(languages: tuple[str, ...], scores: list[Score]) -> Figure:
    """Draw the answers to the test names of all seeds, as shares of each true language."""
    counts = torch.tensor([score.confusion for score in scores]).sum(0)
    totals = counts.sum(1, keepdim=True)
    shares = counts / totals.clamp(min=1)
    figure = figures.new_figure(10.5, 9)
    axes = figure.subplots()
    image = axes.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(languages)), languages, rotation=60, ha="right")
    labels = [f"{language} ({n})" for language, n in zip(languages, totals[:, 0].tolist(), strict=True)]
    axes.set_yticks(range(len(languages)), labels)
    axes.set(xlabel="answer of the model", ylabel="true language (test names)")
    for row in range(len(languages)):
        for column in range(len(languages)):
            percent = round(100 * shares[row, column].item())
            if percent:
                dark = shares[row, column] > 0.5
                axes.text(
                    column, row, str(percent), ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
    figure.colorbar(image, ax=axes, label="share of the true language's names", shrink=0.8)
    many = f", {len(scores)} seeds together" if len(scores) > 1 else ""
    axes.set_title(f"Where surnames are taken for others' (percent of each row{many})")
    return figure


def draw_curves(scores: list[Score]) -> Figure:
    """Draw the losses of every seed over the epochs."""
    figure = figures.new_figure(7, 4)
    axes = figure.subplots()
    for index, score in enumerate(scores):
        epochs = range(len(score.history))
        trained = [record.train_loss for record in score.history[1:] if record.train_loss is not None]
        first = index == 0
        axes.plot(
            epochs[1:], trained, color=figures.BLUE, alpha=0.7, label="training, mean of the epoch" if first else None
        )
        tested = [record.validation_loss for record in score.history]
        axes.plot(epochs, tested, color=figures.VERMILION, alpha=0.7, label="test" if first else None)
    axes.set(
        xlabel="epochs", ylabel="cross entropy (nats)", title=f"Surnames: loss, a line for each of {len(scores)} seeds"
    )
    axes.set_ylim(bottom=0)
    figures.add_grid(axes)
    axes.legend()
    return figure
