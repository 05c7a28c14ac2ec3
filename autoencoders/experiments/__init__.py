"""Commands on autoencoders: training, probing, sweeps, and their figures."""
