"""Groups of images: the cats, and whatever else there is, which is the class `other`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tinycats_core.config import OTHER
from tinycats_core.errors import ConfigError

CATS, ALL = "cats", "all"  # and OTHER


def members(labels: Tensor, classes: Sequence[str], group: str) -> Tensor:
    """Return which images belong to a group, bool (N,), by their labels (N,)."""
    if group == ALL:
        return torch.ones_like(labels, dtype=torch.bool)
    other = labels == (list(classes).index(OTHER) if OTHER in classes else -1)
    return other if group == OTHER else ~other


def sizes(labels: Tensor, classes: Sequence[str]) -> dict[str, int]:
    """Return how many images the cats and `other` have, by their labels (N,)."""
    return {group: int(members(labels, classes, group).sum()) for group in (CATS, OTHER)}


def require_other(classes: Sequence[str], setting: str, share: float) -> None:
    """Raise ConfigError if a share of `other` is set, but there is no such class or no class of cats."""
    if OTHER not in classes or len(classes) == 1:
        names = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
        raise ConfigError(
            f"{setting} is {share:g}, but the data has {'nothing but' if OTHER in classes else 'no'} class {OTHER!r} "
            f"(its classes: {names}). Leave {setting} out."
        )


def key(group: str) -> list[str]:
    """Return what a cache key holds of a group: nothing for all images."""
    return [] if group == ALL else [group]
