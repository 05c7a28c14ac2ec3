"""Run `pytest --benchmark`: operations beside SDPA, recurrent layers beside torch.nn, and the speed that is promised."""
