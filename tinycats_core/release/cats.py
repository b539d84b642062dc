"""A finished release as an object that draws cats."""

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import ModelHubMixin, constants
from PIL import Image
from pydantic import ValidationError

from tinycats_core.config import SampleConfig
from tinycats_core.device import pick_device
from tinycats_core.errors import ConfigError, RegistryError
from tinycats_core.files import atomic_path, make_folder
from tinycats_core.generator.onnx_file import onnx_velocity
from tinycats_core.generator.sampling import sample
from tinycats_core.generator.weights import load_generator
from tinycats_core.pictures import to_pil
from tinycats_core.presets import explain
from tinycats_core.release import hub, manifest, shipped

Runtime = Literal["pytorch", "onnx"]


class Cats(ModelHubMixin, library_name="tinycats", pipeline_tag="unconditional-image-generation"):
    """The generator of a release, with the sampler, the guidance and the seed that were measured.

    `load` or `from_pretrained` make one. The files of the release are verified first.

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

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load a release folder, or a repository of the Hub, `owner/name`, which is downloaded once for each commit.

        The arguments are huggingface_hub's; `runtime` and `device` may follow.
        """
        name = str(pretrained_model_name_or_path)
        if not Path(name).is_dir():
            folder = Path(cache_dir or Path(constants.HF_HOME) / "tinycats") / name.replace("/", "--")
            if force_download and not local_files_only:
                shutil.rmtree(folder, ignore_errors=True)
            name = str(_newest(folder, revision) if local_files_only else _download(name, folder, revision, token))
        return super().from_pretrained(name, **model_kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, runtime: Runtime = "pytorch", device: str = "auto", **of_the_hub: Any) -> Self:
        return cls(model_id, runtime, device)

    def _save_pretrained(self, save_directory: Path) -> None:
        for file in self.release.folder.rglob("*"):
            if file.is_file():
                target = save_directory / file.relative_to(self.release.folder)
                make_folder(target.parent)
                with atomic_path(target) as temporary:
                    shutil.copyfile(file, temporary)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Refuse: publishing goes through the gate and the registry. Raises RegistryError."""
        raise RegistryError("a release is published by its flow: set publish.to to 'hub' and run `make release` again")


def load(release: str | Path, runtime: Runtime = "pytorch", device: str = "auto") -> Cats:
    """Load the generator of a release: a folder, `owner/name` or `hub:owner/name`.

    Raises:
        RegistryError: there is no such release, it is damaged, or the Hub cannot be reached.
    """
    name = str(release)
    if name.startswith("hub:") or (name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "~", "/"))):
        return Cats.from_pretrained(name.removeprefix("hub:"), runtime=runtime, device=device)
    return Cats(Path(release).expanduser(), runtime, device)


def _download(repo_id: str, folder: Path, revision: str | None, token: str | bool | None) -> Path:
    release = hub.download_release(repo_id, make_folder(folder), revision, token)
    if release is None:
        raise RegistryError(f"{repo_id} holds no release. Give another repository, or the folder of a release.")
    return release.folder


def _newest(folder: Path, revision: str | None) -> Path:
    """Return the release that was downloaded last. Raises RegistryError if there is none."""
    found = sorted((path for path in folder.glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    found = [path for path in found if revision in (None, path.name)]
    if not found:
        raise RegistryError(f"{folder} holds no downloaded release{f' of {revision}' if revision else ''}. Download it first.")
    return found[-1]
