"""Releases from few photos, as a person makes them: are they published, do they copy, and was the right step chosen?

    python -m benchmarks.few_photos --photos FOLDER                        # 40, 80, 160 and 320 photos, three times each
    python -m benchmarks.few_photos --photos FOLDER --sizes 40 --seeds 1   # one run; the figures of the others stay

Each run draws other photos from the folder, at random, and calls `tinycats release --data` on them. The figures are those of the
release, or of the one that the gate refused: on test photos that neither training nor sweep has seen. `last` is the last snapshot
whose copy rates pass on the validation images, measured on the same test photos with the same guidance.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, TINY, command_line, positive, report, without_paths
from tinycats_core.errors import DataError
from tinycats_core.files import make_folder, read_json, sha256_of, write_json
from tinycats_core.presets import merge

QUICK: dict[str, Any] = {  # the same in seconds, on drawn cats
    "data": {"image_size": 16, "val_fraction": 0.4},
    "model": TINY["model"],
    "train": TINY["train"] | {"steps": 40, "snapshots": 2, "passes": None},
    "classifier": {"epochs": 1},
    "sample": {"guidance": [1.5], "sweep_images": 16},
    "evaluate": {"extractor": "breed", "samples": 32, "kid_subsets": 10},
}
SIZES = (40, 80, 160, 320)
PHOTOS = {".jpg", ".jpeg", ".png", ".webp", ".heic"}


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.few_photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="a folder of photos at any depth; left out only with --quick, for drawn cats")
    parser.add_argument("--sizes", type=positive, nargs="+", default=list(SIZES), help="photos of a run (default: 40 80 160 320)")
    parser.add_argument("--seeds", type=positive, nargs="+", default=[1, 2, 3], help="of the choice of photos (default: 1 2 3)")
    parser.add_argument("--passes", type=positive, help="over the photos in a training (default: that of the preset)")
    parser.add_argument("--quick", action="store_true", help="one run of a tiny network on 60 drawn cats")
    given = parser.parse_args(arguments)
    if given.photos is None and not given.quick:
        parser.error("--photos is missing: name a folder of photos, or give --quick")
    if given.quick:
        given.photos, given.sizes, given.seeds = None, [60], [1]
    path = RESULTS / "few_photos.json"
    known = read_json(path)["runs"] if path.is_file() and not given.quick else []
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        photos = photos_below(given.photos, max(given.sizes)) if given.photos else drawn_cats(Path(scratch) / "drawn")
        for size, seed in [(size, seed) for seed in given.seeds for size in given.sizes]:
            home = make_folder(Path(scratch) / f"{size}-{seed}")
            found = {"photos": size, "seed": seed} | measure(photos, size, seed, given, home)
            known = [run for run in known if (run["photos"], run["seed"]) != (size, seed)] + [found]
            known.sort(key=lambda run: (run["photos"], run["seed"]))
            print(found, flush=True)
            if not given.quick:
                write_json(path, summary(known))
            shutil.rmtree(home)
    report("few_photos", summary(known), given)
    return 0


def photos_below(folder: Path, needed: int) -> list[Path]:
    """Return the photos below a folder, by name. Raises DataError if there are too few."""
    found = sorted(path for path in folder.expanduser().rglob("*") if path.suffix.lower() in PHOTOS)
    if len(found) < needed:
        raise DataError(f"--photos {folder} holds {len(found)} photos; {needed} are needed. Name another folder, or fewer --sizes.")
    return found


def drawn_cats(folder: Path) -> list[Path]:
    """Draw toy cats of two breeds as PNG files in a folder for each, and return their paths."""
    from PIL import Image

    from tinycats_core.config import DataConfig
    from tinycats_core.data.preparation import prepare
    from tinycats_core.data.splits import load_split

    dataset = prepare(DataConfig(source="toycats", image_size=16, toy_train_per_class=40, toy_test_per_class=1), folder / "data")
    images, labels = load_split(dataset, "train")
    paths = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label < 2:
            paths.append(make_folder(folder / "photos" / dataset.classes[label]) / f"{number}.png")
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    return paths


def measure(photos: list[Path], size: int, seed: int, given: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Make a release from some of the photos, and return its figures."""
    for number, photo in enumerate(random.Random(seed).sample(photos, size)):
        of_class = photo.parent.name if given.quick else "."  # photos are judged by Inception, which one class is enough for
        shutil.copy(photo, make_folder(home / "photos" / of_class) / f"{number}{photo.suffix}")
    overrides = merge(
        QUICK if given.quick else {},
        {
            "data": {"folder": str(home / "photos")},
            "train": {"passes": given.passes} if given.passes else {},
            "publish": {"folder": str(home / "releases"), "name": "few", "page": "none"},
        },
    )
    command = [sys.executable, "-m", "flows.cli", "release", "--preset", "photos", "--overrides", json.dumps(overrides)]
    environment = os.environ | {"TINYCATS_HOME": str(home / "home"), "PREFECT_HOME": str(home / "prefect")}
    since = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    about = {"published": done.returncode == 0, "minutes": round((time.monotonic() - since) / 60, 1)}
    try:
        return about | figures(home / "home", overrides)
    except StopIteration:  # it ended before it was judged
        said = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        return about | {"error": without_paths(said[-1] if said else done.stderr[-300:])}


def figures(home: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the run that worked in a home. Raises StopIteration if there is no verdict."""
    decision = read_json(next((home / "decisions").glob("*/decision.json")))
    sweep = read_json(next((home / "evaluations").glob("sweep-*.json")))
    measured = next(
        path for path in (home / "evaluations").glob("fidelity-*.json") if sha256_of(path) == decision["reports"]["candidate"]
    )
    found = read_json(measured)
    chosen, real = of_images(found["metrics"]), of_images(found["floor"])
    clean = [row["step"] for row in sweep["rows"] if not row["copies"]]
    last = max(clean, default=sweep["step"])
    return {
        "test_photos": found["conditions"]["reference"],
        "failed": {term["name"]: term["why"] for term in decision["terms"] if not term["passed"]},
        "steps": max(row["step"] for row in sweep["rows"]),
        "ended": sweep["ended"],
        "chosen": {"step": sweep["step"], **chosen},
        "last": {"step": last, **(chosen if last == sweep["step"] else again(home, overrides, sweep, last))},
        "real": real,
        "course": [{name: row[name] for name in ("step", "copies", *of_images(row))} for row in sweep["rows"]],
    }


def of_images(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return KID with its interval, and the copy rates, of all metrics."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(("kid_", "copy_rate", "altered_copy_rate")) and "std" not in name
    }


def again(home: Path, overrides: dict[str, Any], sweep: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the figures of another snapshot on the test photos, drawn as the chosen one was."""
    from tinycats_core.config import SampleConfig
    from tinycats_core.data.preparation import prepare
    from tinycats_core.evaluation.fidelity import evaluate
    from tinycats_core.evaluation.samples import draw_samples
    from tinycats_core.presets import resolve
    from tinycats_core.records import Weights
    from tinycats_core.training.state import record_of

    config = resolve("photos", overrides)
    dataset = prepare(config.data, home / "data")
    config = config.for_data(len(dataset.classes), dataset.train_count)
    ended = max(row["step"] for row in sweep["rows"])
    trained = record_of(next((home / "training").iterdir()), config.train.until(ended))
    weights = next(average for average in trained.averages if average.step == step)
    classifier = next(
        (Weights(path=path, sha256=sha256_of(path), kind="classifier", step=0) for path in home.glob("classifier/*/*.safetensors")),
        None,
    )
    setting = SampleConfig.model_validate(sweep["sample"])
    samples = draw_samples(weights, dataset, setting, config.evaluate.samples, home / "last.safetensors", occasion="last")
    report = evaluate(samples, dataset, config.evaluate, classifier, home / "last")
    return of_images(dict(report.metrics))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the runs come to: the share that was published, and how the chosen step compares with the last one."""
    judged = [run for run in runs if "chosen" in run]
    kid = next((name for run in judged for name in run["chosen"] if re.fullmatch("kid_[a-z]+", name)), "kid")
    worse = [run for run in judged if run["chosen"][kid] > run["last"][f"{kid}_high"]]
    return {
        "count": len(runs),
        "published": sum(run["published"] for run in runs) / len(runs),
        "copies": sum(any(name.endswith("copies") for name in run["failed"]) for run in judged),
        "chosen_before_last": sum(run["chosen"]["step"] < run["last"]["step"] for run in judged),
        "chosen_worse_than_last": len(worse),
        "mean_kid_chosen": sum(run["chosen"][kid] for run in judged) / max(len(judged), 1),
        "mean_kid_last": sum(run["last"][kid] for run in judged) / max(len(judged), 1),
        "runs": runs,
    }


if __name__ == "__main__":
    sys.exit(main())
