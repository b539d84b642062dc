"""The weights that a training starts from: those of a release, which `release.base` has resolved."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from tinycats_core.config import ModelConfig
from tinycats_core.config.training import BaseRelease
from tinycats_core.errors import CheckpointError
from tinycats_core.files import atomic_path, home, sha256_of
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Weights
from tinycats_core.tensors import read_header

EMBEDDING = "class_embed.weight"


def base_path(base: BaseRelease) -> Path:
    """Return where the weights of a base lie on this machine, by their digest."""
    return home("bases") / f"{base.sha256}.safetensors"


def is_kept(base: BaseRelease) -> bool:
    """Return whether the weights of a base lie here, unchanged."""
    return base_path(base).is_file() and sha256_of(base_path(base)) == base.sha256


def keep(path: Path, base: BaseRelease) -> None:
    """Copy the weights of a base from a file to their place, unless they are there. Raises CheckpointError."""
    if is_kept(base):
        return
    if not path.is_file() or (found := sha256_of(path)) != base.sha256:
        what = f"have the sha256 {found[:12]}… instead of {base.sha256[:12]}…" if path.is_file() else "are not there"
        raise CheckpointError(f"the weights of train.start_from, {path}, {what}")
    with atomic_path(base_path(base)) as temporary:
        shutil.copyfile(path, temporary)


def base_record(base: BaseRelease) -> Weights:
    """Return the record of the weights of a base. Raises CheckpointError."""
    header = read_header(base_path(base), "generator")
    return Weights(path=base_path(base), sha256=base.sha256, kind="generator", step=header["step"], facts=header["facts"])


def require_same_shape(base: BaseRelease, model: ModelConfig, here: ModelConfig) -> None:
    """Raise CheckpointError, which names what differs, if a base is another network. The number of classes may differ."""
    there, wanted = (shape.model_dump(exclude={"num_classes"}) for shape in (model, here))
    different = [f"model.{name} is {there[name]} there and {wanted[name]} here" for name in wanted if there[name] != wanted[name]]
    if different:
        raise CheckpointError(
            f"train.start_from is {base.source} {base.version}, another network: {'; '.join(different)}. Set them as they are "
            "there (data.image_size with model.image_size), or start from another release."
        )


def adopt(net: TinyDiT, classes: Sequence[str], base: BaseRelease) -> None:
    """Put the weights of a base into a network. A class keeps the embedding of its name; a new one starts from the null class's.

    Raises:
        CheckpointError: the weights are gone, damaged, or of another network.
    """
    if not is_kept(base):
        raise CheckpointError(f"the weights of train.start_from, {base_path(base)}, are damaged or gone. Run the command again.")
    model, header = load_generator(base_path(base))
    require_same_shape(base, header.model, net.config)
    rows = {name: row for row, name in enumerate(header.classes)}
    null = header.model.num_classes
    weights = net.state_dict() | model.state_dict()  # what only a training has, the layer of augmentation, stays as it is
    weights[EMBEDDING] = weights[EMBEDDING][torch.tensor([*(rows.get(name, null) for name in classes), null])]
    net.load_state_dict(weights)
