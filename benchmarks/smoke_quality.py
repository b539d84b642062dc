"""How good the smoke preset is: breed accuracy, Fréchet distance and copy rate of what its chosen EMA draws.

python -m benchmarks.smoke_quality
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, positive, report

MIN_ACCURACY, MAX_TIMES_FLOOR = 0.8, 3.0  # what the preset promises


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if the preset is within its bounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke_quality", description=__doc__)
    parser.add_argument("--seeds", type=positive, default=1, help="train as often, each with a seed of its own (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the steps, under a minute")
    given = parser.parse_args(arguments)
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    seeds = 1 if given.quick else given.seeds
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        runs = [measure(Path(scratch), seed, given.quick) for seed in range(seeds)]
    names = ("breed_accuracy", "fd_breed", "fd_breed_floor", "copy_rate", "copy_rate_real")
    report(
        "smoke_quality", {**{name: sum(run[name] for run in runs) / seeds for name in names}, "seeds": seeds, "runs": runs}, given
    )
    good = all(run["breed_accuracy"] >= MIN_ACCURACY and run["fd_breed"] <= MAX_TIMES_FLOOR * run["fd_breed_floor"] for run in runs)
    return 0 if good or given.quick else 1


def measure(scratch: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Train, draw and measure once, as the release does."""
    from tinycats_core.data.preparation import prepare
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.fidelity import evaluate
    from tinycats_core.evaluation.samples import draw_samples
    from tinycats_core.evaluation.sweep import choose
    from tinycats_core.presets import resolve
    from tinycats_core.training.start import train

    short = {"steps": 250, "warmup_steps": 20} if quick else {}
    config = resolve("smoke", {"train": {"seed": seed, **short}, **({"classifier": {"epochs": 1}} if quick else {})})
    dataset = prepare(config.data, scratch / "data")
    classifier = train_classifier(dataset, config.classifier, scratch / "classifier", "cpu")
    made = train(dataset, config.model, config.train, scratch / f"training-{seed}", "cpu")
    choice = choose(made, dataset, config.sample, config.evaluate, classifier, scratch / "evaluations", "cpu")
    path = scratch / f"samples-{seed}.safetensors"
    samples = draw_samples(choice.weights, dataset, choice.sample, config.evaluate.samples, path, "cpu")
    found = evaluate(samples, dataset, config.evaluate, classifier, scratch / "evaluations", "cpu")
    return {
        "breed_accuracy": found.metrics["breed_accuracy"],
        "fd_breed": found.metrics["fd_breed"],
        "fd_breed_floor": found.floor["fd_breed"],
        "kid_breed": found.metrics["kid_breed"],
        "kid_breed_std": found.metrics["kid_breed_std"],
        "recall": found.metrics["recall"],
        "copy_rate": found.metrics["copy_rate"],
        "copy_rate_real": found.floor["copy_rate"],
        "ema_decay": choice.weights.facts["ema_decay"],
        "guidance": choice.sample.guidance,
        "steps": made.ema.step,
        "seed": seed,
    }


if __name__ == "__main__":
    sys.exit(main())
