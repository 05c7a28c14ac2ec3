"""Small convolutional networks for 8 x 8 images, plain or residual, with either normalisation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from linattn.errors import ArgumentError

Norm = Literal["batch", "layer"]
IMAGE_SIZE = 8
STAGES = 3


def _norm(kind: Norm, channels: int, size: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.LayerNorm([channels, size, size])


class Block(nn.Module):
    """Two convolutions: act(norm(conv(act(norm(conv(x)))))), or, residual, act(norm(conv(...)) + shortcut(x)).

    The shortcut is x itself; where size and channels change it is every second pixel, with zeros for the new channels,
    so it has no parameters (option A of the paper).

    Source: He, Zhang, Ren and Sun 2016, "Deep residual learning for image recognition".
    """

    def __init__(self, inputs: int, outputs: int, size: int, *, residual: bool, norm: Norm) -> None:
        super().__init__()
        self.residual, self.stride = residual, 1 if inputs == outputs else 2
        self.padding = outputs - inputs
        self.first = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.first_norm = _norm(norm, outputs, size)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = _norm(norm, outputs, size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations of the block, `[N, outputs, H / stride, W / stride]`."""
        inner = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        if self.residual:
            inner = inner + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        return F.relu(inner)


class ConvNet(nn.Module):
    """The network of He et al. for small images: one convolution, three stages of blocks, mean over pixels, linear.

    Args:
        depth: layers with weights, 6 n + 2: 8, 14, 20, ..., 56.
        width: channels of the first stage (8 x 8 pixels); the second has twice as many (4 x 4), the third four times
            (2 x 2).
        residual: with shortcuts around each pair of convolutions.
        norm: "batch" (`BatchNorm2d`) or "layer" (`LayerNorm` over all of a sample's channels and pixels).
        classes: number of logits.

    Shape: `[B, 1, 8, 8]` -> `[B, classes]`.

    Raises:
        ArgumentError: depth is not 6 n + 2.

    Example:
        >>> import torch
        >>> net = ConvNet(20, width=4, residual=True)
        >>> net(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> sum(isinstance(part, (nn.Conv2d, nn.Linear)) for part in net.modules())
        20
    """

    def __init__(
        self, depth: int, *, width: int = 4, residual: bool = True, norm: Norm = "batch", classes: int = 10
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 2 * STAGES)
        if blocks < 1 or rest:
            raise ArgumentError(f"depth={depth} was given; accepted: 6 n + 2 with n >= 1, such as 8, 20 or 56")
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = _norm(norm, width, IMAGE_SIZE)
        body: list[nn.Module] = []
        channels = width
        for stage in range(STAGES):
            for _ in range(blocks):
                wide = width * 2**stage
                body.append(Block(channels, wide, IMAGE_SIZE // 2**stage, residual=residual, norm=norm))
                channels = wide
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(channels, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[N, classes]` of images `[N, 1, H, W]`."""
        hidden = self.body(F.relu(self.stem_norm(self.stem(x))))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits
