"""Compare pictures of networks that were trained in bf16 and in fp32: the same photos, steps and seeds, on one core each.

    python -m benchmarks.precision --photos FOLDER

Both are judged on the validation split. `within` tells whether the KID of bf16 lies inside the interval of that of fp32, which
is what `train.precision` `auto` relies on when it takes bf16 on a CPU. Without --photos the data are drawn toy cats.
"""

import argparse
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, positive, report
from tinycats_core.device import cores

QUICK = {"steps": 5, "seeds": 1, "count": 104, "photos": None, "against": None}
PRECISIONS = ("fp32", "bf16")


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if bf16 is within the interval of fp32."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="a folder of photos: cat/<Breed>/* and other/*, or one folder a class")
    parser.add_argument("--steps", type=positive, default=1000, help="of each training (default: 1000)")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings in each precision (default: 2)")
    parser.add_argument("--count", type=positive, default=312, help="images that are judged of each training (default: 312)")
    parser.add_argument("--jobs", type=positive, default=cores(), help="processes, one thread each (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="a few steps on toy cats, under a minute")
    given = parser.parse_args(arguments)
    if given.quick:
        given = argparse.Namespace(**vars(given) | QUICK)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = compare(given, Path(scratch))
    report("precision", figures, given)
    return 0 if figures["within"] or given.quick else 1


def compare(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train and judge with each seed in each precision, and return the figures of both."""
    from benchmarks.recipe.__main__ import data_name, in_parallel, prepare_job, summary
    from benchmarks.recipe.rows import Row
    from benchmarks.recipe.trials import work

    rows = [Row(name, f"in {name}", train={"precision": name}) for name in PRECISIONS]
    job = replace(prepare_job(given, scratch), pictures=scratch / "picture", same_steps=True)
    tasks = [replace(job, rows=(row,), seed=seed) for seed in range(given.seeds) for row in rows]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PRECISIONS}
    for [run] in in_parallel(work, tasks, given.jobs):
        runs[run.pop("row")].append(run)
    found = {row.name: summary(row, runs[row.name], given) for row in rows}
    kept = ("kid", "kid_interval", "fid", "precision", "recall", "copy_rate", "copy_rate_real", "runs")
    difference = found["bf16"]["kid"] - found["fp32"]["kid"]
    return {
        "kid_difference": difference,
        "within": abs(difference) <= max(row["kid_interval"] for row in found.values()),
        "data": data_name(given),
        "steps": given.steps,
        **{name: {key: row[key] for key in kept} for name, row in found.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
