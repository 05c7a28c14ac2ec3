"""Reading sets: IDX files and what can be wrong with them, downloads, splits, samples of one's own."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linattn.autoencoders import SampleSet, load_mnist, load_set, read_idx
from linattn.autoencoders.data import mnist, sets
from linattn.autoencoders.data.mnist import Part, download_mnist
from linattn.errors import ArgumentError, DataError, MissingExtraError


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small files that stand in for MNIST's, and the checksums to go with them."""
    folder = tmp_path / "server"
    folder.mkdir()
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (30, 4, 5)),
        np.arange(30) % 10,
        random.integers(0, 256, (20, 4, 5)),
        np.arange(20) % 10,
    ]
    parts = []
    for part, array in zip(mnist.PARTS, arrays, strict=True):
        content = idx(array.astype(np.uint8))
        (folder / f"{part.name}.gz").write_bytes(gzip.compress(content, mtime=0))
        parts.append(Part(part.name, array.shape, hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(mnist, "PARTS", tuple(parts))
    return folder


# ---- IDX files ------------------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), packed=st.booleans(), data=st.data())
def test_idx_files_come_back_as_they_went(tmp_path: Path, shape: list[int], packed: bool, data: st.DataObject) -> None:
    size = math.prod(shape)
    array = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(shape)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx(array), mtime=0) if packed else idx(array))
    found = read_idx(path)
    assert found.dtype == torch.uint8
    assert list(found.shape) == shape
    assert np.array_equal(found.numpy(), array)
    assert torch.equal(read_idx(path, sha256=hashlib.sha256(idx(array)).hexdigest()), found)


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-9], r"a\.gz cannot be read: .*; accepted: a complete file"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:4], "cannot be read"),
        ("a.gz", GOOD, r"cannot be read: Not a gzipped file"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), "cannot be read: CRC check failed"),
        ("a.gz", gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 9, "cannot be read"),
        ("a", b"", "begins with nothing; expected the magic number"),
        ("a", b"\0\0\x0d\x01" + GOOD[4:], "begins with 00 00 0d 01; expected the magic number 00 00 08 0n"),
        ("a", b"\0\0\x08\0", "expected the magic number"),
        ("a", GOOD[:-1], r"has 17 bytes; expected 18, as its header says shape \[2, 3\]"),
        ("a", GOOD + b"!", "has 19 bytes; expected 18"),
        ("a", GOOD[:6], "has 6 bytes; expected"),
    ],
)
def test_damaged_idx_files_are_named_with_what_was_expected(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_missing_files_and_wrong_checksums_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*nothing; accepted"):
        read_idx(tmp_path / "nothing")
    (tmp_path / "a").write_bytes(GOOD)
    right = hashlib.sha256(GOOD).hexdigest()
    with pytest.raises(DataError, match=f"a has checksum {right} .*; expected 00ff"):
        read_idx(tmp_path / "a", sha256="00ff")


def test_mnist_from_files_packed_or_not(tiny: Path) -> None:
    before = load_mnist(tiny)
    assert [tuple(part.shape) for part in before] == [(30, 4, 5), (30,), (20, 4, 5), (20,)]
    assert before.train_labels.dtype == torch.int64
    packed = tiny / "train-images-idx3-ubyte.gz"
    (tiny / "train-images-idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert torch.equal(load_mnist(tiny).train_images, before.train_images)
    (tiny / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"there is no t10k-labels-idx1-ubyte\.gz .* --data FOLDER .* --download"):
        load_mnist(tiny)


def test_other_files_under_mnists_names_are_refused(tiny: Path) -> None:
    (tiny / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(30, np.uint8))))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz has checksum"):
        load_mnist(tiny)


# ---- Download -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tiny: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tiny))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_download_fills_the_cache_once(
    server: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mnist, "download_mnist", functools.partial(download_mnist, mirrors=(server,)))
    found = load_mnist(download=True)
    assert torch.equal(found.train_images, load_mnist(tiny).train_images)
    kept = tmp_path / "cache" / "linattn" / "mnist"
    assert {path.name for path in kept.iterdir()} == {f"{part.name}.gz" for part in mnist.PARTS}
    for path in tiny.iterdir():
        path.unlink()
    assert torch.equal(load_mnist(download=True).test_images, found.test_images)


def test_a_bad_mirror_is_passed_over_and_leaves_nothing(server: str, tiny: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in tiny.iterdir():
        (bad / path.name).write_bytes(gzip.compress(idx(np.zeros(3, np.uint8))))
    folder = tmp_path / "there"
    download_mnist(folder, [bad.as_uri(), server])
    assert torch.equal(load_mnist(folder).train_labels, load_mnist(tiny).train_labels)

    nowhere = tmp_path / "nowhere"
    with pytest.raises(DataError, match=r"could not be fetched .*bad.*checksum .*missing"):
        download_mnist(nowhere, [bad.as_uri(), (tmp_path / "missing").as_uri()])
    assert not list(nowhere.iterdir())


def test_nothing_is_fetched_unasked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="--download"):
        load_set("mnist")
    assert not (tmp_path / "cache").exists()


# ---- Sets -----------------------------------------------------------------------------------------------------------


def splits_are_disjoint_and_whole(data: SampleSet, x: torch.Tensor) -> None:
    together = torch.cat([split.x for split in data[1:4]])
    assert together.shape == x.shape
    assert torch.equal(together.sort(0).values, x.sort(0).values)


def test_digits_are_split_by_the_seed_alone() -> None:
    pytest.importorskip("sklearn", reason="the handwritten digits need scikit-learn")
    data = load_set("digits")
    assert [len(split.x) for split in data[1:4]] == [1078, 360, 359]
    assert data.image_shape == (8, 8)
    assert data.classes == 10
    assert data.input_size == 64
    assert data.train.x.min() == 0
    assert data.train.x.max() == 1
    splits_are_disjoint_and_whole(data, sets.load_digits().x)
    assert torch.equal(load_set("digits").test.x, data.test.x)
    assert not torch.equal(load_set("digits", seed=1).test.x, data.test.x)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"linattn\[studies\]"):
        load_set("digits")


def test_mnists_own_test_images_stay_the_test_split() -> None:
    """The real files, where a download or a copy lies in the cache."""
    if not mnist.cache_folder().is_dir():
        pytest.skip(f"no MNIST in {mnist.cache_folder()}")
    data, files = load_set("mnist"), load_mnist()
    assert [len(split.x) for split in data[1:4]] == [36_000, 24_000, 10_000]
    assert torch.equal((data.test.x * 255).round().to(torch.uint8).view(-1, 28, 28), files.test_images)
    assert data.image_shape == (28, 28)
    assert data.classes == 10
    assert torch.equal(torch.cat([data.train.y, data.valid.y]).bincount(), files.train_labels.bincount())


@pytest.mark.parametrize("labelled", [True, False])
def test_a_file_of_ones_own(tmp_path: Path, labelled: bool) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3, 2))
    path = tmp_path / "own.npz"
    np.savez(path, x=x, **({"y": np.arange(50) % 4} if labelled else {}))
    data = load_set("file", data=path)
    assert [len(split.x) for split in data[1:4]] == [30, 10, 10]
    splits_are_disjoint_and_whole(data, torch.tensor(x.reshape(50, 6), dtype=torch.float32))
    assert data.has_labels is labelled
    assert data.classes == (4 if labelled else 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([[1.0, np.nan]] * 9)}, r"x in .*own\.npz has 9 entries that are NaN or infinite"),
        ({"x": np.full((9, 2), np.inf)}, "NaN or infinite"),
        ({"z": np.ones((9, 2))}, r"holds \['z'\]; accepted: x"),
        ({"x": np.ones(9)}, r"shape \[9\]; accepted: real numbers"),
        ({"x": np.ones((9, 2), complex)}, "complex128"),
        ({"x": np.array([["a"]] * 9)}, "accepted: real numbers"),
        ({"x": np.ones((9, 2)), "y": np.zeros(8, int)}, r"y in .* shape \[8\]; accepted: integers from 0, \[9\]"),
        ({"x": np.ones((9, 2)), "y": np.zeros(9)}, "float64"),
        ({"x": np.ones((9, 2)), "y": np.full(9, -1)}, "integers from 0"),
        ({"x": np.ones((4, 2))}, "4 samples; accepted: at least 5"),
        ({"x": np.ones((0, 2))}, r"shape \[0, 2\]; accepted: real numbers"),
    ],
)
def test_bad_files_of_ones_own(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_set("file", data=tmp_path / "own.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY"])
def test_files_that_are_no_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"own\.npz cannot be read"):
        load_set("file", data=tmp_path / "own.npz")
    np.save(tmp_path / "one.npy", np.ones((9, 2)))
    with pytest.raises(DataError, match=r"one\.npy cannot be read"):
        load_set("file", data=tmp_path / "one.npy")
    with pytest.raises(DataError, match="there is no file"):
        load_set("file", data=tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, "unknown set 'digit'; .* Did you mean 'digits'"),
        ("digits", {"data": Path("x")}, "accepted: data for 'mnist' or 'file'"),
        ("file", {}, "without data"),
        ("synthetic", {"variance_scale": -1.0}, "variance_scale"),
    ],
)
def test_bad_choices_of_a_set(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_set(name, **options)
