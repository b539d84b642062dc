"""The page of a release as a static Space on the Hugging Face Hub: one commit for each version."""

import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinycats_core.config import PublishConfig
from tinycats_core.data import sources
from tinycats_core.errors import RegistryError
from tinycats_core.files import home
from tinycats_core.records import Release, WebRuntime
from tinycats_core.release import contents, page, web_runtime
from tinycats_core.release.hub import GITATTRIBUTES, README
from tinycats_core.release.hub_access import check_credentials, explained, open_api, upload
from tinycats_core.release.plan import shown

SPACE: Any = "space"  # the kind of repository
MARK = "tinycats-page.json"  # says that a Space holds a page of this project, and of which version


def check(config: PublishConfig) -> str:
    """Return the Space that the page would be published to, `owner/name`, after asking the Hub what is there.

    Raises:
        RegistryError: the token may not write there, or the Space holds something else.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo_id = check_credentials(config)
    with explained(f"looking at the Space {repo_id}"), suppress(RepositoryNotFoundError):
        _require_ours(repo_id, open_api().list_repo_files(repo_id, repo_type=SPACE))
    return repo_id


def publish(release: Release, config: PublishConfig) -> str:
    """Replace what the Space holds by the page of a release, in one commit, and return its address.

    The page is the one that the release holds; its runtime must lie there.

    Raises:
        RegistryError: the release has no page, the Space holds something else, or the Hub did not take it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id = check_credentials(config)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as temporary, explained(f"publishing the page to the Space {repo_id}"):
        files = write(release, Path(temporary), repo_id)
        api = open_api()
        api.create_repo(repo_id, repo_type=SPACE, space_sdk="static", private=config.private, exist_ok=True)
        head = api.repo_info(repo_id, repo_type=SPACE).sha
        there = api.list_repo_files(repo_id, repo_type=SPACE, revision=head)
        _require_ours(repo_id, there)
        additions = [CommitOperationAdd(name, path) for name, path in files.items()]
        gone = [CommitOperationDelete(name) for name in sorted({*there} - {GITATTRIBUTES} - {*files})]
        with warnings.catch_warnings():
            # The library's own plain uploads, where Xet is off.
            warnings.filterwarnings("ignore", message="Use 'content=<...>' to upload", category=DeprecationWarning)
            upload(api, repo_id, additions, SPACE)
            title = f"{release.name} {release.version}"
            api.create_commit(repo_id, [*additions, *gone], commit_message=title, repo_type=SPACE, parent_commit=head)
        return f"{api.endpoint}/spaces/{repo_id}"


def write(release: Release, folder: Path, repo_id: str) -> dict[str, Path]:
    """Write the files of the Space to a folder, and return them by name. Raises RegistryError if the release has no page."""
    runtime = release_runtime(release)
    page.write_demo(release.folder, folder, runtime, release.name, release.version, models="", card=f"/{repo_id}")
    for path in page.files_of(release.folder):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(release.folder / "LICENSE", folder / "LICENSE")
    licence = sources.find(contents.read(release.folder, "data.json", contents.Data).source).licence
    header = {"title": release.name, "emoji": "🐈", "colorFrom": "gray", "colorTo": "yellow", "sdk": "static", "license": licence}
    lines = ["---", *(f"{key}: {value}" for key, value in header.items()), "models:", f"  - {repo_id}", "---", ""]
    lines += [f"A page on which the generator {release.name} {release.version} draws cats in the browser."]
    (folder / README).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / MARK).write_text(f'{{"name": "{release.name}", "version": "{release.version}"}}\n', encoding="utf-8")
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def release_runtime(release: Release) -> WebRuntime:
    """Return the runtime that lies in a release. Raises RegistryError if there is none."""
    folder = release.folder / page.DEMO / page.RUNTIME
    if not (release.folder / page.DEMO).is_dir() or not folder.is_dir():
        raise RegistryError(
            f"{release.name} {release.version} has no page with a runtime of its own. Make the release again with publish.page "
            "set to 'bundled'."
        )
    return web_runtime.fetch(home("web"), str(folder))


def _require_ours(repo_id: str, there: list[str]) -> None:
    """Refuse a Space that holds something else. The Hub itself writes a README.md and some files into a new static Space."""
    foreign = sorted({*there} - {GITATTRIBUTES, README, "index.html", "style.css"})
    if foreign and MARK not in there:
        raise RegistryError(
            f"the Space {repo_id} holds files ({shown(foreign)}) and no page of this project. Give another publish.repo_id, or "
            "set publish.space to false."
        )
