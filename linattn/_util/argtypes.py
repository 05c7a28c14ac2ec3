"""Kinds of numbers that options of the command line accept."""

from __future__ import annotations

import argparse


def whole(text: str) -> int:
    """Parse a whole number from 1 on, for options that count something."""
    return _whole(text, least=1)


def seed(text: str) -> int:
    """Parse a whole number from 0 on."""
    return _whole(text, least=0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        # Of all errors argparse shows the words of this one only.
        raise argparse.ArgumentTypeError(f"{text!r} was given; accepted: a whole number from {least} on")
    return int(text)
