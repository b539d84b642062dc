"""The last stages: look up what is published, bundle the release, publish it, and read it back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

from PIL import Image
from prefect import pause_flow_run, task
from prefect.input import RunInput

from tasks import show
from tasks.cache import code_is_unchanged, keeps_results
from tasks.runs import log, tally
from tasks.stage import NETWORK, stage
from tinycats_core.config import PublishConfig, ReleaseConfig
from tinycats_core.errors import RegistryError, ReleaseRejected
from tinycats_core.files import home, read_json
from tinycats_core.progress import waiting
from tinycats_core.records import Dataset, Release, ReleaseParts, WebRuntime
from tinycats_core.release import bundle, hub, promotion, registry, shipped, space, web_runtime
from tinycats_core.release.plan import plan_lines

if TYPE_CHECKING:
    import pandas as pd

FIGURES = ("kid_", "f", "precision", "recall", "copy_rate")  # how the names of those begin that a summary starts with
APPROVAL_SECONDS = 7 * 24 * 3600


class Approval(RunInput):
    """What a person answers before a release is published."""

    publish: bool = True


@task(**NETWORK)
def find_published(config: PublishConfig) -> Release | None:
    """Look up the published release of this name, and verify every file of it."""
    published = hub.find_published(config, home("downloads")) if config.to == "hub" else registry.find_published(config)
    log().info("published now: %s", f"{published.name} {published.version}" if published else "nothing yet")
    return published


@task
def find_web_runtime(config: PublishConfig) -> WebRuntime | None:
    """Find what the page of a release computes with; None if the release gets no page."""
    return web_runtime.find(config, home("web"))


@task(**NETWORK)
def open_release(where: str) -> Release:
    """Open a release folder, or `hub:owner/name`, and verify every file of it."""
    return shipped.open_release(where)


def is_release_of(
    published: Release | None, config: ReleaseConfig, dataset: Dataset, runtime: WebRuntime | None
) -> TypeGuard[Release]:
    """Return whether what is published is what this configuration and this code would make.

    A release with a page counts, too, if the runtime of a page happens not to be found now.
    """
    if published is None:
        return False
    made = read_json(published.path)
    if made["key"] != bundle.release_key(config, dataset):
        return False
    page = made["parents"].get("web-runtime")
    if page is not None if config.publish.page == "none" else runtime is not None and page != bundle.runtime_parent(runtime):
        return False
    return keeps_results() or code_is_unchanged(made.get("code", {}).get("stages", {}))


@stage(bundle.build)
def build_bundle(parts: ReleaseParts) -> Release:
    """Put everything that is shipped into one release folder of the registry."""
    release = bundle.build(parts.config.publish.folder, parts)
    log().info("release %s %s in %s", release.name, release.version, release.folder)
    return release


def wait_for_approval(config: PublishConfig, release: Release) -> None:
    """Where the configuration asks for it, pause the flow run until a person has answered."""
    if config.approval:
        log().warning("%s %s waits for approval: resume this flow run in Prefect's pages", release.name, release.version)
        facts = {"version": release.version, "folder": str(release.folder), "days": APPROVAL_SECONDS // 86400}
        show.event("tinycats.release.waiting", f"tinycats.release.{release.name}", facts)
        answer = pause_flow_run(wait_for_input=Approval, timeout=APPROVAL_SECONDS, poll_interval=5)
        if not answer.publish:
            raise ReleaseRejected(f"{release.name} {release.version} was refused by a person; it stays in {release.folder}.")


@task(**NETWORK)
def publish(release: Release, config: PublishConfig, instead_of: str | None) -> Release:
    """Make the release the published one, in one step, if what it was compared with still is."""
    if config.to == "hub":
        with waiting("uploading"):
            published = hub.publish_to_hub(release, config, instead_of)
    else:
        published = registry.publish_to_folder(release, instead_of)
    show.link("release", published.location, f"{published.name} {published.version}", "The published release")
    return published


@task(**NETWORK)
def publish_space(release: Release, config: PublishConfig) -> None:
    """Publish the page of a release as a static Space, if the configuration asks for it."""
    if config.space:
        with waiting("uploading"):
            address = space.publish(release, config)
        show.link("space", address, f"{release.name} {release.version}", "The page that draws in a browser")
        log().info("the page of %s %s: %s", release.name, release.version, address)


@task(**NETWORK)
def show_plan(release: Release, config: PublishConfig, instead_of: str | None) -> Release:
    """Print what publishing the release would change, file by file, and publish nothing."""
    changes = promotion.plan(release, config, instead_of)
    print("\n".join(plan_lines(changes)), f"not published: {release.folder}", sep="\n")
    return release


@task(**NETWORK)
def read_back(release: Release, config: PublishConfig) -> Release:
    """Read the published release as a user would, and verify every file of it."""
    if config.to == "hub":
        hub.read_back(release, home("downloads"))
    elif (found := registry.find_published(config)) is None or found.version != release.version:
        raise RegistryError(
            f"{release.name} {release.version} was published, but {found.version if found else 'nothing'} is found in "
            f"{config.folder}. Run the same command again."
        )
    return release


def summarize(release: Release, what: str) -> Release:
    """Print where the release is, what was decided and what was measured, and show the same in Prefect's pages."""
    decision = read_json(release.folder / "decision.json")
    measured = read_json(release.folder / "metrics.json")
    frame = show.metrics_frame(
        {
            "release": measured["candidate"]["metrics"],
            "real training images": measured["candidate"]["floor"],
            **{runtime: item["metrics"] for runtime, item in measured["onnx"].items()},
        }
    )
    compared = f"compared with {decision['baseline']}" if decision["baseline"] else "the first release of this name"
    verdict = "promoted" if decision["promoted"] else "forced" if decision.get("forced") else "rejected"
    lines = {
        "release": f"{release.name} {release.version}, {what}",
        "folder": str(release.folder),
        "location": release.location,
        "decision": f"{verdict} ({compared})",
        "stages": tally(),
    }
    print("\n".join(f"{name:9} {value}" for name, value in lines.items()), frame.to_string(index=False), sep="\n\n")
    show.markdown("summary", _page(release, lines, frame), f"{release.name} {release.version}: {what}")
    return release


def _page(release: Release, lines: Mapping[str, str], frame: "pd.DataFrame") -> str:
    """Return the summary as markdown: the pictures, five figures, what was decided, every figure, and the standard errors last."""
    grid = show.data_uri(Image.open(release.folder / "samples" / "grid.png"))
    errors = frame["metric"].str.endswith("_std")
    values = frame.loc[~errors, :]
    first = [next(row for row, name in values["metric"].items() if name.startswith(kind)) for kind in FIGURES]
    listed = "\n".join(f"- **{name}**: {value}" for name, value in lines.items())
    five, all_figures, deviations = map(show.markdown_table, (values.loc[first, :], values, frame.loc[errors, :]))
    parts = (f"![samples]({grid})", five, listed, "### All figures", all_figures, "### Standard errors", deviations)
    return "\n\n".join(parts)
