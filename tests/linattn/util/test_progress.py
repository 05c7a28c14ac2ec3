from __future__ import annotations

import sys

import pytest

from linattn._util.progress import progress


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_terminal_or_tqdm_nothing_is_shown(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress(3, "job", smoothing=0.1) as bar:
        bar.update()
        bar.update(2)
        bar.set_postfix_str("text")
        bar.clear()
        assert bar.n == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="bars are drawn by tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(4, "job") as bar:
        bar.update(3)
        assert bar.n == 3
    assert "3/4" in capsys.readouterr().err
