"""Settings that decide the outcome of an experiment with autoencoders."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from linattn.autoencoders.analysis.probe import ProbeConfig
from linattn.errors import ArgumentError, CheckpointError, refusal, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping

OBJECTIVES = ("vanilla", "denoising", "masked")


@dataclass(frozen=True)
class Settings:
    """All that decides the outcome of an experiment on a given set. The names are those of the options.

    Attributes:
        objective: "vanilla", "denoising" or "masked".
        hidden: sizes of the encoder's layers, the last one is k. With `patch`, k alone.
        activation: between layers; "identity" makes a linear model.
        noise: standard deviation for "denoising".
        mask: probability for "masked"; with `patch`, the share of patches hidden.
        patch: side of the patches that an attention encoder sees, 0 for a fully connected model.
        kernel, layers, heads: of the attention encoder.
        loss: "sum" over a sample's entries or "mean" over them.
        epochs, batch, lr: of Adam, without decay of rate or weights.
        validate_every: epochs between validations.
        patience: see `TrainingConfig`.
        repeats: R; repeat r has its own weights, order of samples and corruption, all from seed + r.
        seed: of the first repeat, of the split of the set, and of what is labelled.
    """

    objective: str = "vanilla"
    hidden: tuple[int, ...] = (256, 32)
    activation: str = "relu"
    noise: float = 0.5
    mask: float = 0.25
    patch: int = 0
    kernel: str = "quadratic"
    layers: int = 2
    heads: int = 4
    loss: str = "sum"
    epochs: int = 10
    batch: int = 200
    lr: float = 5e-4
    validate_every: int = 1
    patience: int | None = None
    repeats: int = 1
    seed: int = 0
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        for name, least in (
            ("epochs", 1),
            ("batch", 1),
            ("validate_every", 1),
            ("repeats", 1),
            ("seed", 0),
            ("patch", 0),
        ):
            if getattr(self, name) < least:
                raise refusal(
                    ArgumentError,
                    f"{name} is too small",
                    given=f"{name}={getattr(self, name)}",
                    accepted=f"at least {least}",
                )
        if self.patch and (len(self.hidden) != 1 or self.objective == "denoising"):
            raise refusal(
                ArgumentError,
                "an encoder of patches has other settings",
                given=f"hidden={list(self.hidden)} and objective={self.objective!r} with patch={self.patch}",
                accepted="one size, the width of the attention encoder, and 'vanilla' or 'masked'",
            )

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Settings:
        """Rebuild what `asdict` made; names that are not settings are left out.

        Raises:
            CheckpointError: settings are missing.
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if known.keys() != {f.name for f in fields(cls)}:
            missing = sorted({f.name for f in fields(cls)} - known.keys())
            raise CheckpointError(
                f"the settings {', '.join(missing)} are missing; accepted: those of an autoencoder's run"
            )
        return cls(**{**known, "hidden": tuple(known["hidden"]), "probe": ProbeConfig(**known["probe"])})
