"""The same architecture trained R times from different weights, so that a result comes with its spread.

    Separate    one model after another: any kind of model
    Batched     all as one model whose parameters have a leading axis R: fewer, larger operations

Both compute the same. Which is the faster one is a matter of size: see `BATCHED_PAYS_BELOW`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from linattn.autoencoders.models.autoencoder import Autoencoder, reconstruction_loss
from linattn.errors import ArgumentError, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

# Measured on 2 cores (`linattn sweep batching`): small models are bound by the overhead of operations, which batching
# shares; large ones by arithmetic, which torch does better for one matrix than for a batch. With 784 inputs (MNIST)
# none gained, with 64 and 100 those did that have no more than 55,000 parameters.
BATCHED_PAYS_BELOW = {"parameters": 60_000, "inputs": 200}


class Separate(nn.Module):
    """R models, one after another. Methods as for `Batched`; the models need `loss`, `forward` and `encode`."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(models)

    def losses(self, x: Tensor, reduction: str, generators: Sequence[torch.Generator]) -> Tensor:
        """Compute the objective of each model on its part of x `[R, B, F]`: `[R]`."""
        return torch.stack(
            [
                cast("Autoencoder", model).loss(part, reduction, generator)
                for model, part, generator in zip(self.members, x, generators, strict=True)
            ]
        )

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct x `[R, B, F]`, each model its part."""
        return torch.stack([model(part) for model, part in zip(self.members, x, strict=True)])

    def encode(self, x: Tensor) -> Tensor:
        """Encode x `[R, B, F]`, each model its part: `[R, B, k]`."""
        return torch.stack(
            [cast("Autoencoder", model).encode(part) for model, part in zip(self.members, x, strict=True)]
        )

    def member(self, index: int) -> Autoencoder:
        """Return the model `index`."""
        return cast("Autoencoder", self.members[index])


class Batched(nn.Module):
    """R fully connected autoencoders as one, for training: parameters `[R, ...]`.

    An optimiser that works entry by entry (Adam, SGD) and a loss that is summed over R train each as if it were alone.

    Args:
        models: R autoencoders of one architecture and corruption, which are copied.

    Methods, for x `[R, B, F]`:
        `losses(x, reduction, generators)`: the objective of each, `[R]`; one generator a model.
        `reconstruct(x)`: `[R, B, F]`. `encode(x)`: `[R, B, k]`.
        `member(r)`: a copy of the r-th as an `Autoencoder`.

    Raises: ArgumentError (models of different architectures).

    >>> models = Batched([Autoencoder(7, [5, 4]) for _ in range(3)])
    >>> models.reconstruct(torch.zeros(3, 2, 7)).shape, models.member(0).code_size
    (torch.Size([3, 2, 7]), 4)
    """

    def __init__(self, models: Sequence[Autoencoder]) -> None:
        super().__init__()
        first = dict(models[0].named_parameters())
        for model in models:
            if repr(model) != repr(models[0]):
                raise refusal(
                    ArgumentError,
                    "models of different architectures cannot be batched",
                    given=f"{model} and {models[0]}",
                    accepted="one architecture",
                )
        self.names = list(first)
        self.stacked = nn.ParameterList(
            torch.stack([model.get_parameter(name).detach() for model in models]) for name in self.names
        )
        # In a list, so that its parameters, which are never used, are not found among the module's own.
        self._architecture = [copy.deepcopy(models[0])]

    def losses(self, x: Tensor, reduction: str, generators: Sequence[torch.Generator]) -> Tensor:
        """Compute the objective of each model on its part of x `[R, B, F]`: `[R]`."""
        corruption = self._architecture[0].corruption
        corrupted = x
        if corruption is not None:
            corrupted = torch.stack([corruption(part, g) for part, g in zip(x, generators, strict=True)])
        reconstruction = self.reconstruct(corrupted)
        return vmap(lambda found, clean: reconstruction_loss(found, clean, reduction))(reconstruction, x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct x `[R, B, F]`, each model its part."""
        model = self._architecture[0]
        found: Tensor = vmap(lambda values, part: functional_call(model, values, (part,)))(self._values(), x)
        return found

    def encode(self, x: Tensor) -> Tensor:
        """Encode x `[R, B, F]`, each model its part: `[R, B, k]`."""
        encoder = self._architecture[0].encoder
        names = [name.removeprefix("encoder.") for name in self.names if name.startswith("encoder.")]
        values = dict(zip(names, self.stacked, strict=False))
        found: Tensor = vmap(lambda values, part: functional_call(encoder, values, (part,)))(values, x)
        return found

    def member(self, index: int) -> Autoencoder:
        """Copy the model `index` into an `Autoencoder` of its own."""
        model = copy.deepcopy(self._architecture[0])
        model.load_state_dict({name: value[index] for name, value in self._values().items()})
        return model.to(self.stacked[0].device)

    def _values(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.stacked, strict=True))


Repeats = Separate | Batched


def batching_pays(models: Sequence[nn.Module]) -> bool:
    """Say whether these models are faster as one."""
    first = models[0]
    if len(models) == 1 or not isinstance(first, Autoencoder):
        return False
    sizes = {"parameters": sum(parameter.numel() for parameter in first.parameters()), "inputs": first.input_size}
    return all(sizes[name] < limit for name, limit in BATCHED_PAYS_BELOW.items())


def repeats_of(models: Sequence[nn.Module]) -> Repeats:
    """Join the models into one where that pays (see `batching_pays`), else run them one after another."""
    return Batched(cast("Sequence[Autoencoder]", models)) if batching_pays(models) else Separate(models)
