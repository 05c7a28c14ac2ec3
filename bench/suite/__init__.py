"""Run `pytest --benchmark`: operations beside SDPA, recurrent layers beside torch.nn, and promised speeds."""
