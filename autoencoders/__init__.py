"""Autoencoders: one model, three objectives (plain, denoising, masked), and the tools to study their codes.

Imports point down this list:

    experiments/   Settings and Experiment, the commands `linattn train ae | probe | sweep ae | sweep batching`, figures
    analysis/      principal components of codes and data; linear probes on frozen codes
    models/        Autoencoder, DenoisingAutoencoder, MaskedAutoencoder, PatchAutoencoder; R repeats trained as one
    data/          MNIST, digits, a synthetic Gaussian, a file: split and in memory

Example:
    >>> import torch
    >>> from linattn.autoencoders import DenoisingAutoencoder
    >>> model = DenoisingAutoencoder(64, [32, 8], noise_std=0.3)
    >>> model.encode(torch.rand(5, 64)).shape
    torch.Size([5, 8])
"""

from __future__ import annotations

from linattn.autoencoders.analysis.principal import (
    first_order_residuals,
    orthonormality_defect,
    principal_angles,
    principal_components,
    shrunk_singular_values,
)
from linattn.autoencoders.analysis.probe import ProbeConfig, choose_labelled, probe_accuracy
from linattn.autoencoders.data.mnist import Mnist, download_mnist, load_mnist, read_idx
from linattn.autoencoders.data.sets import SampleSet, load_set
from linattn.autoencoders.data.synthetic import Split, SyntheticSet, synthetic_set
from linattn.autoencoders.experiments.experiment import Experiment
from linattn.autoencoders.experiments.settings import Settings
from linattn.autoencoders.models.autoencoder import (
    Autoencoder,
    DenoisingAutoencoder,
    MaskedAutoencoder,
    reconstruction_loss,
)
from linattn.autoencoders.models.corruption import AdditiveNoise, Masking
from linattn.autoencoders.models.patches import PatchAutoencoder
from linattn.autoencoders.models.repeats import Batched, Separate, repeats_of

__all__ = [
    "AdditiveNoise",
    "Autoencoder",
    "Batched",
    "DenoisingAutoencoder",
    "Experiment",
    "MaskedAutoencoder",
    "Masking",
    "Mnist",
    "PatchAutoencoder",
    "ProbeConfig",
    "SampleSet",
    "Separate",
    "Settings",
    "Split",
    "SyntheticSet",
    "choose_labelled",
    "download_mnist",
    "first_order_residuals",
    "load_mnist",
    "load_set",
    "orthonormality_defect",
    "principal_angles",
    "principal_components",
    "probe_accuracy",
    "read_idx",
    "reconstruction_loss",
    "repeats_of",
    "shrunk_singular_values",
    "synthetic_set",
]
