"""Cats at 128 px on one GPU, with PyTorch alone: speed, the open rows of the recipe, and the best of them trained for longer.

    python -m benchmarks.cats128 --photos PHOTOS                # everything, in 25 minutes
    python -m benchmarks.cats128 --photos PHOTOS --only speed   # one part; the figures of the others stay

PHOTOS is a folder with `cat/<Breed>/*` and `other/*`. Every row is trained for the same time and judged on the validation
images. The one with the lowest KID is trained for longer, in three ways, and the best of these is measured once on the test
images and once against the training images, as published figures are. Figures are written after each part.
"""

import argparse
import logging
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cats128.rows import LONG, ROWS, Row
from benchmarks.common import RESULTS, ROOT, command_line, report
from tinycats_core.files import make_folder, read_json, write_json

PARTS = ("speed", "rows", "long")
SHARES = {"speed": 0.2, "rows": 0.4, "long": 0.4}  # of the time, if all parts are measured
TRAINING = {"rows": 0.4, "long": 0.7}  # share of a part's time that is training; the rest is compiling and judging
PICTURES = ROOT / "docs" / "cats128"


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cats128", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(row.name for row in ROWS)} (default: all)")
    parser.add_argument("--photos", type=Path, help="the folder of photos; left out only with --quick, for toy cats")
    parser.add_argument("--minutes", type=float, default=25, help="for everything (default: 25)")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given twice (default: all)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--mode", default=None, help="how rows are computed (default: the fastest that `speed` found)")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where the grids go (default: docs/cats128)")
    parser.add_argument("--quick", action="store_true", help="a small network on toy cats, under a minute on a CPU")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.rows} - {row.name for row in ROWS}):
        parser.error(f"{', '.join(unknown)}: no such row; there are {', '.join(row.name for row in ROWS)}")
    if not given.minutes > 0:
        parser.error(f"--minutes is {given.minutes:g}; it must be more than 0")
    if given.photos is None and not given.quick:
        parser.error("--photos is missing: name a folder of photos, or give --quick")
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    given.minutes = min(given.minutes, 0.4) if given.quick else given.minutes
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = measure(given, Path(scratch))
    report("cats128", figures, given)
    return 0


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the figures of the parts that were asked for, with those that are known of the others."""
    from benchmarks.cats128 import work

    until = time.monotonic() + 60 * given.minutes
    parts = [part for part in PARTS if part in (given.only or PARTS)]
    path = RESULTS / ("cats128-quick.json" if given.quick else "cats128.json")
    figures: dict[str, Any] = read_json(path) if path.is_file() and not given.quick else {}
    pictures = make_folder(scratch / "pictures" if given.quick else given.pictures)
    bench = load(given, scratch)
    figures["judge"] = work.exactness(bench, 16 if given.quick else 64)
    figures["photos"] = {split: len(bench.judge.images(split)[0]) for split in ("train", "val", "test")}
    for number, part in enumerate(parts):
        now = time.monotonic()
        ends = now + (until - now) * SHARES[part] / sum(SHARES[one] for one in parts[number:])
        print(f"{part}: {ends - now:.0f} s", flush=True)
        if part == "speed":
            figures["speed"] = speed(bench, given.quick)
        bench.mode = given.mode or fastest(figures.get("speed", {}).get("ways", {}), ROWS[0].name)
        if part == "rows":
            figures["rows"], figures["not_run"] = rows(bench, given.rows, ends, pictures)
            write_json(path, figures)
            figures["profile"] = work.profile(bench, ROWS[0], 2 if given.quick else 10)
        elif part == "long":
            for found in long(bench, figures.get("rows", []), ends, pictures):
                figures |= found
                write_json(path, figures)
        write_json(path, figures)
    return figures


def load(given: argparse.Namespace, scratch: Path) -> Any:
    """Prepare the data and load the judge: Inception for photos, for toy cats a breed classifier."""
    from benchmarks.cats128.work import Bench
    from tinycats_core.config import EvaluateConfig
    from tinycats_core.data.preparation import prepare
    from tinycats_core.device import pick_device
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.reference import Judge
    from tinycats_core.presets import resolve

    device = pick_device(given.device)
    if given.photos is not None:
        data = {"folder": given.photos, "val_fraction": 0.2, "corrupt_files": "skip", "image_size": 32 if given.quick else 128}
        config = resolve("photos", {"data": data, "model": {"image_size": data["image_size"]}})
    else:
        config = resolve("smoke", {"data": {"toy_train_per_class": 8, "toy_val_per_class": 4, "toy_test_per_class": 4}})
    dataset = prepare(config.data, scratch / "data")
    epochs = config.classifier.model_copy(update={"epochs": 1})
    classifier = None if given.photos is not None else train_classifier(dataset, epochs, scratch / "classifier", device.type)
    subsets = {"kid_subsets": 10} if given.quick else {}
    settings = EvaluateConfig.model_validate({"extractor": "breed" if classifier else "inception"} | subsets)
    judge = Judge.load(dataset, settings, classifier, scratch / "evaluations", device.type)
    return Bench(judge, classifier, device, "off", 52 if given.quick else 312, given.quick)


def speed(bench: Any, quick: bool) -> dict[str, Any]:
    """Return the speed of the first row in each mode, and that of smaller patches in the fastest of them."""
    from benchmarks.cats128.work import MODES, speeds

    modes = MODES[:1] if quick else MODES
    rounds, steps = (2, 2) if quick else (5, 20)
    found = speeds(bench, ROWS[:1], modes, rounds, steps)
    smaller = [row for row in ROWS if row.name == "x-patch8"]
    ways = dict.fromkeys(["off", fastest(found["ways"], ROWS[0].name)])
    return found | {"ways": found["ways"] | speeds(bench, smaller, list(ways), rounds, steps)["ways"]}


def fastest(ways: dict[str, Any], row: str) -> str:
    """Return the mode in which a row was fastest; eager, if none was measured."""
    rates = {name.split()[1]: way["images_per_s"] for name, way in ways.items() if name.split()[0] == row and "error" not in way}
    return max(rates, key=lambda mode: rates[mode], default="off")


def rows(bench: Any, names: list[str], ends: float, pictures: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Train each row for the same time and measure it. Returns the rows, and the names of those for which no time was left."""
    from benchmarks.cats128.work import try_row

    some = ROWS[:2] if bench.quick else [row for row in ROWS if row.name in names or not names]
    seconds = TRAINING["rows"] * (ends - time.monotonic()) / len(some)
    found: list[dict[str, Any]] = []
    for row in some:
        if time.monotonic() + seconds > ends:
            continue
        found.append(kept(try_row(bench, row, seconds), pictures / f"{row.name}.jpg"))
    return found, [row.name for row in some if row.name not in {one["row"] for one in found}]


def long(bench: Any, known: list[dict[str, Any]], ends: float, pictures: Path) -> Iterator[dict[str, Any]]:
    """Train the best row for longer, in each of LONG's ways. Yields the figures of all of them whenever there are new ones.

    Each way that is the best so far is measured at once against the test and the training images, for a run may be cut off.
    """
    from benchmarks.cats128.work import final, try_row

    working = [one for one in known if "error" not in one]
    best = min(working, key=lambda one: one["best"]["kid"]) if working else {"row": ROWS[0].name}
    winner = next(row for row in ROWS if row.name == best["row"])
    ways: list[Row] = []
    for way in (winner.also(change) for change in (LONG[:1] if bench.quick else LONG)):
        if all((way.model, way.train) != (other.model, other.train) for other in ways):
            ways.append(way)
    trained: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"winner": winner.name, "long": trained}
    lowest = (True, math.inf)
    for number, way in enumerate(ways):
        left = TRAINING["long"] * (ends - time.monotonic())
        if left <= 0:
            return
        found = try_row(bench, way, left * way.time / sum(other.time for other in ways[number:]), 4)
        trained.append(kept(found, pictures / f"long-{number}.jpg"))
        yield figures
        if "error" not in found and (rank := (found["best"]["copy_rate"] > found["copy_bar"], found["best"]["kid"])) < lowest:
            lowest = rank
            figures["final"] = {"row": way.name, **final(bench, found, pictures)}
            yield figures


def kept(found: dict[str, Any], picture: Path | None = None) -> dict[str, Any]:
    """Return the figures of a row without its weights and images; save its grid."""
    if picture is not None and "sheet" in found:
        found["sheet"].save(picture, quality=90)
    return {name: value for name, value in found.items() if name not in ("weights", "config", "sheet")}


if __name__ == "__main__":
    sys.exit(main())
