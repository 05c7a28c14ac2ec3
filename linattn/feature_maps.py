"""Feature maps by name, as functions or as modules: what `linear_attention` does to q and k before the sums."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from linattn.checks import autocasts
from linattn.errors import ArgumentError, DtypeError, ShapeError, unknown_name
from linattn.kernels.feature_map.maps import MAPS, NON_NEGATIVE

FeatureMap = str | Callable[[Tensor], Tensor]
NAMES = tuple(MAPS)


def mapped(
    q: Tensor, k: Tensor, feature_map: FeatureMap, normalize: bool, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, str]:
    """Return q and k and the name of the map that the kernel still has to apply ("identity" once a callable was).

    A callable gets `[B, H, T, D]` and returns `[B, H, T, C]`. If it has an attribute `positive` that is False it is
    refused with normalize=True; without that attribute it is trusted.
    """
    if isinstance(feature_map, str):
        if feature_map not in MAPS:
            raise unknown_name("feature map", feature_map, MAPS)
        if normalize and feature_map not in NON_NEGATIVE:
            raise ArgumentError(
                f"feature_map={feature_map!r} makes similarities that may be negative and needs normalize=False; "
                f"accepted with normalize=True: {', '.join(sorted(NON_NEGATIVE))}, or a callable "
                "(for features that are already mapped: feature_map=lambda x: x)"
            )
        return q, k, feature_map
    if not callable(feature_map):
        raise ArgumentError(f"feature_map must be a name or a callable; given: {feature_map!r}")
    if normalize and getattr(feature_map, "positive", True) is False:
        raise ArgumentError(
            f"{feature_map!r} says positive=False: its similarities may be negative and need normalize=False"
        )
    if key_mask is not None:  # padding may hold NaN, which would reach the gradients of a map's parameters
        k = k.masked_fill(~key_mask[:, None, :, None], 0)
    fq, fk = _check_features(q, feature_map(q), feature_map(k), k)
    if autocasts(q.device.type):
        fq, fk = fq.to(q.dtype), fk.to(k.dtype)
    if fq.dtype != q.dtype or fk.dtype != k.dtype:
        raise DtypeError(f"feature_map must keep the dtype {q.dtype}; given: {fq.dtype} for q, {fk.dtype} for k")
    return fq, fk, "identity"


def _check_features(q: Tensor, fq: object, fk: object, k: Tensor) -> tuple[Tensor, Tensor]:
    def shapes(x: object) -> str:
        return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__

    if isinstance(fq, Tensor) and isinstance(fk, Tensor) and fq.dim() == fk.dim() == 4:
        leading = fq.shape[:3] == q.shape[:3] and fk.shape[:3] == k.shape[:3]
        if leading and fq.shape[3] == fk.shape[3] and fq.shape[3] > 0:
            return fq, fk
    raise ShapeError(
        "feature_map must turn [B, H, T, D] into [B, H, T, C] with one C >= 1 for q and k; given: "
        f"q {tuple(q.shape)} -> {shapes(fq)}, k {tuple(k.shape)} -> {shapes(fk)}"
    )
