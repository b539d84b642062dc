"""A finished release as an object that draws cats."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import ValidationError

from tinycats_core.config import SampleConfig
from tinycats_core.device import pick_device
from tinycats_core.errors import ConfigError
from tinycats_core.generator.onnx_file import onnx_velocity
from tinycats_core.generator.sampling import sample
from tinycats_core.generator.weights import load_generator
from tinycats_core.pictures import to_pil
from tinycats_core.presets import explain
from tinycats_core.release import manifest, shipped

Runtime = Literal["pytorch", "onnx"]


class Cats:
    """The generator of a release, with the sampler, the guidance and the seed that were measured.

    `tinycats_core.load` makes one. The files of the release are verified first.

    Args:
        folder: a release folder, or a link to one.
        runtime: pytorch, or onnx for the smallest ONNX file of the release.
        device: auto, cpu or cuda; onnx runs on the CPU where it is auto.

    Raises:
        RegistryError: the folder is no release, or is damaged.
    """

    def __init__(self, folder: str | Path, runtime: Runtime = "pytorch", device: str = "auto"):
        if runtime not in ("pytorch", "onnx"):
            raise ConfigError(f"runtime is {runtime!r}; allowed: pytorch, onnx")
        self.release = manifest.read_release(Path(folder))
        self.settings = shipped.config(self.release).sample.single()
        network, header = load_generator(shipped.generator(self.release).path)
        self.classes, self.image_size = tuple(header.classes), header.model.image_size
        if runtime == "onnx":
            self.device = torch.device("cpu" if device == "auto" else device)
            self.velocity = onnx_velocity(shipped.onnx(self.release).path, self.device.type)
        else:
            self.device = pick_device(device)
            self.velocity = network.to(self.device)

    def sample(
        self, name: str | None = None, n: int = 1, seed: int | None = None, guidance: float | None = None
    ) -> list[Image.Image]:
        """Draw pictures of a class.

        The same release, class, number and seed give the same pictures.

        Args:
            name: one of `classes`; None: n pictures of each.
            n: how many, at least 1.
            seed: of the noise; None: the one that was measured.
            guidance: 1 for none; None: the one that was measured.

        Raises:
            ConfigError: there is no such class, or a number is out of range.
        """
        if n < 1:
            raise ConfigError(f"n is {n}; at least 1 is needed")
        given = {key: value for key, value in {"seed": seed, "guidance": guidance}.items() if value is not None}
        try:
            settings = SampleConfig.model_validate(self.settings.model_dump() | given)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None
        labels = torch.tensor(self._labels(name)).repeat_interleave(n)
        images = sample(self.velocity, labels, self.image_size, len(self.classes), settings, self.device)
        return [to_pil(image) for image in images]

    def _labels(self, name: str | None) -> Sequence[int]:
        if name is None:
            return range(len(self.classes))
        by_name = {known.casefold().replace(" ", "_"): label for label, known in enumerate(self.classes)}
        wanted = name.casefold().replace(" ", "_")
        if wanted not in by_name:
            near = difflib.get_close_matches(wanted, by_name, 1)
            advice = f"did you mean {self.classes[by_name[near[0]]]}?" if near else f"allowed: {', '.join(self.classes)}"
            raise ConfigError(f"there is no class {name!r}; {advice}")
        return [by_name[wanted]]
