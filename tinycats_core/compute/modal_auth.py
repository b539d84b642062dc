"""Modal's credentials: missing, malformed, rejected, or good. No message holds a secret."""

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor

from tinycats_core.errors import ComputeError, ModalUnreachable

ANSWER_SECONDS = 20.0  # Modal's own client would try for a minute before it gives up
SET_BOTH = "run `modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"


def check_credentials() -> str:
    """Ask Modal's server once whether it accepts the credentials, and return their source.

    Raises:
        ModalUnreachable: the server did not answer.
        ComputeError: the credentials are missing, malformed or rejected. No message holds a secret.
    """
    try:
        from modal.config import config, user_config_path
    except ImportError:
        raise ComputeError("compute.where is 'modal' but modal is not installed; run `pip install modal`") from None
    except Exception:  # modal reads its file when imported; its message may quote the secret, so it is not repeated
        path = os.environ.get("MODAL_CONFIG_PATH", "~/.modal.toml")
        raise ComputeError(f"{path} is not a Modal configuration file; delete it and {SET_BOTH}") from None
    if any(config.get(f"oauth_{name}") for name in ("refresh_token", "client_id", "client_secret", "jwt_key")):
        source = "MODAL_OAUTH_* variables"
    else:
        source = _check_token(config.get("token_id"), config.get("token_secret"), str(user_config_path))
    with ThreadPoolExecutor(1) as pool:  # the caller's thread may run an event loop already
        pool.submit(asyncio.run, _hello(source)).result()
    return source


def has_credentials() -> bool:
    """Return whether anything could be a token, without a request."""
    try:
        from modal.config import config
    except Exception:  # not installed, or its file cannot be read: `check_credentials` says which
        return True
    return any(config.get(name) for name in ("token_id", "token_secret", "oauth_client_id", "oauth_jwt_key"))


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, or its type if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_token(token_id: str | None, secret: str | None, config_path: str) -> str:
    """Return the source of the token. Raises ComputeError, whose message never holds its value."""
    if not token_id and not secret:
        raise ComputeError(
            f"no Modal credentials: MODAL_TOKEN_ID and MODAL_TOKEN_SECRET are not set and {config_path} has no active "
            f"profile with a token; {SET_BOTH}"
        )
    names = {"MODAL_TOKEN_ID": (token_id, "ak-"), "MODAL_TOKEN_SECRET": (secret, "as-")}
    sources = []
    for name, (value, prefix) in names.items():
        key = name.removeprefix("MODAL_").lower()
        source = name if name in os.environ else f"{key} in {config_path}"
        sources.append(source)
        if not value:
            raise ComputeError(f"half of the Modal token is missing: no {name} and no {key} in {config_path}; {SET_BOTH}")
        if not re.fullmatch(rf"{prefix}[A-Za-z0-9_-]+", value):
            raise ComputeError(
                f"malformed Modal token: {source} must be '{prefix}' and then letters and digits, without spaces or "
                f"quotes; {SET_BOTH}"
            )
    return " and ".join(sources)


async def _hello(source: str) -> None:
    import modal

    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            client = await modal.Client.from_env.aio()  # pyright: ignore[reportFunctionMemberAccess]
            await client.hello.aio()
    except TimeoutError:
        raise ModalUnreachable(
            f"Modal's server did not answer within {ANSWER_SECONDS:.0f} s; check the network connection and run again"
        ) from None
    except modal.exception.AuthError:
        raise ComputeError(f"Modal rejected the token from {source}; {SET_BOTH}") from None
    except modal.exception.InvalidError as error:
        raise ComputeError(f"Modal's configuration is not usable: {one_line(error)}") from None
    except (modal.Error, OSError) as error:
        raise ModalUnreachable(
            f"Modal's server cannot be reached ({one_line(error)}); check the network connection and run again"
        ) from None
