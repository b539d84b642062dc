"""What the benchmarks share: their command line, and what they do with their figures."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

from tinycats_core.errors import TinycatsError, report_error
from tinycats_core.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TINY: dict[str, dict[str, Any]] = {  # overrides: the smoke preset in seconds, and good enough for the gate
    "data": {"image_size": 16, "toy_train_per_class": 16, "toy_val_per_class": 4, "toy_test_per_class": 8},
    "model": {"image_size": 16, "patch_size": 4, "width": 64, "depth": 2, "heads": 2},
    "train": {
        "steps": 400,
        "snapshots": 2,
        "batch_size": 32,
        "warmup_steps": 10,
        "lr": 4e-3,
        "ema_decays": [0.98, 0.9],
        "checkpoint_every": 200,
        "sample_every": 400,
        "log_every": 50,
    },
    "classifier": {"epochs": 3, "batch_size": 32},
    "sample": {"guidance": [1.0, 1.5], "sweep_images": 52},
    "evaluate": {"samples": 104, "kid_subsets": 10},
    "export": {"forms": []},
}

P = ParamSpec("P")


def command_line(main: Callable[P, int]) -> Callable[P, int]:
    """Make an error that is meant for people one line on stderr and the exit status 1."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except TinycatsError as error:
            return report_error(error)

    return run


def positive(text: str) -> int:
    """Return a whole number of 1 or more. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def report(name: str, figures: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the figures as one JSON object, the last line, and write them to `benchmarks/results/<name>.json`.

    The file also holds the machine, the versions, the command and the date. With --quick it is `<name>-quick.json`,
    which is not kept in git: a quick run shows that a benchmark works, and says little of how fast anything is.
    """
    from tinycats_core.device import machine  # here, for --help needs no PyTorch

    circumstances = {"machine": machine(), "versions": versions(), "command": command(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    suffix = "-quick" if getattr(arguments, "quick", False) else ""
    write_json(RESULTS / f"{name}{suffix}.json", figures | circumstances)
    print(json.dumps(figures, allow_nan=False), flush=True)


def versions() -> dict[str, str]:
    """Return the versions of Python, of PyTorch, and of diffusers where it takes part."""
    from tinycats_core import device

    return device.versions("torch", *["diffusers"] * ("diffusers" in sys.modules))


def command() -> str:
    """Return the command as it was typed, as a module, with paths shortened to what does not depend on this machine."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.stem == "__main__" else script.stem
    return shlex.join(["python", "-m", f"benchmarks.{name}", *map(without_paths, sys.argv[1:])])


def without_paths(text: str) -> str:
    """Return a text in which each absolute path is relative to the repository, or only its last part."""

    def shorten(found: re.Match[str]) -> str:
        path = Path(found[0])
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return re.sub(r"(?<![\w.:/])/[^\s'\",:()]+", shorten, text)
