"""Lets `pytest` find the package in a checkout that was never installed. An installed linattn comes first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
