"""An autoencoder of images that attends over patches: whole patches are hidden, and attention fills them in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linattn.autoencoders.models.autoencoder import reconstruction_loss
from linattn.errors import ArgumentError, DtypeError, ShapeError, refusal
from linattn.modules import Transformer


class PatchAutoencoder(nn.Module):
    """Patches -> tokens -> encoder (attention over the visible ones only) -> decoder (attention over all) -> pixels.

    With images of h x w pixels and patches of p x p there are T = (h / p)(w / p) tokens. Hidden patches are left out of
    the encoder, so it costs less the more are hidden; the decoder puts one learned token in their places. The loss is
    on every pixel, as of the other autoencoders of this package (He et al. take it on the hidden ones only).

    Args:
        image_shape: (h, w).
        patch: p, a divisor of both.
        dim: width of the tokens; the code of an image is the mean of its tokens, k = dim numbers.
        layers: attention layers of the encoder; the decoder has one.
        heads, kernel: see `linattn.modules.Attention`: "softmax", "quadratic", "taylor" or a feature map.
        probability: share of patches hidden in `loss`, in [0, 1), rounded to whole patches, with at least one left.
        **attention: the other arguments of `linattn.modules.Transformer`.

    Methods, for x `[..., h w]`, rows of pixels one after another, 0 ... 1:
        `encode(x)`: `[..., dim]`. `model(x)`: the reconstruction `[..., h w]` with every patch visible.
        `loss(x, reduction="sum", generator=None)`: reconstruction error with patches hidden, as in `Autoencoder`.
        `inpaint(x, generator)`: the reconstruction from visible patches, and which pixels were hidden.

    Raises: ArgumentError (sizes, probability, and what `Transformer` raises), ShapeError, DtypeError (x).

    Source: He et al. 2022, "Masked autoencoders are scalable vision learners".

    >>> model = PatchAutoencoder((8, 8), 2, 32, probability=0.5)
    >>> x = torch.rand(3, 64)
    >>> model.encode(x).shape, model(x).shape, model.loss(x).shape
    (torch.Size([3, 32]), torch.Size([3, 64]), torch.Size([]))
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        patch: int,
        dim: int,
        *,
        layers: int = 2,
        heads: int = 4,
        kernel: str = "quadratic",
        probability: float = 0.75,
        **attention: Any,
    ) -> None:
        super().__init__()
        height, width = image_shape
        if patch < 1 or dim < 1 or height % patch or width % patch:
            raise refusal(
                ArgumentError,
                "the image cannot be cut into patches",
                given=f"image_shape={tuple(image_shape)}, patch={patch} and dim={dim}",
                accepted="positive sizes, patch a divisor of height and width",
            )
        if not 0 <= probability < 1:
            raise refusal(
                ArgumentError, "probability is out of range", given=repr(probability), accepted="a number in [0, 1)"
            )
        self.grid = (height // patch, width // patch)
        self.patch, self.code_size, self.input_size = patch, dim, height * width
        self.tokens = self.grid[0] * self.grid[1]
        self.hidden = min(round(probability * self.tokens), self.tokens - 1)
        self.embed = nn.Linear(patch * patch, dim)
        self.position = nn.Parameter(0.02 * torch.randn(self.tokens, dim))
        self.encoder = Transformer(layers, dim, heads, kernel=kernel, **attention)
        self.placeholder = nn.Parameter(0.02 * torch.randn(dim))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(self.tokens, dim))
        self.decoder = Transformer(1, dim, heads, kernel=kernel, **attention)
        self.pixels = nn.Linear(dim, patch * patch)

    def encode(self, x: Tensor) -> Tensor:
        """Return the code `[..., dim]` of x `[..., h w]`: the mean of its tokens, all patches visible."""
        flat = self._flat(x)
        return self._encode(flat, None).mean(1).view(*x.shape[:-1], self.code_size)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct x `[n, F]` from all its patches."""
        flat = self._flat(x)
        return self._decode(self._encode(flat, None), None).view(x.shape)

    def loss(self, x: Tensor, reduction: str = "sum", generator: torch.Generator | None = None) -> Tensor:
        """Return the error of the reconstruction from the visible patches, on every pixel; a scalar.

        Args:
            x: `[..., h w]`, not empty.
            reduction: as in `reconstruction_loss`.
            generator: source of which patches are hidden, on x's device; torch's global one by default.
        """
        flat = self._flat(x)
        visible = self._visible(flat, generator)
        return reconstruction_loss(self._decode(self._encode(flat, visible), visible), flat, reduction)

    def inpaint(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of x `[n, h w]` from its visible patches, and bool `[n, h w]`: True is hidden."""
        flat = self._flat(x)
        visible = self._visible(flat, generator)
        shown = torch.zeros(len(flat), self.tokens, self.patch**2, device=x.device)
        shown.scatter_(1, visible[..., None].expand(-1, -1, self.patch**2), 1.0)
        return self._decode(self._encode(flat, visible), visible).view(x.shape), self._unpatch(shown).view(x.shape) == 0

    def _visible(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the indices `[n, T - hidden]` of the patches that stay, for every image."""
        order = torch.rand(len(x), self.tokens, generator=generator, device=x.device).argsort(1)
        return order[:, self.hidden :]

    def _encode(self, x: Tensor, visible: Tensor | None) -> Tensor:
        tokens = self.embed(self._patches(x)) + self.position
        if visible is not None:
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, self.code_size))
        out: Tensor = self.encoder(tokens)
        return out

    def _decode(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None:
            whole = self.placeholder.to(tokens.dtype).expand(len(tokens), self.tokens, -1)
            tokens = whole.scatter(1, visible[..., None].expand(-1, -1, self.code_size), tokens)
        return self._unpatch(self.pixels(self.decoder(tokens + self.decoder_position)))

    def _patches(self, x: Tensor) -> Tensor:
        """Cut images into patches: [n, h w] -> [n, T, p p]."""
        rows, columns = self.grid
        parts = x.view(-1, rows, self.patch, columns, self.patch)
        return parts.transpose(2, 3).reshape(len(x), self.tokens, self.patch**2)

    def _unpatch(self, patches: Tensor) -> Tensor:
        """Put patches together: [n, T, p p] -> [n, h w]."""
        rows, columns = self.grid
        parts = patches.view(-1, rows, columns, self.patch, self.patch)
        return parts.transpose(2, 3).reshape(len(patches), self.input_size)

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.input_size:
            raise refusal(
                ShapeError, "x has the wrong shape", given=list(x.shape), accepted=f"[..., {self.input_size}]"
            )
        if not x.is_floating_point():
            raise refusal(DtypeError, "x is no image", given=x.dtype, accepted="a floating dtype")
        return x.reshape(-1, self.input_size)
