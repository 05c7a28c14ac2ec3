"""Autoencoders: one fully connected model, three objectives (plain, denoising, masked), and a set to try them on.

The files, from the model to the data:

    autoencoder.py   Autoencoder, DenoisingAutoencoder, MaskedAutoencoder, reconstruction_loss
    corruption.py    AdditiveNoise, Masking: what happens to the input before it is encoded
    synthetic.py     synthetic_set: a rotated Gaussian whose few wide directions carry the label
"""

from __future__ import annotations

from linattn.autoencoders.autoencoder import (
    Autoencoder,
    DenoisingAutoencoder,
    MaskedAutoencoder,
    reconstruction_loss,
)
from linattn.autoencoders.corruption import AdditiveNoise, Masking
from linattn.autoencoders.synthetic import Split, SyntheticSet, synthetic_set

__all__ = [
    "AdditiveNoise",
    "Autoencoder",
    "DenoisingAutoencoder",
    "MaskedAutoencoder",
    "Masking",
    "Split",
    "SyntheticSet",
    "reconstruction_loss",
    "synthetic_set",
]
