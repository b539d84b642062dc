"""Fidelity against network evaluations: every sampler on the same trained network, judged on drawings it has never seen.

    python -m benchmarks.sampling

Trains the smoke preset first. The reference is a set of toy cats drawn for this alone, so that the test split stays out of
the choice of a sampler. `evaluations` counts calls of the network: guidance calls it twice.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, positive, report

GUIDANCE = 1.5
ROWS: list[tuple[str, int, float]] = [  # sampler, steps, shift
    *(("heun", steps, 1.0) for steps in (50, 8, 4)),
    *(("euler", steps, 1.0) for steps in (50, 16, 12, 8, 6, 4)),
    *(("euler", steps, 0.5) for steps in (16, 8)),
    *(("ab2", steps, 1.0) for steps in (16, 12, 8, 6, 4)),
    *(("ab2", steps, 0.5) for steps in (16, 12, 8, 6, 4)),
    ("ab2", 8, 0.25),
]


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where the default is as good as Heun in 50 steps."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=positive, default=2080, help="images a row (default: 2080)")
    parser.add_argument("--quick", action="store_true", help="an untrained network and few images, under a minute")
    given = parser.parse_args(arguments)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = measure(Path(scratch), given.count, given.quick)
    report("sampling", figures, given)
    return 0 if given.quick or figures["default_inside_heun50"] else 1


def measure(scratch: Path, count: int, quick: bool) -> dict[str, Any]:
    """Return a row for each sampler, and what the default amounts to."""
    from tinycats_core.config import SampleConfig
    from tinycats_core.data.preparation import prepare
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.fidelity import evaluate
    from tinycats_core.evaluation.samples import draw_samples
    from tinycats_core.generator.samplers import plan_of
    from tinycats_core.presets import resolve
    from tinycats_core.training.start import train

    count = 104 if quick else count
    short = {"train": {"steps": 60}, "classifier": {"epochs": 1}, "evaluate": {"kid_subsets": 10}} if quick else {}
    config = resolve("smoke", {**short, "evaluate": {**short.get("evaluate", {}), "samples": count}})
    dataset = prepare(config.data, scratch / "data")
    drawn = config.data.model_copy(
        update={"seed": config.data.seed + 1, "toy_test_per_class": -(-count // config.model.num_classes)}
    )
    unseen = prepare(drawn, scratch / "data")
    classifier = train_classifier(dataset, config.classifier, scratch / "classifier", "cpu")
    weights = train(dataset, config.model, config.train, scratch / "training", "cpu").ema

    def row(sampler: str, steps: int, shift: float) -> dict[str, Any]:
        settings = SampleConfig(sampler=sampler, steps=steps, shift=shift, guidance=GUIDANCE, seed=config.sample.seed)
        path = scratch / "samples" / f"{sampler}-{steps}-{shift}.safetensors"
        started = time.perf_counter()
        samples = draw_samples(weights, unseen, settings, count, path, "cpu")
        seconds = time.perf_counter() - started
        found = evaluate(samples, unseen, config.evaluate, classifier, scratch / "evaluations", "cpu")
        keys = ("fd_breed", "kid_breed", "kid_breed_std", "precision", "recall", "breed_accuracy")
        measured = {key: found.metrics[key] for key in keys}
        floor.update({key: found.floor[key] for key in keys})
        made = {
            "sampler": sampler,
            "steps": steps,
            "shift": shift,
            "evaluations": 2 * len(plan_of(settings)),
            **measured,
            "seconds": round(seconds, 2),
        }
        print(made, flush=True)
        return made

    floor: dict[str, Any] = {}
    rows = [row(*settings) for settings in (ROWS[:1] + ROWS[3:4] + ROWS[-4:-3] if quick else ROWS)]
    by_name = {(found["sampler"], found["steps"], found["shift"]): found for found in rows}
    heun, euler = by_name["heun", 50, 1.0], by_name["euler", 50, 1.0]
    default = by_name.get((SampleConfig().sampler, SampleConfig().steps, SampleConfig().shift), rows[-1])
    bound = heun["kid_breed"] + 1.96 * heun["kid_breed_std"]
    inside = [found for found in rows if found["kid_breed"] <= bound]
    fewest = min(inside, key=lambda found: (found["evaluations"], found["kid_breed"]))
    return {
        "default_evaluations": default["evaluations"],
        "time_ratio_vs_euler50": default["seconds"] / euler["seconds"],
        "default_inside_heun50": default in inside,
        "heun50_upper_bound": bound,
        "fewest_inside": {key: fewest[key] for key in ("sampler", "steps", "shift", "evaluations")},
        "count": count,
        "guidance": GUIDANCE,
        "floor": floor,
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
