"""Everything behind `pytest --benchmark`."""
