"""Access to the Hugging Face Hub: the account and its rights, the upload of large files, and errors as one line each."""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from threading import Thread
from typing import TYPE_CHECKING, Any

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError, keep_secret, masked

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

RETRYABLE = (408, 409, 412, 429)  # 409 and 412: another commit came in between; publishing again starts from it
TIMEOUT_S = 60.0  # without a byte; the library itself would wait for ever
XET_SECONDS = 120.0  # for an upload to the Xet storage, whose own client waits for a silent server without end,
XET_BYTES_PER_S = 500_000  # and for its bytes at this speed
ADVICE = {
    401: "The token is rejected: make a new one at https://huggingface.co/settings/tokens and set HF_TOKEN to it",
    403: "The token has no write access there: use one that has, or set publish.repo_id to a repository of yours",
    404: "There is no such repository or revision for this token: check publish.repo_id",
    429: "Too many requests: wait and run it again",
}
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")  # all that the Xet client says of an answer


def check_credentials(config: PublishConfig) -> str:
    """Return the repository that would be published to, `owner/name`, after asking the Hub whether it may be written.

    Raises:
        RegistryError: there is no token, the Hub rejects it, it may not write there, or the Hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    with explained("checking the Hugging Face token"):
        token = get_token()
        if token is None:
            raise RegistryError(
                "publish.to is 'hub' but there is no Hugging Face token here. Set HF_TOKEN to a token with write access, "
                "run `hf auth login`, or set publish.to to 'folder'."
            )
        api = open_api()
        account = api.whoami(token)
        repo_id = config.repo_id or f"{account['name']}/{config.name}"
        validate_repo_id(repo_id)
        _check_role(account, repo_id)
        with suppress(RepositoryNotFoundError):  # it will be created
            api.auth_check(repo_id, write=True)
        return repo_id


def open_api(token: str | bool | None = None) -> "HfApi":
    """Return the library's client for the Hub that HF_ENDPOINT names now, with a timeout."""
    from huggingface_hub import HfApi, constants, get_session

    get_session().timeout = TIMEOUT_S
    # Read at the time of the call: the library's own constant is read when it is first imported.
    return HfApi(endpoint=(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/"), library_name="tinycats", token=token)


def upload(api: "HfApi", repo_id: str, additions: "Sequence[CommitOperationAdd]", repo_type: str | None = None) -> None:
    """Upload the large files among the additions ahead of the commit. No commit refers to them yet.

    With Xet, which the library uses if `hf_xet` is installed, this takes at most XET_SECONDS and the time that the bytes
    need at XET_BYTES_PER_S.

    Raises:
        RegistryError: the Xet storage took longer.
    """
    from huggingface_hub.utils._runtime import is_xet_available  # the library exports neither; tests use both
    from huggingface_hub.utils._xet import abort_xet_session

    if not is_xet_available():
        api.preupload_lfs_files(repo_id, additions, repo_type=repo_type)
        return
    limit = XET_SECONDS + sum(addition.upload_info.size for addition in additions) / XET_BYTES_PER_S
    uploaded: Future[None] = Future()

    def work() -> None:
        try:
            uploaded.set_result(api.preupload_lfs_files(repo_id, additions, repo_type=repo_type))
        except BaseException as error:
            uploaded.set_exception(error)

    Thread(target=work, name="xet-upload", daemon=True).start()
    try:
        uploaded.result(limit)
    except BaseException as error:
        if uploaded.done():
            raise
        abort_xet_session()
        if not isinstance(error, TimeoutError):  # Ctrl-C
            raise
        raise RegistryError(
            f"the Xet storage of {repo_id} has not taken the files within {limit:.0f} s. Run the same command again, "
            "or set HF_HUB_DISABLE_XET=1 to upload without Xet."
        ) from None


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later: the network failed, the Hub was busy, or another commit came in between.

    Follows the chain of causes. A rejected token, missing rights, a missing repository and invalid input stay as they are,
    whether the Hub or its Xet storage says so.
    """
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if (status := _status(cause)) is not None:
            return status in RETRYABLE or status >= 500
        if isinstance(cause, OfflineModeIsEnabled):
            return False
        if isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
            return True
        cause = cause.__cause__
    return False


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of the Hub or of its Xet storage stands for; None if there was no answer."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    found = XET_STATUS.search(str(error)) if isinstance(error, OSError) else None
    return int(found[1]) if found else None


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn the library's errors into one line each, without the token; the original stays as the cause."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        _mask(error)
        raise RegistryError(f"{doing} failed: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return why a call failed, and what to do about it."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, or set publish.to to 'folder'."
    if isinstance(error, HFValidationError):
        return f"{error} Set publish.repo_id to 'owner/name'."
    if (status := _status(error)) is not None:
        advice = ADVICE.get(status, "Run it again later" if is_transient(error) else "Check publish.repo_id and the release")
        said = _one_line(getattr(error, "server_message", str(error)) or "", 200)
        return f"HTTP {status}{f' ({said})' if said else ''}. {advice}."
    causes = [error, *([error.__cause__] if error.__cause__ else [])]
    said = _one_line("; ".join(f"{type(cause).__name__}: {cause}" for cause in causes), 300)
    network = f"Check the network to {open_api().endpoint} and run it again"
    return f"{said}. {network if is_transient(error) else 'Mend that and run it again'}, or set publish.to to 'folder'."


def _mask(error: BaseException | None) -> None:
    """Take the tokens out of an error and what led to it: a server may say again what it was sent."""
    from huggingface_hub import get_token

    keep_secret(get_token())
    while error is not None:
        error.args = tuple(masked(part) if isinstance(part, str) else part for part in error.args)
        if isinstance(said := getattr(error, "server_message", None), str):
            error.server_message = masked(said)  # pyright: ignore[reportAttributeAccessIssue]
        error = error.__cause__ or error.__context__


def _one_line(text: str, limit: int) -> str:
    """Return what a server said on one line, without the queries of addresses, which may hold keys."""
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", " ".join(text.split()))[:limit]


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
