"""Releases on the Hugging Face Hub: one repository for a name, one commit for a release."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError
from tinycats_core.files import atomic_path, read_json
from tinycats_core.records import Release
from tinycats_core.release.manifest import NAME, inspect, read_release, verify
from tinycats_core.release.registry import require_unchanged

if TYPE_CHECKING:
    from huggingface_hub import HfApi

GITATTRIBUTES = ".gitattributes"  # the Hub's own file in every repository: says which files are large
RETRYABLE = (408, 409, 412, 429)  # 409 and 412: another commit came in between; publishing again starts from it
TIMEOUT_S = 300.0  # without a byte; the library itself would wait for ever


def check_credentials(config: PublishConfig) -> str:
    """Return the repository that would be published to, `owner/name`, after asking the Hub whether it may be written.

    Raises:
        RegistryError: there is no token, the Hub rejects it, it may not write there, or the Hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    with _explained("checking the Hugging Face token"):
        token = get_token()
        if token is None:
            raise RegistryError(
                "publish.to is 'hub' but there is no Hugging Face token here. Set HF_TOKEN to a token with write access, "
                "run `hf auth login`, or set publish.to to 'folder'."
            )
        api = _api()
        account = api.whoami(token)
        repo_id = config.repo_id or f"{account['name']}/{config.name}"
        validate_repo_id(repo_id)
        _check_role(account, repo_id)
        with suppress(RepositoryNotFoundError):  # it will be created
            api.auth_check(repo_id, write=True)
        return repo_id


def publish_to_hub(release: Release, config: PublishConfig, instead_of: str | None) -> Release:
    """Replace what the repository holds by this release, in one commit. The commits before stay in its history.

    Args:
        instead_of: the version that it was compared with; None = nothing was published.

    Returns:
        The release with the address of the commit as its location.

    Raises:
        RegistryError: the release is damaged, another one was published meanwhile, or the Hub did not take it; `is_transient`
            says whether trying again may help.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    manifest = verify(release.folder)
    repo_id = check_credentials(config)
    files = {NAME, *manifest["files"]}
    with _explained(f"publishing {release.name} {release.version} to {repo_id}"):
        api = _api()
        api.create_repo(repo_id, private=config.private, exist_ok=True)
        parent = api.model_info(repo_id).sha
        there = set(api.list_repo_files(repo_id, revision=parent))
        published = read_json(Path(api.hf_hub_download(repo_id, NAME, revision=parent)))["version"] if NAME in there else None
        require_unchanged(release, published, instead_of)
        stale = sorted(there - files - {GITATTRIBUTES})
        changes = [
            *(CommitOperationAdd(file, release.folder / file) for file in sorted(files)),
            *(CommitOperationDelete(file) for file in stale),
        ]
        with warnings.catch_warnings():
            # The library's own plain uploads, where Xet is off.
            warnings.filterwarnings("ignore", message="Use 'content=<...>' to upload", category=DeprecationWarning)
            # The parent is named because it decided what is stale, and what is replaced.
            commit = api.create_commit(repo_id, changes, commit_message=f"{release.name} {release.version}", parent_commit=parent)
    location = f"{api.endpoint}/{repo_id}/tree/{commit.oid}"
    return release.model_copy(update={"published": True, "location": location})


def download_release(repo_id: str, folder: Path, revision: str | None = None) -> Release | None:
    """Return a release of the Hub, verified, in `<folder>/<commit>`; None where the repository is missing or has none.

    A commit never changes: one that lies there intact is not downloaded again.

    Args:
        revision: commit, branch or tag; None = the newest.

    Raises:
        RegistryError: the Hub cannot be reached or refuses, the revision does not exist, or the release is damaged.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with _explained(f"downloading {repo_id}"):
        api = _api()
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
                api.snapshot_download(repo_id, revision=commit, local_dir=temporary, ignore_patterns=[GITATTRIBUTES])
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


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later: the network failed, the Hub was busy, or another commit came in between.

    Follows the chain of causes. A rejected token, missing rights, a missing repository and invalid input stay as they are.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return status in RETRYABLE or status >= 500
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
            return True
        cause = cause.__cause__
    return False


def _api() -> "HfApi":
    from huggingface_hub import HfApi, constants, get_session

    get_session().timeout = TIMEOUT_S
    # Read at the time of the call: the library's own constant is read when it is first imported.
    return HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"), library_name="tinycats")


def _check_role(account: dict[str, Any], repo_id: str) -> None:
    """Refuse what the token's own description rules out. What it leaves open is asked of the repository itself."""
    owner = repo_id.split("/")[0]
    token = account.get("auth", {}).get("accessToken", {})
    writable = [organisation["name"] for organisation in account.get("orgs", []) if organisation.get("roleInOrg") != "read"]
    owners = [account["name"], *writable]
    if owner not in owners:
        raise RegistryError(
            f"the Hugging Face token belongs to {account['name']}, which cannot write to {owner}/… (allowed: "
            f"{', '.join(owners)}). Set publish.repo_id to a repository of one of these, or use another token."
        )
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and not _may_write(token, owner, repo_id)):
        raise RegistryError(
            f"the Hugging Face token of {account['name']} has no write access to {repo_id} (its role is {token['role']}). "
            "Make one with write access at https://huggingface.co/settings/tokens and set HF_TOKEN to it."
        )


def _may_write(token: dict[str, Any], owner: str, repo_id: str) -> bool:
    rights = token.get("fineGrained", {})
    return "repo.write" in rights.get("global", []) or any(
        "repo.write" in scope.get("permissions", []) and scope.get("entity", {}).get("name") in (owner, repo_id)
        for scope in rights.get("scoped", [])
    )


def _require_intact(folder: Path, where: str) -> None:
    _, wrong = inspect(folder)
    if wrong:
        raise RegistryError(f"the release in {where} is damaged: {'; '.join(wrong)}. Publish it again.")


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Turn the library's errors into one line each; the original stays as the cause."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: "The token is rejected: make a new one at https://huggingface.co/settings/tokens and set HF_TOKEN to it",
            403: "The token has no write access there: use one that has, or set publish.repo_id to a repository of yours",
            404: "There is no such repository or revision for this token: check publish.repo_id",
            429: "Too many requests: wait and run it again",
        }.get(status, "Run it again later" if is_transient(error) else "Check publish.repo_id and the release")
        said = " ".join((error.server_message or "").split())[:200]
        raise RegistryError(f"{doing} failed: HTTP {status}{f' ({said})' if said else ''}. {advice}.") from error
    except OfflineModeIsEnabled as error:
        raise RegistryError(f"{doing} failed: HF_HUB_OFFLINE is set. Unset it, or set publish.to to 'folder'.") from error
    except HFValidationError as error:
        raise RegistryError(f"{doing} failed: {error} Set publish.repo_id to 'owner/name'.") from error
    except (httpx2.TransportError, OSError, RuntimeError, ValueError) as error:
        causes = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = " ".join("; ".join(f"{type(cause).__name__}: {cause}" for cause in causes).split())[:300]
        advice = f"Check the network to {_api().endpoint} and run it again" if is_transient(error) else "Mend that and run it again"
        raise RegistryError(f"{doing} failed: {reason}. {advice}, or set publish.to to 'folder'.") from error
