"""The base of a training: the release that `train.start_from` names, found and checked before anything expensive."""

import re
from pathlib import Path

from tinycats_core.config import ReleaseConfig
from tinycats_core.config.training import BaseRelease
from tinycats_core.errors import RegistryError, TinycatsError, printable
from tinycats_core.files import expanded, home
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Release
from tinycats_core.release import hub, manifest, shipped
from tinycats_core.release.registry import LATEST
from tinycats_core.training.base_weights import base_path, is_kept, keep, require_same_shape


def resolve(config: ReleaseConfig) -> ReleaseConfig:
    """Return the configuration with `train.start_from` in full: name, version, and the sha256 of the weights, which lie here then.

    It is the folder of a release, the name of one in `publish.folder` with or without its version, `hub:owner/name`, or in
    full already, as in the settings of a release. So everything that depends on the settings depends on the weights' digest.

    Raises:
        RegistryError: there is no such release, it is damaged or of a later version of tinycats, or the Hub cannot be reached.
        CheckpointError: the weights cannot be read, or are of another network; names what differs.
    """
    if (given := config.train.start_from) is None:
        return config
    base = BaseRelease.parse(given)
    if base is None or not is_kept(base):
        try:
            base = _fetch(given, base, config.publish.folder)
        except TinycatsError as error:
            raise RegistryError(f"train.start_from is {printable(given)}: {error}") from error
    _, header = load_generator(base_path(base))
    require_same_shape(base, header.model, config.model)
    return config.model_copy(update={"train": config.train.model_copy(update={"start_from": str(base)})})


def _fetch(given: str, wanted: BaseRelease | None, registry: Path) -> BaseRelease:
    """Find a release, and copy its weights to their place on this machine."""
    release, source = _find(f"{wanted.source}/{wanted.version}" if wanted else given, registry, wanted)
    weights = shipped.generator(release)
    base = BaseRelease(source, release.version, weights.sha256)
    if wanted and wanted.sha256 != weights.sha256:
        raise RegistryError(
            f"{release.location} has other weights, of the sha256 {weights.sha256[:12]}…. Leave out what stands after the name."
        )
    keep(weights.path, base)
    return base


def _find(text: str, registry: Path, wanted: BaseRelease | None) -> tuple[Release, str]:
    """Return a verified release, and what it is called apart from where it lies."""
    if text.startswith("hub:"):
        source = wanted.source if wanted else text
        repo_id = source.removeprefix("hub:")
        if not re.fullmatch(r"[^/@\s]+/[^/@\s]+", repo_id):
            raise RegistryError("that is no repository. Give hub:owner/name.")
        found = hub.download_release(repo_id, home("downloads"), wanted.version if wanted else None)
        if found is None:
            raise RegistryError("it holds no release, or this machine may not read it. Check the name, or set HF_TOKEN.")
        return found, source
    try:
        here = expanded(text)
        places = (here, here / LATEST, registry / text / LATEST, registry / text)
        place = next((place for place in places if (place / manifest.NAME).exists()), None)
    except (OSError, ValueError) as error:
        raise RegistryError(f"it cannot be looked up ({printable(error)}). Give another name.") from None
    if place:
        release = manifest.read_release(place)
        return release, release.name
    raise RegistryError(
        f"there is no release, neither in that folder nor of that name in {registry}. Give the folder of a release, the name of "
        "one that is published there, or hub:owner/name."
    )
