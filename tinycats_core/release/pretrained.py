"""`Cats` as a model of the Hugging Face Hub: `from_pretrained` and `save_pretrained` of huggingface_hub's mixin."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from tinycats_core.errors import RegistryError
from tinycats_core.files import atomic_path, make_folder
from tinycats_core.release import hub
from tinycats_core.release.cats import Cats, Runtime


def load(release: str | Path, runtime: Runtime = "pytorch", device: str = "auto") -> Cats:
    """Load the generator of a release: a folder, `owner/name` or `hub:owner/name`.

    Raises:
        RegistryError: there is no such release, it is damaged, or the Hub cannot be reached.
    """
    name = str(release)
    if name.startswith("hub:") or (name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "~", "/"))):
        repo_id = name.removeprefix("hub:")
        if not all(repo_id.partition("/")):
            raise RegistryError(f"{name} names no repository; write hub:owner/name, or give the folder of a release.")
        return hub_class().from_pretrained(repo_id, runtime=runtime, device=device)
    return Cats(Path(release).expanduser(), runtime, device)


@cache
def hub_class() -> "type[Any]":
    """Return `Cats` with the mixin: a class that needs huggingface_hub, which `Cats` itself does not."""
    from huggingface_hub import ModelHubMixin

    class PretrainedCats(ModelHubMixin, Cats, library_name="tinycats", pipeline_tag="unconditional-image-generation"):
        """Cats of a release folder or of a repository of the Hub, which is downloaded once for each commit."""

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
        ) -> "PretrainedCats":
            folder = pretrained_model_name_or_path
            if not Path(folder).is_dir():
                place = _cache(cache_dir) / str(folder).replace("/", "--")
                if force_download and not local_files_only:
                    shutil.rmtree(place, ignore_errors=True)
                folder = _newest(place, revision) if local_files_only else _download(str(folder), place, revision, token)
            return super().from_pretrained(str(folder), **model_kwargs)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, runtime: Runtime = "pytorch", device: str = "auto", **of_the_hub: Any) -> Any:
            return cls(model_id, runtime, device)

        def _save_pretrained(self, save_directory: Path) -> None:
            _copy(self.release.folder, save_directory)

        def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
            """Refuse: publishing goes through the gate and the registry. Raises RegistryError."""
            raise RegistryError("a release is published by its flow: set publish.to to 'hub' and run `make release` again")

    return PretrainedCats


def _cache(folder: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(folder or Path(constants.HF_HOME) / "tinycats")


def _copy(release: Path, folder: Path) -> None:
    for file in release.rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(release)
            make_folder(target.parent)
            with atomic_path(target) as temporary:
                shutil.copyfile(file, temporary)


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
