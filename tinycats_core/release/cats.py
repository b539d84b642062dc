"""A finished release as an object that draws cats."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image
from pydantic import ValidationError

from tinycats_core.config import SampleConfig
from tinycats_core.errors import ConfigError, ExportError
from tinycats_core.files import write_together
from tinycats_core.generator import drawing, onnx_file
from tinycats_core.pictures import contact_sheet, sheet_names
from tinycats_core.presets import explain
from tinycats_core.progress import steps
from tinycats_core.release import contents, manifest, shipped

if TYPE_CHECKING:
    import onnxruntime

# PyTorch is imported only if it draws: it takes longer to load than onnxruntime takes to draw.

Draw = Callable[[np.ndarray, SampleConfig], np.ndarray]  # labels to images, uint8 (N, S, S, 3)
SHEET_COLUMNS = 16  # pictures of a class on a contact sheet, at most
Runtime = Literal["pytorch", "onnx"]
BAKED = {"sampler", "steps", "shift", "guidance_interval"}  # settings that a graph cannot change


class Cats:
    """The generator of a release, with the sampler, the guidance and the seed that were measured.

    `tinycats_core.load` makes one. The files of the release are verified first.

    Args:
        folder: a release folder, or a link to one.
        runtime: pytorch, or onnx for the graph that the release recommends.
        device: auto, cpu, cuda or mps; onnx runs on the CPU where it is auto.

    Raises:
        RegistryError: the folder is no release, or is damaged.
    """

    def __init__(self, folder: str | Path, runtime: Runtime = "pytorch", device: str = "auto"):
        if runtime not in ("pytorch", "onnx"):
            raise ConfigError(f"runtime is {runtime!r}; allowed: pytorch, onnx")
        self.release = manifest.read_release(Path(folder))
        self.settings = shipped.config(self.release).sample.single()
        self.runtime: Runtime = runtime
        self._draw: Draw = self._with_onnxruntime(device) if runtime == "onnx" else self._with_pytorch(device)

    def _with_onnxruntime(self, device: str) -> Draw:
        if device not in ("auto", *onnx_file.PROVIDERS):
            raise ConfigError(f"device is {device!r}; onnxruntime runs on: auto, {', '.join(onnx_file.PROVIDERS)}")
        graph = shipped.graph(self.release)
        path, content = (graph.path, None) if graph else self._composed()
        provider = "cpu" if device == "auto" else device

        @cache
        def session(threads: int) -> "onnxruntime.InferenceSession":
            return onnx_file.open_session(path, onnx_file.GRAPH, provider, threads, content)

        data = contents.read(self.release.folder, "data.json", contents.Data)
        self.classes, self.image_size = tuple(data.classes), data.image_size
        facts = session(0).get_modelmeta().custom_metadata_map
        if (facts.get("image_size"), facts.get("classes")) != (str(self.image_size), json.dumps(self.classes)):
            raise ExportError(f"{path} draws other classes or another size than its release says. Make the release again.")
        if _baked(facts) != self.settings.model_dump(include=BAKED):
            raise ExportError(f"{path} draws by other settings than its release says. Make the release again.")

        def draw(labels: np.ndarray, settings: SampleConfig) -> np.ndarray:
            many = provider == "cpu" and len(labels) > 1
            return drawing.draw(
                session(1 if many else 0),
                labels.tolist(),
                settings.seed,
                settings.guidance,
                1 if provider == "cpu" else settings.batch_size,
                lambda parts: steps(parts, "drawing"),
                drawing.cores() if many else 1,
            )

        return draw

    def _composed(self) -> tuple[Path, bytes]:
        """Return the denoiser file of a release from before there were graphs, and the graph that is made of it."""
        from tinycats_core.release import graph

        denoiser = shipped.onnx(self.release)
        return denoiser.path, graph.compose(denoiser, self.settings).SerializeToString()

    def _with_pytorch(self, device: str) -> Draw:
        import torch

        from tinycats_core.device import pick_device
        from tinycats_core.generator.sampling import sample
        from tinycats_core.generator.weights import load_generator

        place = pick_device(device)
        network, header = load_generator(shipped.generator(self.release).path, place)
        self.classes, self.image_size = tuple(header.classes), header.model.image_size

        def draw(labels: np.ndarray, settings: SampleConfig) -> np.ndarray:
            images = sample(network, torch.from_numpy(labels), self.image_size, len(self.classes), settings, place)
            return images.permute(0, 2, 3, 1).contiguous().numpy()

        return draw

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
        return [Image.fromarray(image) for image in self._images(name, n, seed, guidance)[1]]

    def save(
        self, folder: Path, name: str | None = None, n: int = 1, seed: int | None = None, guidance: float | None = None
    ) -> list[Path]:
        """Draw pictures like `sample`, and write each to `<class>-<number>.png` and all to a contact sheet, `sheet.png`.

        Nothing is written before all are drawn.

        Returns:
            The files, the sheet last.

        Raises:
            ConfigError: as `sample`; the folder is a file, or lies in the release.
        """
        self._require_outside(folder)
        labels, images = self._images(name, n, seed, guidance)
        names = sheet_names(self.classes)
        pictures = {
            f"{names[label]}-{i % n}.png": Image.fromarray(image)
            for i, (label, image) in enumerate(zip(labels, images, strict=True))
        }
        scale = max(1, 64 // self.image_size)
        pictures["sheet.png"] = contact_sheet(images.transpose(0, 3, 1, 2), labels, self.classes, min(n, SHEET_COLUMNS), scale)
        return write_together(
            folder, {file: lambda path, picture=picture: picture.save(path, format="PNG") for file, picture in pictures.items()}
        )

    def _images(self, name: str | None, n: int, seed: int | None, guidance: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Return labels, int64 (N,), and images, uint8 (N, S, S, 3)."""
        if n < 1:
            raise ConfigError(f"n is {n}; at least 1 is needed")
        given = {key: value for key, value in {"seed": seed, "guidance": guidance}.items() if value is not None}
        try:
            settings = SampleConfig.model_validate(self.settings.model_dump() | given)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None
        labels = np.repeat(np.asarray(self._labels(name), np.int64), n)
        return labels, self._draw(labels, settings)

    def _require_outside(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"the output folder {folder} is a file; give a folder")
        if folder.resolve().is_relative_to(self.release.folder):
            raise ConfigError(f"the output folder {folder} lies in the release, which it would damage; give one elsewhere")

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


def _baked(facts: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the settings that a graph cannot change, from its metadata; None if it does not say."""
    try:
        return SampleConfig.model_validate_json(facts.get("sampling", "")).model_dump(include=BAKED)
    except ValidationError:
        return None
