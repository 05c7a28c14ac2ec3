"""`import linattn` gives every room of the package at its first use, and imports none of them before."""

from __future__ import annotations

import subprocess
import sys

import linattn

LAZY = ("modules", "rnn", "lm", "training", "autoencoders", "distributed", "recurrence", "bench", "integrations")


def test_rooms_are_imported_when_they_are_first_used() -> None:
    code = f"""
import sys, linattn
early = [name for name in {LAZY} if "linattn." + name in sys.modules]
assert not early, early
for name in {LAZY}:
    assert getattr(linattn, name).__name__ == "linattn." + name
    assert name in dir(linattn)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(linattn, "quadratic_atention")
