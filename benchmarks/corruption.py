"""Damage checkpoints at random places, and see whether any of them is taken for a good one.

python -m benchmarks.corruption
"""

import argparse
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, positive, report

TRAIN_EVERY = 25  # cases of which one also trains on, which must give what an undamaged run gives


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where all damage was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption", description=__doc__)
    parser.add_argument("--cases", type=positive, default=500, help="how many checkpoints to damage (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--quick", action="store_true", help="50 cases, under a minute")
    given = parser.parse_args(arguments)
    logging.getLogger("tinycats").setLevel(logging.ERROR)  # each case warns of its damaged checkpoint
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = damage(Path(scratch), 50 if given.quick else given.cases, random.Random(given.seed))
    report("corruption", figures, given)
    good = figures["detected"] == figures["cases"] == figures["used_the_one_before"] and not figures["loaded"]
    return 0 if good and not figures["crashed"] and figures["trained_on_to_the_same_bits"] == figures["trained_on"] else 1


def damage(scratch: Path, cases: int, rng: random.Random) -> dict[str, Any]:
    """Damage the newest of two checkpoints in as many ways, and resume from the folder each time."""
    from tinycats_core.data.preparation import prepare
    from tinycats_core.errors import CheckpointError
    from tinycats_core.presets import resolve
    from tinycats_core.tensors import read_safetensors
    from tinycats_core.training.run_folder import RunFolder
    from tinycats_core.training.start import train

    small = {
        "data": {"image_size": 16, "toy_train_per_class": 4, "toy_test_per_class": 2},
        "model": {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2},
        "train": {"steps": 4, "warmup_steps": 0, "checkpoint_every": 2, "log_every": 1, "sample_every": 4},
    }
    config = resolve("smoke", small)
    dataset = prepare(config.data, scratch / "data")
    folder = scratch / "run"
    good = train(dataset, config.model, config.train, folder, "cpu")
    newest, before = RunFolder(folder).checkpoints()
    intact = newest.read_bytes()
    counts = dict.fromkeys(("detected", "loaded", "crashed", "used_the_one_before", "trained_on", "trained_on_to_the_same_bits"), 0)
    kinds = dict.fromkeys(("truncated", "bit_flipped", "in_the_header"), 0)
    started = time.perf_counter()
    for case in range(cases):
        bad = bytearray(intact)
        if case % 2:
            bad = bad[: rng.randrange(len(bad))]
            kinds["truncated"] += 1
        else:
            header = int.from_bytes(intact[:8], "little") + 8
            place = rng.randrange(header) if case % 4 == 0 else rng.randrange(len(bad))  # the header is small but delicate
            bad[place] ^= 1 << rng.randrange(8)
            kinds["bit_flipped"] += 1
            kinds["in_the_header"] += place < header
        newest.write_bytes(bad)
        try:
            read_safetensors(newest, "training")
            counts["loaded"] += 1
        except CheckpointError:
            counts["detected"] += 1
        except Exception:
            counts["crashed"] += 1
        try:
            found = RunFolder(folder).newest(config.train.steps)
            counts["used_the_one_before"] += found is not None and found[0] == before
            if case % TRAIN_EVERY == 0:
                (folder / "ema.safetensors").unlink()
                counts["trained_on"] += 1
                counts["trained_on_to_the_same_bits"] += (
                    train(dataset, config.model, config.train, folder, "cpu").ema.sha256 == good.ema.sha256
                )
        except Exception:
            counts["crashed"] += 1
    seconds = time.perf_counter() - started
    return {"cases": cases, **counts, **kinds, "checkpoint_bytes": len(intact), "seconds": round(seconds, 1)}


if __name__ == "__main__":
    sys.exit(main())
