"""Surnames: files and their errors, spelling, duplicates, the model, and both commands."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linattn.cli.main import main
from linattn.errors import CheckpointError, DataError
from linattn.rnn.commands.train_names import score_of
from linattn.rnn.tasks.name_model import NameClassifier
from linattn.rnn.tasks.names import (
    ALPHABET,
    PADDING,
    VOCABULARY,
    Names,
    duplicates,
    embedded_names,
    encode,
    load_names,
    plain,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"Czech": "Novák\nDvořák\n\n", "Polish": "Ślusàrski\nNovak\n", "Irish": "O'Néill\r\n"}
    for language, text in files.items():
        (tmp_path / f"{language}.txt").write_bytes(text.encode())
    (tmp_path / "notes.md").write_text("not a language")
    return tmp_path


def test_alphabet() -> None:
    assert len(ALPHABET) == PADDING == 57
    assert VOCABULARY == 58


def test_folder_and_zip_hold_the_same(folder: Path, tmp_path: Path) -> None:
    names = load_names(folder)
    assert names.languages == ("Czech", "Irish", "Polish")
    assert names.names == ("Novak", "Dvorak", "O'Neill", "Slusarski", "Novak")
    assert names.labels == (0, 0, 1, 2, 2)
    archive = tmp_path / "names.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.glob("*.txt"):
            file.write(path, f"data/names/{path.name}")
        file.writestr("__MACOSX/data/names/._Czech.txt", b"\xff")
    assert load_names(archive) == names


def test_bad_data_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; accepted: a folder or a zip"):
        load_names(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither a folder nor a zip"):
        load_names(folder / "Czech.txt")
    (folder / "Latin.txt").write_bytes("Dvo\xf8\xe1k".encode("latin-1"))
    with pytest.raises(DataError, match=r"Latin.txt in .* is not UTF-8 \(at byte 3\)"):
        load_names(folder)
    (folder / "Latin.txt").write_text("\n123\n")
    with pytest.raises(DataError, match=r"Latin\.txt .* holds no name"):
        load_names(folder)
    for path in folder.glob("*.txt"):
        if path.stem != "Czech":
            path.unlink()
    with pytest.raises(DataError, match="holds 1 files"):
        load_names(folder)
    archive = tmp_path / "twice.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/Czech.txt", "Novak")
        file.writestr("b/Czech.txt", "Novak")
    with pytest.raises(DataError, match=r"two files Czech\.txt"):
        load_names(archive)


@given(st.text(max_size=20))
def test_plain_names_stay_as_they_are(name: str) -> None:
    assert set(plain(name)) <= set(ALPHABET)
    assert plain(plain(name)) == plain(name)


@given(st.lists(st.text(ALPHABET, min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=5))
def test_encoding_can_be_read_back(names: list[str]) -> None:
    tokens, lengths = encode(names)
    for name, row, length in zip(names, tokens.tolist(), lengths.tolist(), strict=True):
        assert "".join(ALPHABET[i] for i in row[:length]) == name.strip()
        assert set(row[length:]) <= {PADDING}


def test_a_name_without_a_letter_is_refused() -> None:
    with pytest.raises(DataError, match="'李'"):
        encode(["Li", "李"])


def test_split_is_a_partition_that_a_seed_repeats() -> None:
    names = embedded_names()
    train, test = names.split(0.8, seed=1)
    assert len(train.names) == int(0.8 * len(names.names))
    pairs = sorted(zip(train.names + test.names, train.labels + test.labels, strict=True))
    assert pairs == sorted(zip(names.names, names.labels, strict=True))
    assert names.split(0.8, seed=1) == (train, test) != names.split(0.8, seed=2)


def test_duplicates() -> None:
    languages = ("A", "B")
    train = Names(languages, ("Lee", "Lee", "Kim", "Ada"), (0, 0, 0, 1))
    test = Names(languages, ("Lee", "Lee", "Ada", "Bob"), (0, 1, 1, 0))
    found = duplicates(train, test)
    assert (found.test_in_train, found.test_same_label) == (3, 2)
    assert found.ambiguous == 1  # Lee
    assert found.repeated == 3  # Lee under A twice more, Ada once


def test_score_counts_what_was_answered() -> None:
    languages = ("A", "B", "C")
    train = Names(languages, ("x", "y", "z"), (1, 1, 0))
    test = Names(languages, ("x", "u", "v", "w"), (1, 1, 0, 1))
    from linattn.training.trainer import Record

    score = score_of(3, train, test, [1, 0, 0, 1], [Record(0, None, 1.5, 0.0, 0.0)])
    assert (score.accuracy, score.majority, score.loss) == (0.75, 0.75, 1.5)
    assert score.unseen == pytest.approx(2 / 3)
    assert score.confusion == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    assert score.recalls() == [1.0, pytest.approx(2 / 3), None]


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_padding_does_not_change_an_answer(cell: str) -> None:
    model = NameClassifier(4, cell, hidden=8, layers=2).eval()
    alone = model(*encode(["Bo"]))
    beside = model(*encode(["Bo", "Papadopoulos"]))
    torch.testing.assert_close(beside[:1], alone)


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="figures")
    out = tmp_path / "out"
    options = ["--hidden", "8", "--batch", "64", "--seeds", "0", "1", "--out", str(out)]
    assert main(["train", "names", "--epochs", "2", *options]) == 0
    assert "always the most frequent" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["names"] == 432
    assert len(results["seeds"]) == 2
    assert sum(map(sum, results["seeds"][0]["confusion"])) == 87
    card = (out / "model-card.md").read_text()
    assert "misuse" in card
    assert "recall" in card.lower()
    assert "most frequent" in card
    for figure in ("confusion.png", "curve.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")

    assert main(["train", "names", "--epochs", "2", *options]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "names", "--epochs", "2", *options, "--lr", "0.5", "--resume"]) == 2
    assert "another lr" in capsys.readouterr().err
    assert main(["train", "names", "--epochs", "3", *options, "--resume"]) == 0
    history = (out / "seed-0" / "history.jsonl").read_text().splitlines()
    assert len(history) == 4

    capsys.readouterr()
    assert main(["names", "predict", "Satoshi", "--run", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Satoshi") == 3
    assert "model card" in printed
    assert main(["names", "predict", "Satoshi", "--run", str(tmp_path / "nowhere")]) == 2
    assert "linattn train names" in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    from linattn.rnn.tasks.name_model import saved_classifier
    from linattn.training.checkpoint import write_checkpoint

    write_checkpoint(tmp_path / "checkpoint.pt", {"model": {}, "settings": {"kernel": "softmax"}})
    with pytest.raises(CheckpointError, match="linattn train names"):
        saved_classifier(tmp_path / "checkpoint.pt")
