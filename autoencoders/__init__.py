"""Autoencoders: one model, three objectives (plain, denoising, masked), and what it takes to study what they learn.

The files, from the model to the commands:

    autoencoder.py     Autoencoder, DenoisingAutoencoder, MaskedAutoencoder, reconstruction_loss
    patches.py         PatchAutoencoder: attends over the patches of an image, some of them hidden
    corruption.py      AdditiveNoise, Masking: what happens to the input before it is encoded
    synthetic.py       synthetic_set: a rotated Gaussian whose few wide directions carry the label
    mnist.py           MNIST's IDX files: read, checked, fetched
    sets.py            load_set: digits, mnist, synthetic or a file, split and in memory
    probe.py           probe_accuracy: a linear classifier on frozen codes
    principal.py       principal components, and what a linear autoencoder has to do with them
    repeats.py         several models of one kind trained as one
    settings.py        Settings: all that decides the outcome of an experiment
    experiment.py      Experiment: models, losses and probes as the trainer wants them
    options.py         what the commands share
    train_command.py   `linattn train ae`, and run_figures.py its figures
    probe_command.py   `linattn probe`
    sweep.py           `linattn sweep ae`, and sweep_figures.py its figures; side_by_side.py works in processes
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
