"""The generator's weights on disk, and the moving average that makes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tinycats_core.config import MOST_CLASSES, ModelConfig
from tinycats_core.errors import CheckpointError, printable
from tinycats_core.files import sha256_of
from tinycats_core.generator.model import TinyDiT
from tinycats_core.records import Weights
from tinycats_core.tensors import load_strictly, read_safetensors, write_safetensors


class GeneratorHeader(BaseModel):
    """What stands in the metadata of a generator's weights."""

    model_config = ConfigDict(frozen=True)

    model: ModelConfig
    classes: Annotated[tuple[str, ...], Field(max_length=MOST_CLASSES)]
    step: int
    facts: dict[str, float | int | str | None] = {}


def save_generator(
    path: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    classes: Sequence[str],
    step: int,
    facts: dict[str, float | int | str | None] | None = None,
) -> Weights:
    """Write the weights that are shipped, with everything that is needed to build the network around them."""
    header = GeneratorHeader(model=model, classes=tuple(classes), step=step, facts=facts or {})
    write_safetensors(path, weights, {"kind": "generator", **header.model_dump(mode="json")})
    return Weights(path=path, sha256=sha256_of(path), kind="generator", step=step, facts=header.facts)


def load_generator(path: Path, device: str | torch.device = "cpu") -> tuple[TinyDiT, GeneratorHeader]:
    """Build the network of a weights file, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or its weights do not fit its own configuration.
    """
    tensors, raw = read_safetensors(path, "generator")
    try:
        header = GeneratorHeader.model_validate({key: raw.get(key) for key in GeneratorHeader.model_fields})
    except ValidationError as error:
        raise CheckpointError(
            f"{path} has a header that this version cannot read: {printable(error.errors()[0]['msg'])}."
        ) from None
    _require_room(header.model, tensors, path)
    with torch.random.fork_rng(devices=[]):  # initial weights, which are thrown away, must not cost random numbers
        model = TinyDiT(header.model)
    load_strictly(model, tensors, path)
    return model.to(device).eval(), header


def _require_room(model: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a header that promises a larger network than the file holds, before its memory is taken. Raises CheckpointError."""
    positions = (model.image_size // model.patch_size) ** 2
    least = model.width * (12 * model.depth * model.width + 3 * model.patch_size**2 + model.num_classes + positions)
    if (held := sum(tensor.numel() for tensor in tensors.values())) < least:
        raise CheckpointError(
            f"{path} is of another architecture: it holds {held:,} numbers, and the network of its header has at least {least:,}. "
            "Use the configuration that it was made with."
        )


def ema_decay(decay: float, step: int) -> float:
    """Return the decay of a step: it warms up as (1 + step) / (10 + step), so that short runs have a usable average."""
    return min(decay, (1 + step) / (10 + step))


def update_ema(ema: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    """Move the average towards the weights in place: ema ← decay · ema + (1 − decay) · weights."""
    averages, targets = list(ema.values()), [weights[name] for name in ema]
    torch._foreach_lerp_(averages, targets, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
