"""The fully connected autoencoder. The three objectives differ only in what corrupts the input before encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from linattn.autoencoders.models.corruption import AdditiveNoise, Masking
from linattn.errors import ArgumentError, DeviceError, DtypeError, ShapeError, refusal, unknown_name

Activation = str | Callable[[], nn.Module]


class Autoencoder(nn.Module):
    """`x_hat = decode(encode(x))` with fully connected layers; the decoder mirrors the encoder.

    With hidden sizes (h_1, ..., h_L): the encoder runs F -> h_1 -> ... -> h_L, the decoder h_L -> ... -> h_1 -> F. The
    activation stands between layers, never after the bottleneck h_L or after the output. The code has k = h_L numbers;
    k may exceed F.

    Args:
        input_size: F, at least 1.
        hidden_sizes: (h_1, ..., h_L), each at least 1; a single int is (k,).
        activation: "relu", "tanh", "sigmoid", "gelu", "identity" (a linear autoencoder), or a function making a module.
        corruption: a module called as `corruption(x, generator)`, applied to the input in `loss` only; none by default.
        device, dtype: as for `torch.nn` modules.

    Methods, for x `[..., F]` of the parameters' dtype and device:
        `encode(x)`: the code `[..., k]`. `decode(code)`: `[..., F]`. `model(x)`: decode(encode(x)), never corrupted.
        `loss(x, reduction="sum", generator=None)`: corrupt, encode, decode, compare with the clean x; a scalar. It
            corrupts in training and in evaluation alike: it is the objective. Pass a seeded generator to repeat a draw.

    Cost: 4 F h_1 + 4 h_1 h_2 + ... flops a sample forward.

    Raises: ArgumentError (sizes, activation, reduction), ShapeError, DtypeError, DeviceError (x, code).

    Source: Rumelhart, Hinton and Williams, 1986; Hinton and Salakhutdinov, Reducing the dimensionality of data with
    neural networks, 2006.

    >>> model = Autoencoder(7, [5, 4])
    >>> x = torch.randn(2, 7)
    >>> model.encode(x).shape, model(x).shape, model.loss(x).shape
    (torch.Size([2, 4]), torch.Size([2, 7]), torch.Size([]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | Sequence[int],
        activation: Activation = "relu",
        *,
        corruption: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_size("input_size", input_size)
        sizes = list(hidden_sizes) if isinstance(hidden_sizes, Sequence) else [hidden_sizes]
        if not sizes:
            raise refusal(ArgumentError, "hidden_sizes is empty", given="none", accepted="at least one size")
        for size in sizes:
            _check_size("each of hidden_sizes", size)
        make_activation = _activation(activation)
        self.input_size = input_size
        self.code_size = sizes[-1]
        widths = [input_size, *sizes]
        self.encoder = _layers(widths, make_activation, device, dtype)
        self.decoder = _layers(widths[::-1], make_activation, device, dtype)
        self.corruption = corruption

    def encode(self, x: Tensor) -> Tensor:
        """Return the code `[..., k]` of x `[..., F]`."""
        self._check("x", x, self.input_size)
        code: Tensor = self.encoder(x)
        return code

    def decode(self, code: Tensor) -> Tensor:
        """Return the reconstruction `[..., F]` of a code `[..., k]`."""
        self._check("code", code, self.code_size)
        reconstruction: Tensor = self.decoder(code)
        return reconstruction

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x `[..., F]`, without corruption."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, reduction: str = "sum", generator: torch.Generator | None = None) -> Tensor:
        """Return the objective: how far the reconstruction of the corrupted x is from the clean x, on every entry.

        Args:
            x: `[..., F]`, not empty.
            reduction: as in `reconstruction_loss`.
            generator: source of the corruption, torch's global one by default.
        """
        self._check("x", x, self.input_size)
        corrupted = x if self.corruption is None else self.corruption(x, generator)
        return reconstruction_loss(self(corrupted), x, reduction)

    def _check(self, name: str, given: object, size: int) -> None:
        if not isinstance(given, Tensor):
            raise refusal(
                ArgumentError,
                f"{name} is no tensor",
                given=type(given).__name__,
                accepted=f"a torch.Tensor [..., {size}]",
            )
        if given.dim() < 1 or given.shape[-1] != size:
            raise refusal(ShapeError, f"{name} has the wrong shape", given=list(given.shape), accepted=f"[..., {size}]")
        weight = next(self.parameters())
        if given.device != weight.device:
            raise refusal(
                DeviceError,
                f"{name} is on another device than the parameters",
                given=given.device,
                accepted=weight.device,
            )
        if given.dtype != weight.dtype and not torch.is_autocast_enabled(given.device.type):
            raise refusal(
                DtypeError,
                f"{name} has another dtype than the parameters",
                given=given.dtype,
                accepted=f"{weight.dtype}, or autocast",
            )


class DenoisingAutoencoder(Autoencoder):
    """An `Autoencoder` whose loss is taken from `x + noise_std * N(0, 1)`: it must undo the noise.

    Args:
        noise_std: standard deviation of the noise, 0.5 by default; the others as for `Autoencoder`.

    Source: Vincent et al., Extracting and composing robust features with denoising autoencoders, 2008.

    >>> model = DenoisingAutoencoder(7, [5, 4])
    >>> model.loss(torch.randn(2, 7)).item() > 0
    True
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | Sequence[int],
        activation: Activation = "relu",
        *,
        noise_std: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        corruption = AdditiveNoise(noise_std)
        super().__init__(input_size, hidden_sizes, activation, corruption=corruption, device=device, dtype=dtype)


class MaskedAutoencoder(Autoencoder):
    """An `Autoencoder` whose loss is taken from x with entries dropped: it must fill them in; the loss is on all of x.

    Args:
        probability: of dropping an entry, in [0, 1), 0.25 by default.
        fill_value: what a dropped entry becomes, 0 by default; the others as for `Autoencoder`.

    Source: Vincent et al., 2008 (masking noise); He et al., Masked autoencoders are scalable vision learners, 2022.

    >>> model = MaskedAutoencoder(7, [5, 4], probability=0.5, fill_value=-1.0)
    >>> model.loss(torch.randn(2, 7)).item() > 0
    True
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | Sequence[int],
        activation: Activation = "relu",
        *,
        probability: float = 0.25,
        fill_value: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        corruption = Masking(probability, fill_value)
        super().__init__(input_size, hidden_sizes, activation, corruption=corruption, device=device, dtype=dtype)


def reconstruction_loss(reconstruction: Tensor, x: Tensor, reduction: str = "sum") -> Tensor:
    """Return the squared error between a reconstruction and x, both `[..., F]`; a scalar.

    Args:
        reconstruction: `[..., F]`, not empty.
        x: of the same shape.
        reduction: "sum": summed over the F entries of a sample, averaged over samples; "mean": averaged over all
            entries, 1/F of the former.

    Raises: ShapeError (shapes differ or are empty), ArgumentError (reduction).

    >>> x = torch.zeros(2, 3)
    >>> reconstruction_loss(x + 1, x).item(), reconstruction_loss(x + 1, x, "mean").item()
    (3.0, 1.0)
    """
    if reduction not in _REDUCTIONS:
        raise unknown_name("reduction", reduction, _REDUCTIONS)
    if reconstruction.shape != x.shape or x.dim() < 1 or x.numel() == 0:
        raise refusal(
            ShapeError,
            "reconstruction and x do not fit each other",
            given=f"{list(reconstruction.shape)} and {list(x.shape)}",
            accepted="one non-empty shape [..., F]",
        )
    return _REDUCTIONS[reduction]((reconstruction - x).square())


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda squares: squares.sum(-1).mean(),
    "mean": lambda squares: squares.mean(),
}

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


def _activation(given: Activation) -> Callable[[], nn.Module]:
    if isinstance(given, str):
        if given not in _ACTIVATIONS:
            raise unknown_name("activation", given, _ACTIVATIONS)
        return _ACTIVATIONS[given]
    if isinstance(given, nn.Module) or not callable(given):
        raise refusal(
            ArgumentError,
            "activation makes no module",
            given=repr(given),
            accepted="a name or a function making a module, such as nn.ReLU",
        )
    return given


def _layers(
    widths: Iterable[int],
    make_activation: Callable[[], nn.Module],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow, device=device, dtype=dtype), make_activation()]
    return nn.Sequential(*layers[:-1])


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(ArgumentError, f"{name} is no count", given=repr(value), accepted="an int of at least 1")
