"""Releases on the Hugging Face Hub: one repository for a name, one commit and one tag for a version."""

import glob
import hashlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError
from tinycats_core.files import atomic_path, sha256_of
from tinycats_core.records import Release
from tinycats_core.release import history
from tinycats_core.release.history import Entry
from tinycats_core.release.hub_access import check_credentials, explained, open_api, upload
from tinycats_core.release.hub_access import is_transient as is_transient
from tinycats_core.release.manifest import NAME, SIGNATURE, inspect, read_release, verify
from tinycats_core.release.plan import Change, make_plan, shown
from tinycats_core.release.registry import release_files, require_unchanged

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

GITATTRIBUTES = ".gitattributes"  # the Hub's own file in every repository: says which files are large
README = "README.md"


def find_published(config: PublishConfig, folder: Path) -> Release | None:
    """Return the release that is published on the Hub, verified, in `<folder>/<commit>`; None if there is none.

    Its version gets its tag if it has none: the publication that should have set it was interrupted.

    Raises:
        RegistryError: the token may not write there, or what `download_release` raises.
    """
    repo_id = check_credentials(config)
    release = download_release(repo_id, folder)
    if release is not None:
        _tag(open_api(), repo_id, release, release.location.rsplit("/", 1)[1])
    return release


def plan_on_hub(release: Release, config: PublishConfig, instead_of: str | None) -> list[Change]:
    """Return what publishing a release would change in the repository, file by file. Changes nothing.

    Raises:
        RegistryError: as `publish_to_hub`.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    manifest = verify(release.folder)
    repo_id = check_credentials(config)
    with explained(f"looking at {repo_id}"):
        api, head = open_api(), None
        with suppress(RepositoryNotFoundError):
            head = api.model_info(repo_id).sha
        plan, published = _plan(api, repo_id, head, release, manifest)
        require_unchanged(release, published, instead_of)
        return plan


def publish_to_hub(release: Release, config: PublishConfig, instead_of: str | None) -> Release:
    """Replace the release that the repository holds by this one, in one commit, and tag it with its version.

    Only files that the `release.json` there lists are replaced or deleted. The commits before stay in the history.

    Args:
        instead_of: the version that it was compared with; None = nothing was published.

    Returns:
        The release with the address of the commit as its location.

    Raises:
        RegistryError: the release is damaged, another one was published meanwhile, the repository holds what must not be
            replaced, or the Hub did not take it; `is_transient` says whether trying again may help.
    """
    manifest = verify(release.folder)
    repo_id = check_credentials(config)
    with explained(f"publishing {release.name} {release.version} to {repo_id}"):
        api = open_api()
        api.create_repo(repo_id, private=config.private, exist_ok=True)
        head = api.model_info(repo_id).sha
        plan, published = _plan(api, repo_id, head, release, manifest)
        require_unchanged(release, published, instead_of)
        return _commit(api, repo_id, head, release, plan, *history.origin(release.folder))


def rollback(repo_id: str, name: str, version: str, why: str, folder: Path) -> Release:
    """Publish an earlier version again, in one commit that restores its files.

    Args:
        why: the reason, for the commit's message.
        folder: where the version is downloaded to.

    Raises:
        RegistryError: the repository holds no such version, it is damaged or published now, or there is no reason.
    """
    why = history.check_why(why)
    check_credentials(PublishConfig(to="hub", repo_id=repo_id))
    with explained(f"rolling {repo_id} back to {version}"):
        api = open_api()
        release = download_release(repo_id, folder, _commit_of(api, repo_id, name, version))
        if release is None or (release.name, release.version) != (name, version):
            raise RegistryError(f"the tag {version} of {repo_id} holds no release {name} {version}. Give another version.")
        head = api.model_info(repo_id).sha
        plan, published = _plan(api, repo_id, head, release, verify(release.folder))
        if published == version:
            raise RegistryError(f"{name} {version} is the published version already: there is nothing to roll back.")
        return _commit(api, repo_id, head, release, plan, "rollback", why)


def read_history(repo_id: str, name: str) -> list[Entry]:
    """Return what was published under a name, oldest first, from the commits of a repository.

    Raises:
        RegistryError: the Hub cannot be reached or refuses, or there is no such repository.
    """
    with explained(f"reading the history of {repo_id}"):
        commits = open_api().list_repo_commits(repo_id)
    entries: list[Entry] = []
    for commit in reversed(commits):
        if (found := _title(name).fullmatch(commit.title)) is not None:
            at, before = commit.created_at.isoformat(timespec="seconds"), entries[-1].version if entries else None
            why = " ".join((commit.message or "").split()) or None
            how: Any = found["how"] or "release"
            entries.append(Entry(at=at, version=found["version"], how=how, why=why, before=before))
    return entries


def download_release(repo_id: str, folder: Path, revision: str | None = None, token: str | bool | None = None) -> Release | None:
    """Return a release of the Hub, verified, in `<folder>/<commit>`; None if the repository is missing or has none.

    Files that its `release.json` does not list stay where they are. A commit never changes: one that lies there intact is
    not downloaded again.

    Args:
        revision: commit, branch or tag; None = the newest.
        token: of the Hub; None = the one that is configured, False = none.

    Raises:
        RegistryError: the Hub cannot be reached or refuses, the revision does not exist, or the release is damaged.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with explained(f"downloading {repo_id}"):
        api = open_api(token)
        try:
            commit = api.model_info(repo_id, revision=revision).sha
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        assert commit is not None
        if NAME not in api.list_repo_files(repo_id, revision=commit):
            return None
        target = folder / commit
        if inspect(target)[1]:
            with atomic_path(target) as temporary:
                api.hf_hub_download(repo_id, NAME, revision=commit, local_dir=temporary)
                files = inspect(temporary)[0].get("files")
                listed = [NAME, SIGNATURE, *(map(glob.escape, files) if isinstance(files, dict) else ())]
                api.snapshot_download(repo_id, revision=commit, local_dir=temporary, allow_patterns=listed)
                shutil.rmtree(temporary / ".cache", ignore_errors=True)  # the library's notes about the download
                _require_intact(temporary, f"{repo_id} at {commit[:12]}")
        return read_release(target).model_copy(update={"published": True, "location": f"{api.endpoint}/{repo_id}/tree/{commit}"})


def read_back(release: Release, folder: Path) -> Release:
    """Download what `publish_to_hub` published, at its commit, and return it once it is proved to be the same release.

    Raises:
        RegistryError: what the Hub holds is missing, damaged, or another release.
    """
    address, commit = release.location.rsplit("/tree/", 1)
    repo_id = "/".join(address.split("/")[-2:])
    found = download_release(repo_id, folder, commit)
    if found is None or found.sha256 != release.sha256:
        raise RegistryError(f"{release.location} does not hold the release {release.version} that was published. Publish it again.")
    return found


def _plan(
    api: "HfApi", repo_id: str, head: str | None, release: Release, manifest: Mapping[str, Any]
) -> tuple[list[Change], str | None]:
    """Return the changes that make a repository hold a release, and the version that it holds at the commit `head`."""
    from huggingface_hub.hf_api import RepoFile

    tree = [] if head is None else api.list_repo_tree(repo_id, recursive=True, revision=head)
    there = {item.path: item for item in tree if isinstance(item, RepoFile)}
    before = _listed(api, repo_id, head, there)
    new = {file: (release.folder / file).stat().st_size for file in release_files(release.folder, manifest)}
    same = {file for file in new.keys() & there.keys() if _is_same(there[file], release.folder / file)}
    ours = {NAME, SIGNATURE, *before["files"]} if before else {*there} - {GITATTRIBUTES}
    changes = make_plan(new, {file: item.size for file, item in there.items()}, ours, same, repo_id)
    return changes, before["version"] if before else None


def _listed(api: "HfApi", repo_id: str, head: str | None, there: "Mapping[str, RepoFile]") -> Mapping[str, Any] | None:
    """Return the manifest in a repository, None if it holds nothing but what the Hub itself writes into a new one.

    The Hub writes a .gitattributes and, if a licence is chosen, a README.md that is a YAML header and nothing else.
    """
    if head is None:
        return None
    if NAME in there:
        with tempfile.TemporaryDirectory(prefix="tinycats-") as folder:
            api.hf_hub_download(repo_id, NAME, revision=head, local_dir=folder)
            manifest, wrong = inspect(Path(folder))
        if manifest and not any(line.startswith(NAME) for line in wrong):
            return manifest
        raise RegistryError(
            f"{repo_id} holds a {NAME} that is not of this project, or has changed. Give another repository with "
            "publish.repo_id, or remove that file."
        )
    foreign = sorted(there.keys() - {GITATTRIBUTES})
    if foreign == [README]:
        with tempfile.TemporaryDirectory(prefix="tinycats-") as folder:
            card = Path(api.hf_hub_download(repo_id, README, revision=head, local_dir=folder)).read_bytes()
        if re.fullmatch(rb"\s*(---\r?\n.*?\r?\n---\s*)?", card, re.DOTALL):
            return None
    if foreign:
        raise RegistryError(
            f"{repo_id} holds files ({shown(foreign)}) and no release of this project. Give a new or an empty "
            "repository with publish.repo_id."
        )
    return None


def _commit(
    api: "HfApi", repo_id: str, head: str | None, release: Release, plan: list[Change], how: history.How, why: str | None
) -> Release:
    """Carry out a plan in one commit on top of `head`, and tag it. Without a change there is no commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(file, release.folder / file) for action, file, _ in plan if action in ("add", "replace")]
    changes = [*additions, *(CommitOperationDelete(file) for action, file, _ in plan if action == "delete")]
    commit = head
    if changes:
        with warnings.catch_warnings():
            # The library's own plain uploads, where Xet is off.
            warnings.filterwarnings("ignore", message="Use 'content=<...>' to upload", category=DeprecationWarning)
            upload(api, repo_id, additions)
            title = f"{release.name} {release.version}" + ("" if how == "release" else f": {how}")
            # The parent is named because it decided what is deleted, and what is replaced.
            commit = api.create_commit(repo_id, changes, commit_message=title, commit_description=why, parent_commit=head).oid
    assert commit is not None
    _tag(api, repo_id, release, commit)
    return release.model_copy(update={"published": True, "location": f"{api.endpoint}/{repo_id}/tree/{commit}"})


def _tag(api: "HfApi", repo_id: str, release: Release, commit: str) -> None:
    """Tag a commit with the version that it holds, unless the version has a tag."""
    with explained(f"tagging {repo_id} with {release.version}"):
        if release.version not in {tag.name for tag in api.list_repo_refs(repo_id).tags}:
            api.create_tag(repo_id, tag=release.version, revision=commit, exist_ok=True)


def _commit_of(api: "HfApi", repo_id: str, name: str, version: str) -> str:
    """Return the commit of a version: that of its tag or, if it has none, the newest one with its title."""
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
    if version in tags:
        return tags[version]
    versions = []
    for commit in api.list_repo_commits(repo_id):
        if (found := _title(name).fullmatch(commit.title)) is not None:
            versions.append(found["version"])
            if found["version"] == version:
                return commit.commit_id
    known = ", ".join(dict.fromkeys([*tags, *versions])) or "none"
    raise RegistryError(f"{repo_id} has no version {version!r} of {name}; there are: {known}.")


def _title(name: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(name)} (?P<version>[^\s:]+)(?:: (?P<how>forced|rollback))?")


def _is_same(there: "RepoFile", path: Path) -> bool:
    """Return whether a file of a repository has the bytes of a local one."""
    if there.size != path.stat().st_size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == sha256_of(path)
    content = path.read_bytes()  # small: git itself holds it
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _require_intact(folder: Path, where: str) -> None:
    _, wrong = inspect(folder)
    if wrong:
        raise RegistryError(f"the release in {where} is damaged: {'; '.join(wrong)}. Publish it again, with `tinycats promote`.")
