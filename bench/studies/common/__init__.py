"""Share claims, figures, result files and sweeps between the studies."""
