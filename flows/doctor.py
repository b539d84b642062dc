"""What this machine has, what it lacks for a release, and what to do about it."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

from flows.server import version_of
from tinycats_core.errors import TinycatsError
from tinycats_core.files import home

LEAST_PYTHON = (3, 11)
LEAST_DISK, LEAST_MEMORY = 2e9, 2e9  # bytes, for a release of the smoke preset
NEEDED = ("torch", "torchvision", "prefect", "onnx", "onnxscript", "onnxruntime", "pandas", "matplotlib", "torch_fidelity")
OPTIONAL = {
    "pillow_heif": "reads the HEIC photos of iPhones: pip install pillow-heif",
    "modal": "trains on Modal: pip install modal",
    "huggingface_hub": "publishes to the Hugging Face Hub: pip install huggingface_hub",
    "timm": "measures fd_dinov2: pip install 'tinycats[dinov2]'",
    "model_signing": "signs releases: pip install 'tinycats[sign]'",
}


class Finding(NamedTuple):
    """One thing that was looked at. `missing`: a release on this machine needs it; `optional`: only some uses do."""

    name: str
    state: Literal["ok", "optional", "missing"]
    found: str
    advice: str = ""


def examine() -> Iterator[Finding]:
    """Yield a finding for each thing. Asks Modal and the Hub only if there are credentials, which are never shown."""
    for name, check in CHECKS.items():
        try:
            yield from check()
        except Exception as error:  # a broken installation fails in its own ways: it is what is looked for
            text = " ".join(str(error).split())[:300] or type(error).__name__
            state = "optional" if name in ("Modal", "Hugging Face Hub", "Inception weights") else "missing"
            yield Finding(name, state, text if isinstance(error, TinycatsError) else f"{type(error).__name__}: {text}")


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= LEAST_PYTHON
    yield Finding("Python", "ok" if good else "missing", found, "" if good else "install Python 3.11 or newer")


def _packages() -> Iterator[Finding]:
    absent = [name for name in NEEDED if not importlib.util.find_spec(name)]
    advice = "delete .venv and run `make release`, which sets it up again" if absent else ""
    found = f"missing: {', '.join(absent)}" if absent else f"{len(NEEDED)} found, PyTorch {version('torch')}"
    yield Finding("packages", "missing" if absent else "ok", found, advice)
    for name, use in OPTIONAL.items():
        if not importlib.util.find_spec(name):
            yield Finding(f"package {name}", "optional", "not installed", use)


def _disk() -> Iterator[Finding]:
    for name, folder in (("results", home()), ("releases", Path("releases").absolute())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield Finding(name, "missing", f"{folder} cannot be written to", "give a folder that you may write to")
        elif free < LEAST_DISK:
            yield Finding(
                name, "missing", f"{free / 1e9:.1f} GB free for {folder}", f"make room: {LEAST_DISK / 1e9:.0f} GB are needed"
            )
        else:
            yield Finding(name, "ok", f"{free / 1e9:.1f} GB free for {folder}")


def _memory() -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        yield Finding("memory", "ok", "this system does not say how much is free")
        return
    scarce = free < LEAST_MEMORY
    advice = f"close other programs: a release takes up to {LEAST_MEMORY / 1e9:.0f} GB" if scarce else ""
    yield Finding("memory", "missing" if scarce else "ok", f"{free / 1e9:.1f} GB free", advice)


def _device() -> Iterator[Finding]:
    from tinycats_core import threads
    from tinycats_core.device import cores, name_of, pick_device

    device = pick_device("auto")
    facts = threads.facts()
    yield Finding("device", "ok", name_of(device), "" if device.type != "cpu" else "the smoke and photos presets train on it")
    load = "an unknown load" if facts["load"] is None else f"{facts['load']:.1f} cores taken by other programs"
    advice = "training takes longer beside them; the result is the same" if threads.warning(facts) else ""
    yield Finding("threads", "optional" if advice else "ok", f"{facts['threads']} on {cores()} cores, {load}", advice)


def _prefect() -> Iterator[Finding]:
    from prefect.settings import PREFECT_API_URL

    url, ours = str(PREFECT_API_URL.value() or ""), version("prefect")
    if not url:
        yield Finding(
            "Prefect server", "ok", f"none; Prefect {ours} starts one for each release", "`tinycats up` keeps one running"
        )
        return
    if (theirs := version_of(url)) is None:
        advice = "start it with `tinycats up`, or unset PREFECT_API_URL"
        yield Finding("Prefect server", "missing", f"nothing answers at PREFECT_API_URL={url}", advice)
        return
    same = theirs == ours
    advice = "" if same else f"the client is {ours}; use the same version on both sides"
    yield Finding("Prefect server", "ok" if same else "optional", f"{theirs} at {url}", advice)


def _modal() -> Iterator[Finding]:
    from tinycats_core.compute import modal_auth

    if not modal_auth.has_credentials():
        yield Finding("Modal", "optional", "no credentials", f"to train on Modal, {modal_auth.SET_BOTH}")
    else:
        yield Finding("Modal", "ok", f"accepts the token of {modal_auth.check_credentials()}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import get_token

    from tinycats_core.release.hub_access import explained, open_api

    if get_token() is None:
        yield Finding("Hugging Face Hub", "optional", "no token", "to publish there, set HF_TOKEN or run `hf auth login`")
        return
    with explained("checking the Hugging Face token"):
        yield Finding("Hugging Face Hub", "ok", f"accepts the token of {open_api().whoami()['name']}")


def _inception() -> Iterator[Finding]:
    from tinycats_core.evaluation.extractors import inception_weights, official_inception_path

    if os.environ.get("TINYCATS_INCEPTION_WEIGHTS"):
        yield Finding("Inception weights", "ok", str(inception_weights()))
    elif (path := official_inception_path()).is_file():
        yield Finding("Inception weights", "ok", str(path))
    else:
        advice = "every preset but smoke downloads them; or set TINYCATS_INCEPTION_WEIGHTS to the file"
        yield Finding("Inception weights", "optional", "not downloaded yet", advice)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": _python,
    "packages": _packages,
    "disk": _disk,
    "memory": _memory,
    "device": _device,
    "Prefect server": _prefect,
    "Modal": _modal,
    "Hugging Face Hub": _hub,
    "Inception weights": _inception,
}
