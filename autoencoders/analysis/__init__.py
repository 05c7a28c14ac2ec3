"""Analyses of trained autoencoders: principal components and linear probes."""
