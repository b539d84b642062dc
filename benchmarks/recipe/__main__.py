"""The recipe by measurement: networks trained for equal compute, one thing changed in each, judged on images not trained on.

    python -m benchmarks.recipe --photos FOLDER             # every row
    python -m benchmarks.recipe --photos FOLDER wide deep   # some
    python -m benchmarks.recipe --photos FOLDER --against ancestor

A row is trained with several seeds on one core each, for as many steps as take the time of `--steps` steps of the first
row, and judged on the validation split: KID with its interval, FID, recall, copy rate. Without --photos the data are drawn
toy cats. A row that is measured again takes the old one's place in `benchmarks/results/recipe.json`, from which the table in
`docs/recipe.md` is made.

`--against ancestor` trains the standing recipe and the one that this project began with, each for an hour on a core of its
own, and judges both once on the test split.
"""

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import RESULTS, ROOT, command_line, positive, report, versions
from benchmarks.recipe.rows import AGAINST, BASE, ROWS, Row
from tinycats_core.device import cores, machine
from tinycats_core.files import write_json

DOCUMENT = ROOT / "docs" / "recipe.md"
MARKS = "<!-- table: python -m benchmarks.recipe -->", "<!-- end of table -->"
PICTURES = RESULTS / "pictures"  # of every row; not in git
AVERAGES = (0.999, 0.9998)
QUICK = {"rows": ["base", "guidance-2"], "steps": 20, "seeds": 1, "count": 104, "minutes": 0.03, "photos": None}


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--photos", type=Path, help="a folder of photos: cat/<Breed>/* and other/*, or one folder a class")
    parser.add_argument("--steps", type=positive, default=2000, help="of the base; other rows get the same time (default: 2000)")
    parser.add_argument("--minutes", type=float, default=60, help="of each training with --against (default: 60)")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of each row (default: 2)")
    parser.add_argument("--count", type=positive, default=312, help="images that are judged of each training (default: 312)")
    parser.add_argument("--against", choices=["ancestor"], help="compare the standing recipe with it, an hour each")
    parser.add_argument("--jobs", type=positive, default=cores(), help="processes, one thread each (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="a few steps of two rows on toy cats, under a minute")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.rows} - {*names}):
        parser.error(f"{', '.join(unknown)}: no such row; there are {', '.join(names)}")
    if not given.minutes > 0:
        parser.error(f"--minutes is {given.minutes:g}; it must be more than 0")
    if given.quick:
        given = argparse.Namespace(**vars(given) | QUICK)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = against_ancestor(given, Path(scratch)) if given.against else table(given, Path(scratch))
    report("recipe_ancestor" if given.against else "recipe", figures, given)
    data = data_name(given)
    if given.against and not given.quick:
        side_by_side("ancestor", f"{data}-recipe-test", f"{data}-ancestor-test")
    elif not given.quick:
        DOCUMENT.write_text(document(figures["rows"]))
        if {row["row"] for row in figures["rows"] if row["data"] == data} >= {"x-patch16", "v-patch16"}:
            side_by_side(f"{data}-patch16", f"{data}-x-patch16-val", f"{data}-v-patch16-val")
    return 0


def table(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure the rows that were asked for and return all that are known, those of other calls among them."""
    from benchmarks.recipe.trials import work

    rows = [row for row in ROWS if row.name in given.rows or not given.rows]
    job = prepare_job(given, scratch)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.training, []).append(row)
    tasks = [replace(job, rows=tuple(group), seed=seed) for group in groups.values() for seed in range(given.seeds)]
    known = [] if given.quick else known_rows()
    runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for found in in_parallel(work, tasks, given.jobs):
        for run in found:
            name = run.pop("row")
            runs[name].append(run)
            if len(runs[name]) == given.seeds:
                row = next(row for row in rows if row.name == name)
                made = summary(row, runs[name], given)
                print(json.dumps(made), flush=True)
                known = [old for old in known if any(old[key] != made[key] for key in ("row", "data", "steps"))] + [made]
                if not given.quick:
                    write_rows(known)  # now, so that a run that is stopped loses no row
    return {"rows": in_order(known)}


def against_ancestor(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train the standing recipe and the ancestor's for the same time, each on a core, and judge both on the test split."""
    from benchmarks.recipe.trials import base_step, play

    job = prepare_job(given, scratch)
    step = statistics.fmean(in_parallel(base_step, [job, job], given.jobs))
    job = replace(job, steps=round(60 * given.minutes / step))
    rows = [replace(row, train=row.train | {"ema_decays": AVERAGES}) for row in AGAINST]
    recipe, ancestor = in_parallel(play, [replace(job, rows=(row,)) for row in rows], given.jobs)
    rate, images = recipe["copy_rate_real"], recipe["counts"]["test"]
    bound = rate + 1.96 * math.sqrt(max(rate * (1 - rate), 1 / images) / images)
    return {
        "kid": recipe["kid"],
        "kid_ancestor": ancestor["kid"],
        "ratio": ancestor["kid"] / recipe["kid"],
        "copy_rate": recipe["copy_rate"],
        "copy_rate_real": rate,
        "copy_rate_bound": bound,
        "recipe": recipe,
        "ancestor": ancestor,
    }


def prepare_job(given: argparse.Namespace, scratch: Path) -> Any:
    """Return what all tasks share, after preparing the data set and, for toy cats, the judge's eyes."""
    from benchmarks.recipe.trials import Task
    from tinycats_core.data.preparation import prepare
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.fidelity import require_enough
    from tinycats_core.presets import resolve

    size = {"image_size": BASE["model"]["image_size"]}
    photos = {"folder": given.photos, "val_fraction": 0.2, "corrupt_files": "skip"} if given.photos else {}
    config = resolve("photos" if given.photos else "smoke", {"data": size | photos, "model": size})
    dataset = prepare(config.data, scratch / "data")
    counts = {"validation": dataset.val_count, "test": dataset.test_count, "generated": given.count}
    require_enough(counts, config.evaluate)
    classifier = None if given.photos else train_classifier(dataset, config.classifier, scratch / "classifier", "cpu")
    return Task((), 0, given.steps, given.count, dataset, classifier, scratch, PICTURES / data_name(given))


def data_name(given: argparse.Namespace) -> str:
    """Return what the data are called in tables and pictures."""
    return "photos" if given.photos else "toycats"


def in_parallel(work: Callable[[Any], Any], tasks: list[Any], jobs: int) -> Iterator[Any]:
    """Yield what each task comes to, in their order, from processes of one thread each."""
    from benchmarks.recipe.trials import one_thread

    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread) as pool:
        yield from pool.map(work, tasks)


def side_by_side(name: str, left: str, right: str) -> None:
    """Put two rows' grids beside each other into one picture of the documentation; without both of them, do nothing."""
    paths = [PICTURES / f"{picture}.png" for picture in (left, right)]
    if not all(path.is_file() for path in paths):
        return
    sheets = [Image.open(path) for path in paths]
    wide = Image.new("RGB", (sheets[0].width + 16 + sheets[1].width, max(sheet.height for sheet in sheets)), "white")
    wide.paste(sheets[0], (0, 0))
    wide.paste(sheets[1], (sheets[0].width + 16, 0))
    DOCUMENT.with_suffix("").mkdir(exist_ok=True)
    wide.save(DOCUMENT.with_suffix("") / f"{name}.png")


def document(rows: list[dict[str, Any]]) -> str:
    """Return the documentation with the table of these rows in it."""
    lines = [
        "| row | what is changed | KID | FID | precision | recall | copy rate | steps | command |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['data']}: {row['row']}", row["what"], f"{row['kid']:.4f} ± {row['kid_interval']:.4f}", f"{row['fid']:.1f}"]
        cells += [f"{row[name]:.3f}" for name in ("precision", "recall", "copy_rate")]
        cells += [" ".join(f"{run['steps']:,}" for run in row["runs"]), f"`{row['command']}`"]
        lines.append(f"| {' | '.join(cells)} |")
    before, after = DOCUMENT.read_text().split(MARKS[0])[0], DOCUMENT.read_text().split(MARKS[1])[1]
    return "\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after])


def summary(row: Row, runs: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table: means over the seeds, and of KID the 95 % interval of both its sources of error."""
    where = "--photos PHOTOS " if given.photos else ""
    mean = {name: statistics.fmean(run[name] for run in runs) for name in ("kid", "fid", "precision", "recall", "copy_rate")}
    own = statistics.fmean(run["kid_std"] ** 2 for run in runs)
    between = statistics.variance(run["kid"] for run in runs) if len(runs) > 1 else 0.0
    return {
        "row": row.name,
        "what": row.what,
        "data": data_name(given),
        "steps": given.steps,  # of the first row: the time that this one was given
        **mean,
        "kid_interval": 1.96 * math.sqrt((own + between) / len(runs)),
        "copy_rate_real": runs[0]["copy_rate_real"],
        "command": f"python -m benchmarks.recipe {where}--steps {given.steps} --seeds {given.seeds} {row.name}",
        "machine": machine(),
        "versions": versions(),
        "runs": runs,
    }


def known_rows() -> list[dict[str, Any]]:
    """Return the rows that were measured before."""
    path = RESULTS / "recipe.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Keep the rows."""
    write_json(RESULTS / "recipe.json", {"rows": in_order(rows)})


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order of ROWS, those of photos first, and of these the short ones; retired rows come last."""
    places = {row.name: place for place, row in enumerate(ROWS)}
    return sorted(rows, key=lambda row: (row["data"], row["steps"], places.get(row["row"], len(places))))


if __name__ == "__main__":
    sys.exit(main())
