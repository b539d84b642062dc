"""Downloads: from one address after another, resumed, in one step."""

import shutil
import ssl
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError

from tinycats_core.data.decode import Progress
from tinycats_core.errors import DataError

ATTEMPTS = 5  # in a row without a single byte received
FIRST_PAUSE_S = 1.0  # doubled after each failed attempt
TIMEOUT_S = 30


class Unavailable(Exception):
    """An address does not give the file."""


def download(
    urls: Sequence[str], path: Path, accept: Callable[[Path], object], remedy: str, on_progress: Progress | None = None
) -> str:
    """Download a file to `path` from the first address that gives it, and return that address.

    A broken attempt leaves what it received in `path`.part, and the next one resumes there. Network errors, 5xx, 408 and 429
    are retried with growing pauses; any other answer sends to the next address at once, as does a file that `accept` refuses
    with a DataError.

    Raises:
        DataError: no address gives the file, or the disk is full. The message says what each answered, and what to do.
    """
    answers: list[str] = []
    for url in urls:
        try:
            _download(url, path.with_name(path.name + ".part"), accept, on_progress)
        except Unavailable as answer:
            answers.append(f"{url}: {answer}")
            if on_progress:
                on_progress(0.0, f"cannot download {answers[-1]}")
            continue
        path.with_name(path.name + ".part").replace(path)
        return url
    raise DataError(f"cannot download {'; '.join(answers)}. {remedy}")


def _download(url: str, part: Path, accept: Callable[[Path], object], on_progress: Progress | None) -> None:
    failures = refusals = 0
    while True:
        offset = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, offset, on_progress)
        except (OSError, HTTPException, ValueError) as error:
            if not (isinstance(error, HTTPError) and error.code == 416):  # 416: the part is already as long as the file
                grown = part.exists() and part.stat().st_size > offset
                failures = 1 if grown else failures + 1
                if not _worth_retrying(error) or failures >= ATTEMPTS:
                    raise Unavailable(_reason(error)) from None
                time.sleep(FIRST_PAUSE_S * 2 ** (failures - 1))
                continue
        try:
            accept(part)
            return
        except DataError as error:
            part.unlink()
            refusals += 1
            if not offset or refusals > 1:  # a resumed part may have begun as another file: one fresh start is due
                raise Unavailable(str(error)) from None


def _transfer(url: str, part: Path, offset: int, on_progress: Progress | None) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != 206:
            offset = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else 0
        free = shutil.disk_usage(part.parent).free
        if total - offset > free:
            raise _no_room(part, f"{(total - offset) / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
        received = offset
        with _opened(part, "ab" if offset else "wb") as file:
            while chunk := response.read(1 << 20):
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise _no_room(part, error.strerror or str(error)) from None
                received += len(chunk)
                if on_progress and total:
                    name = part.name.removesuffix(".part")
                    on_progress(received / total, f"{name}: {received / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    if received < total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def _opened(part: Path, mode: str) -> IO[bytes]:
    try:
        return open(part, mode)
    except OSError as error:
        raise _no_room(part, error.strerror or str(error)) from None


def _no_room(part: Path, reason: str) -> DataError:
    return DataError(f"cannot write {part}: {reason}. Free some space or set TINYCATS_HOME to another disk.")


def _worth_retrying(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    reason = error.reason if isinstance(error, URLError) else error
    return not isinstance(reason, ValueError | ssl.SSLCertVerificationError)  # ValueError: not an address at all


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return str(error.reason if isinstance(error, URLError) else error) or type(error).__name__
