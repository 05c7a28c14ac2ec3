"""Trackers: what they write can be read back, and what is missing is asked for by name."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from linattn.errors import MissingExtraError
from linattn.training import tracking
from linattn.training.tracking import TensorBoardTracker, Tracker, Trackers, WandbTracker

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"kernel": "quadratic", "lr": 0.002, "heads": 4, "form": None}


def log_a_run(tracker: Tracker, *, figure: bool) -> None:
    for step in (0, 10, 20):
        tracker.scalars(step, {"loss/validation": 3.0 - step / 10})
    if figure:
        pytest.importorskip("matplotlib", reason="figures need matplotlib")
        from matplotlib.figure import Figure

        drawing = Figure()
        drawing.subplots().plot([1, 2])
        tracker.figure(20, "loss", drawing)
    tracker.hyperparameters(SETTINGS, {"result/validation": 1.0})
    tracker.close()


class Recorder:
    """A tracker that keeps the names of its calls."""

    def __init__(self, log: list[str], name: str, *, fails: bool = False) -> None:
        self.log, self.name, self.fails = log, name, fails

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.log.append(f"{self.name} scalars {step} {dict(values)}")

    def figure(self, step: int, name: str, figure: Any) -> None:
        self.log.append(f"{self.name} figure {step} {name}")

    def hyperparameters(self, values: Mapping[str, object], results: Mapping[str, float]) -> None:
        self.log.append(f"{self.name} hyperparameters {dict(values)} {dict(results)}")

    def close(self) -> None:
        self.log.append(f"{self.name} close")
        if self.fails:
            raise OSError("disk full")


# tensorboard's generated protocol buffers and its use of numpy warn about themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_hold_scalars_figure_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="reads back what TensorBoard wrote")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_run(TensorBoardTracker(tmp_path), figure=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss/validation")]
    assert read == [(0, 3.0), (10, 2.0), (20, 1.0)]
    assert events.Tags()["images"] == ["loss"]
    assert [event.value for event in events.Scalars("result/validation")] == [1.0]
    settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"quadratic" in settings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_tensorboard_run_hides_what_came_after(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="reads back what TensorBoard wrote")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardTracker(tmp_path)
    for step in (0, 10, 20):
        first.scalars(step, {"loss": 1.0})
    first.close()
    second = TensorBoardTracker(tmp_path, resumed_at=10)
    second.scalars(15, {"loss": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (10, 1.0), (15, 2.0)]


def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("writes a real offline run, which needs wandb")
    code = (
        "from linattn.training.tracking import WandbTracker\n"
        f"tracker = WandbTracker({str(tmp_path / 'run')!r})\n"
        "for step in (0, 10): tracker.scalars(step, {'loss/validation': 3.0 - step / 10})\n"
        f"tracker.hyperparameters({SETTINGS!r}, {{'result/validation': 2.0}})\n"
        "tracker.close()\n"
    )
    # In a process of its own: W&B's service writes what is left when the process ends.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(word in content for word in (b"loss/validation", b"result/validation", b"quadratic"))


def test_wandb_is_offline_and_gets_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[Any, ...]] = []

    class Run:
        config = types.SimpleNamespace(update=lambda values: log.append(("config", values)))
        summary = types.SimpleNamespace(update=lambda values: log.append(("summary", values)))

        def log(self, values: object, step: int) -> None:
            log.append(("log", step, values))

        def finish(self) -> None:
            log.append(("finish",))

    def init(**options: Any) -> Run:
        log.append(("init", options["mode"], options["name"], options["dir"]))
        return Run()

    fake = types.ModuleType("wandb")
    fake.init, fake.Settings, fake.Image = init, lambda **options: options, lambda figure: ("image", figure)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker = WandbTracker(tmp_path / "run")
    tracker.scalars(5, {"loss": 1.0})
    tracker.figure(6, "curve", "drawing")  # type: ignore[arg-type]
    tracker.hyperparameters(SETTINGS, {"result": 0.5})
    tracker.close()
    assert log == [
        ("init", "offline", "run", tmp_path / "run"),
        ("log", 5, {"loss": 1.0}),
        ("log", 6, {"curve": ("image", "drawing")}),
        ("config", {**SETTINGS, "form": "None"}),
        ("summary", {"result": 0.5}),
        ("finish",),
    ]


@pytest.mark.parametrize(
    ("module", "make"),
    [("torch.utils.tensorboard", TensorBoardTracker), ("wandb", WandbTracker)],
)
def test_a_missing_package_is_asked_for_by_its_extra(
    module: str, make: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'linattn\[tracking\]'"):
        make(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_trackers_get_the_same() -> None:
    log: list[str] = []
    log_a_run(Trackers([Recorder(log, "a"), Recorder(log, "b")]), figure=True)
    a, b = ([line[2:] for line in log if line.startswith(name)] for name in "ab")
    assert a == b
    assert [line.split()[0] for line in a] == ["scalars"] * 3 + ["figure", "hyperparameters", "close"]


def test_all_are_closed_even_when_one_fails() -> None:
    log: list[str] = []
    with pytest.raises(OSError, match="disk full"):
        Trackers([Recorder(log, "a", fails=True), Recorder(log, "b")]).close()
    assert log == ["a close", "b close"]


@pytest.mark.parametrize(
    ("flags", "opened"),
    [([], []), (["--tensorboard"], ["t"]), (["--wandb"], ["w"]), (["--wandb", "--tensorboard"], ["t", "w"])],
)
def test_flags_open_what_they_name(
    flags: list[str], opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(tracking, "TensorBoardTracker", lambda folder, resumed_at: Recorder(log, "t"))
    monkeypatch.setattr(tracking, "WandbTracker", lambda folder: Recorder(log, "w"))
    parser = argparse.ArgumentParser()
    tracking.add_arguments(parser)
    tracker = tracking.open_tracker(parser.parse_args(flags), tmp_path)
    assert (tracker is None) == (not opened)
    if tracker is not None:
        tracker.close()
    assert log == [f"{name} close" for name in opened]
