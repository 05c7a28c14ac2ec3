from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError, CheckpointError, MissingExtraError
from linattn.training.checkpoint import CHECKPOINT_NAME, HISTORY_NAME, read_checkpoint, write_checkpoint
from linattn.training.tracking import TensorBoardTracker
from linattn.training.trainer import Trainer, TrainingConfig


def make(
    folder: Path | None = None, *, width: int = 8, on_step: Any = None, tracker: Any = None, **limits: Any
) -> Trainer:
    """A small net with dropout, so that a forgotten random state shows, on data that depend on the step alone."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1))

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        return x, x.prod(dim=1, keepdim=True)

    def loss(step: int) -> Tensor:
        if on_step is not None:
            on_step(step)
        x, y = batch(step)
        return (model(x) - y).square().mean()

    def validate() -> float:
        x, y = batch(10**6)
        return (model(x) - y).square().mean().item()

    config = TrainingConfig(**{"steps": 20, "validate_every": 6, "learning_rate": 0.01, **limits})
    return Trainer(model, loss, validate, config, folder=folder, settings={"width": width}, tracker=tracker)


def outcome(trainer: Trainer) -> list[tuple[Any, ...]]:
    return [(r.step, r.train_loss, r.validation_loss, r.learning_rate) for r in trainer.history]


def test_training_lowers_the_loss_and_keeps_its_history(tmp_path: Path) -> None:
    seen: list[int] = []
    trainer = make(tmp_path, steps=200, validate_every=60, on_step=seen.append)
    assert trainer.run() is True
    assert seen == list(range(200))
    assert [r.step for r in trainer.history] == [0, 60, 120, 180, 200]
    assert trainer.history[0].train_loss is None
    assert trainer.history[-1].validation_loss < trainer.history[0].validation_loss
    lines = [json.loads(line) for line in (tmp_path / HISTORY_NAME).read_text().splitlines()]
    assert [line["validation_loss"] for line in lines] == [r.validation_loss for r in trainer.history]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_train_loss_is_the_mean_since_the_line_before() -> None:
    losses: list[float] = []
    trainer = make(steps=9, validate_every=6)
    real = trainer.loss

    def loss(step: int) -> Tensor:
        losses.append((value := real(step)).item())
        return value

    trainer.loss = loss
    trainer.run()
    assert trainer.history[1].train_loss == pytest.approx(sum(losses[:6]) / 6, rel=1e-6)
    assert trainer.history[2].train_loss == pytest.approx(sum(losses[6:]) / 3, rel=1e-6)


def test_validation_is_in_evaluation_mode_and_training_is_not() -> None:
    modes: dict[str, set[bool]] = {"train": set(), "validate": set()}
    trainer = make(on_step=lambda step: modes["train"].add(trainer.model.training))
    real = trainer.validate
    trainer.validate = lambda: (modes["validate"].add(trainer.model.training), real())[1]
    trainer.run()
    assert modes == {"train": {True}, "validate": {False}}


@pytest.mark.parametrize("stop", [1, 6, 9])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = make()
    assert whole.run()

    def interrupt(step: int) -> None:
        if step == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)

    first = make(tmp_path, on_step=interrupt)
    assert first.run() is False
    assert first.step == stop
    torch.randn(5)  # another session draws other numbers meanwhile
    second = make(tmp_path)
    torch.manual_seed(99)
    second.restore(read_checkpoint(tmp_path / CHECKPOINT_NAME), tmp_path / CHECKPOINT_NAME)
    assert second.run()

    assert outcome(second) == outcome(whole)
    for (name, there), here in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(there, here), name
    assert read_checkpoint(tmp_path / CHECKPOINT_NAME)["settings"] == {"width": 8}
    assert len((tmp_path / HISTORY_NAME).read_text().splitlines()) == len(whole.history)


def test_a_run_resumed_at_its_end_is_left_as_it_is(tmp_path: Path) -> None:
    make(tmp_path).run()
    again = make(tmp_path, on_step=lambda step: pytest.fail("trained on"))
    again.restore(read_checkpoint(tmp_path / CHECKPOINT_NAME), tmp_path)
    assert again.run() is True
    assert again.step == 20


def test_second_interrupt_stops_at_once_and_the_handler_comes_back(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # A test run in the background may have been started with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt_twice(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the signal arrives here at the latest

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, on_step=interrupt_twice).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert read_checkpoint(tmp_path / CHECKPOINT_NAME)["step"] == 0


def test_a_run_killed_in_its_first_step_leaves_its_own_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT_NAME
    write_checkpoint(path, {"settings": {"width": "of an earlier run"}})

    class Killed(BaseException):
        pass

    trainer = make(tmp_path)

    def kill() -> float:
        raise Killed

    trainer.validate = kill
    with pytest.raises(Killed):
        trainer.run()
    assert read_checkpoint(path)["settings"] == {"width": 8}
    whole = make()
    assert whole.run()
    again = make()
    again.restore(read_checkpoint(path), path)
    assert again.run()
    assert outcome(again) == outcome(whole)


def test_minutes_are_counted_over_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def tick(step: int) -> None:
        clock[0] += 6.0
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    first = make(tmp_path, steps=None, minutes=1.0, on_step=tick)
    assert first.run() is False
    assert (first.step, first.seconds) == (4, 24.0)
    clock[0] += 5000.0  # a night between the sessions does not count
    second = make(tmp_path, steps=None, minutes=1.0, on_step=tick)
    second.restore(read_checkpoint(tmp_path / CHECKPOINT_NAME), tmp_path)
    assert second.run() is True
    assert (second.step, second.seconds) == (10, 60.0)
    assert second.history[-1].step == 10
    assert second.history[-1].learning_rate < first.optimizer.param_groups[0]["lr"]


def test_rate_warms_up_and_decays() -> None:
    config = TrainingConfig(steps=100, learning_rate=2.0, warmup=0.1, final_learning_rate=0.25)
    assert config.rate(0.05) == pytest.approx(1.0)
    assert config.rate(0.1) == pytest.approx(2.0)
    assert config.rate(0.55) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    assert config.rate(1.0) == pytest.approx(0.5)
    assert config.progress(50, 0.0) == 0.5
    assert TrainingConfig(steps=100, minutes=1.0).progress(10, 45.0) == 0.75


def test_matrices_decay_and_vectors_do_not() -> None:
    trainer = make(weight_decay=0.3)
    decay = {p.shape: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decay == {(8, 4): 0.3, (1, 8): 0.3, (8,): 0.0, (1,): 0.0}


def test_gradients_are_clipped() -> None:
    trainer = make(clip=1e-3)
    norms: list[float] = []
    real = trainer.optimizer.step
    trainer.optimizer.step = lambda: (
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters()))),
        real(),
    )
    trainer.run()
    assert max(norms) <= 1e-3 * 1.001


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(step: int) -> None:
        if step == 8:
            monkeypatch.setattr(torch, "save", full_disk)

    trainer = make(tmp_path, on_step=fill_the_disk)
    with pytest.raises(CheckpointError, match="No space left on device; the previous checkpoint is intact") as caught:
        trainer.run()
    assert str(tmp_path / CHECKPOINT_NAME) in str(caught.value)
    assert read_checkpoint(tmp_path / CHECKPOINT_NAME)["step"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT_NAME, HISTORY_NAME]


def test_a_full_disk_leaves_the_previous_history_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(step: int) -> None:
        if step == 8:
            monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(CheckpointError, match=r"history\.jsonl cannot be written: .*No space left") as caught:
        make(tmp_path, on_step=fill_the_disk).run()
    assert "the previous history is intact" in str(caught.value)
    assert len((tmp_path / HISTORY_NAME).read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT_NAME, HISTORY_NAME]


def test_a_write_that_breaks_off_leaves_the_previous_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / CHECKPOINT_NAME
    write_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    real = torch.save

    def half(content: object, file: Any) -> None:
        whole = io.BytesIO()
        real(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        full_disk()

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_errors_of_the_system_while_writing_become_checkpoint_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / CHECKPOINT_NAME
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r": real(Path("/dev/full"), mode, buffering=0))
    with pytest.raises(CheckpointError, match=r"written: .*No space left on device; there is no earlier one"):
        write_checkpoint(path, {"weights": torch.zeros(10_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_within_torch_is_told_in_the_words_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a disk that is full after three writes."""

        written = 0

        def write(self, data: bytes) -> int:
            self.written += 1
            return len(data) if self.written <= 3 else full_disk()

        def flush(self) -> None: ...

    real = torch.save
    monkeypatch.setattr(torch, "save", lambda content, _: real(content, Full()))
    with pytest.raises(CheckpointError, match=r"written: .*No space left on device; there is no earlier one") as caught:
        write_checkpoint(tmp_path / CHECKPOINT_NAME, {"weights": torch.zeros(10_000)})
    assert "enforce" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/run/checkpoint\.pt cannot be written"):
        write_checkpoint(tmp_path / "file" / "run" / CHECKPOINT_NAME, {})


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("harm",))


def damage(kind: str, path: Path) -> None:
    write_checkpoint(path, {"step": 1, "weights": torch.zeros(1000)})
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("not a checkpoint at all\n")
    elif kind == "rubbish":
        path.write_text("rubbish")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "code":
        torch.save({"format": 1, "step": Harmful()}, path)
    elif kind == "format":
        torch.save({"format": 7}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(2), path)


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "truncated", "text", "rubbish", "folder", "code", "format", "tensor"]
)
def test_unreadable_checkpoints_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / CHECKPOINT_NAME
    damage(kind, path)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt") as caught:
        read_checkpoint(path)
    assert "accepted" in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind in ("empty", "truncated", "text", "rubbish", "code"):
        assert "cannot be read: it is damaged or not a checkpoint of linattn" in str(caught.value)
        assert caught.value.__cause__ is not None
    if kind == "folder":
        assert "Is a directory" in str(caught.value)
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    make(tmp_path, width=8).run()
    path = tmp_path / CHECKPOINT_NAME
    with pytest.raises(CheckpointError, match=f"{path} does not fit"):
        make(width=9).restore(read_checkpoint(path), path)
    with pytest.raises(CheckpointError, match="optimizer"):
        make().restore({k: v for k, v in read_checkpoint(path).items() if k != "optimizer"}, path)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    real = trainer.loss
    trainer.loss = lambda step: real(step) * (math.nan if step >= 8 else 1.0)
    with pytest.raises(ArgumentError, match=r"loss is nan at step 12 with learning rate 0\.01"):
        trainer.run()
    assert read_checkpoint(tmp_path / CHECKPOINT_NAME)["step"] == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither steps nor minutes"),
        ({"steps": 0}, "steps=0"),
        ({"minutes": -1.0}, "minutes=-1.0"),
        ({"minutes": math.nan}, "minutes=nan"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate=0.0"),
        ({"steps": 1, "warmup": 1.5}, "warmup=1.5"),
        ({"steps": 1, "validate_every": 0}, "validate_every=0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainingConfig(**settings)


class Log:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))


def test_a_tracker_gets_every_record() -> None:
    log = Log()
    trainer = make(tracker=log)
    trainer.run()
    assert [step for step, _ in log.rows] == [r.step for r in trainer.history]
    assert "loss/train" not in log.rows[0][1]
    assert log.rows[-1][1]["loss/validation"] == trainer.history[-1].validation_loss
    assert log.rows[-1][1]["loss/train"] == trainer.history[-1].train_loss


def test_tensorboard_is_asked_for_by_name_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"tensorboard.*pip install 'linattn\[tracking\]'"):
        TensorBoardTracker(tmp_path)


def test_training_in_another_thread_leaves_signals_alone() -> None:
    import threading

    trainer = make()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results == [True]


def test_patience_stops_a_run_that_no_longer_improves() -> None:
    trainer = make(steps=600, validate_every=6, patience=3)
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 3.1, 2.0, 1.0])
    trainer.validate = lambda: next(losses)
    assert trainer.run()
    assert trainer.stopped_early
    assert trainer.finished
    assert [record.validation_loss for record in trainer.history] == [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 3.1]
    assert trainer.step == 36


def test_without_a_clip_the_gradient_is_taken_as_it_is() -> None:
    def slope(clip: float | None) -> float:
        trainer = make(steps=1, clip=clip)
        # Plain SGD shows the size of the gradient, which Adam divides out.
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
        real = trainer.loss
        trainer.loss = lambda step: 1000 * real(step)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer._train_step()
        after = trainer.model.parameters()
        return sum((a - b).square().sum().item() for a, b in zip(after, before, strict=True)) ** 0.5

    rate = make(steps=1).config.rate(1.0)
    assert slope(1.0) <= rate * 1.001
    assert slope(None) > 10 * rate


def test_measures_are_kept_in_history_checkpoint_and_tracker(tmp_path: Path) -> None:
    logged: list[Mapping[str, float]] = []

    class Recorder:
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            logged.append(values)

    trainer = make(tmp_path, tracker=Recorder())
    trainer.measure = lambda: {"accuracy": [float(trainer.step), 10.0]}
    trainer.run()
    assert [r.measures["accuracy"][0] for r in trainer.history] == [0, 6, 12, 18, 20]
    assert [values["measure/accuracy"] for values in logged] == [5, 8, 11, 14, 15]
    lines = [json.loads(line) for line in (tmp_path / HISTORY_NAME).read_text().splitlines()]
    assert lines[1]["measures"] == {"accuracy": [6.0, 10.0]}
    again = make(tmp_path)
    again.restore(read_checkpoint(tmp_path / CHECKPOINT_NAME), tmp_path / CHECKPOINT_NAME)
    assert again.history == trainer.history
