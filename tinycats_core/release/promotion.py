"""Publishing a release that was built before: after an approval that timed out, or to another place."""

from pathlib import Path

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError, ReleaseRejected
from tinycats_core.records import Release
from tinycats_core.release import history, hub, registry
from tinycats_core.release.manifest import read_release
from tinycats_core.release.plan import Change


def promote(path: Path, repo_id: str | None = None) -> Release:
    """Publish a built release in the registry that it lies in, or on the Hub.

    Args:
        path: the release folder.
        repo_id: `owner/name` on the Hub; None = the registry.

    Raises:
        ReleaseRejected: the gate refused it, and nobody has forced it.
        RegistryError: it is damaged, lies in no registry, or is not compared with what is published now.
    """
    release, config, baseline = _candidate(path, repo_id)
    if config.to == "hub":
        return hub.publish_to_hub(release, config, baseline)
    return registry.publish_to_folder(release, baseline)


def plan_promotion(path: Path, repo_id: str | None = None) -> list[Change]:
    """Return what `promote` would change. Changes nothing, and raises what `promote` raises."""
    return plan(*_candidate(path, repo_id))


def plan(release: Release, config: PublishConfig, instead_of: str | None) -> list[Change]:
    """Return what publishing a release where the configuration says would change. Raises RegistryError."""
    if config.to == "hub":
        return hub.plan_on_hub(release, config, instead_of)
    return registry.plan_in_folder(release, instead_of)


def _candidate(path: Path, repo_id: str | None) -> tuple[Release, PublishConfig, str | None]:
    """Return a release that may be published, where to, and the version that it was compared with."""
    release = read_release(path)
    decision = history.decision(release.folder)
    if decision is None or not (decision.promoted or decision.forced):
        raise ReleaseRejected(
            f"the gate refused {release.name} {release.version}: its decision.json says why. To publish it anyway, make it "
            "again with `tinycats promote --preset … --force --why …`: the finished stages come from the cache."
        )
    if repo_id is not None:
        return release, PublishConfig(name=release.name, to="hub", repo_id=repo_id), decision.baseline
    folder = release.folder.parent.parent
    if not registry.is_registry(folder) or release.folder.parent.name != release.name:
        raise RegistryError(f"{release.folder} lies in no registry. Give a release of one, or --hub owner/name.")
    return release, PublishConfig(name=release.name, folder=folder), decision.baseline
