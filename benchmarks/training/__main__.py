"""Compare the speed of the training step with a plain training loop around diffusers' DiT of the same size.

    python -m benchmarks.training [--device cuda]

The peer is measured twice, with its images in memory and with a DataLoader that decodes JPEG files. Everybody takes turns
in one process; each figure is the median of the rounds. The peer runs with PyTorch's own settings. On a CPU, our step runs in
the way that a long training takes there: before the contest, its ways are measured as `train.precision` and `train.compile`
`auto` do. `variants` is the table of all ways.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the repository is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import command_line, positive, report
from tinycats_core.errors import TinycatsError


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where every loss is finite and has fallen."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch-size", type=positive, help="images a step (default: 16 on a CPU, 4 with --quick, 256 on a GPU)")
    parser.add_argument("--rounds", type=positive, help="how often everybody takes a turn (default: 5)")
    parser.add_argument("--profile", action="store_true", help="also print the operations that take longest")
    parser.add_argument("--quick", action="store_true", help="two short rounds, nothing compiled, under a minute")
    given = parser.parse_args(arguments)
    try:
        import diffusers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TinycatsError("the peer, diffusers, is not installed: pip install '.[bench]'") from None

    from tinycats_core.device import pick_device

    device = pick_device(given.device)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = measure(given, device, Path(scratch))
    report(f"training-{device.type}", figures, given)
    falls = all(loss["last"] < loss["first"] for loss in figures["losses"].values())
    return 0 if falls or given.quick else 1  # a few steps do not bring every loss down


def measure(given: argparse.Namespace, device: Any, scratch: Path) -> dict[str, Any]:
    """Return the figures of a device."""
    import torch

    from benchmarks.training import contest
    from tinycats_core.compute.costs import training_flops
    from tinycats_core.config import ModelConfig, TrainConfig

    on_gpu = device.type == "cuda"
    batch_size = given.batch_size or (256 if on_gpu else 4 if given.quick else 16)
    rounds = given.rounds or (2 if given.quick else 5)
    steps = 2 if given.quick else 30 if on_gpu else 5
    model, settings = ModelConfig(), TrainConfig()
    data = contest.draw_data(scratch / "photos", per_class=4 if given.quick else 40, device=device)
    ours = contest.enter_ours(data, model, batch_size, device, quick=given.quick)
    chosen, measured = (ours[0], {}) if on_gpu else contest.choose(ours, model, device)
    peers = contest.enter_peers(data, model, batch_size, device)
    dtype = torch.bfloat16 if on_gpu or chosen.run.config.precision == "bf16" else torch.float32
    peaks = contest.take_turns([*ours, *peers], rounds, steps, device, dtype)

    working = [variant for variant in ours if variant.error is None]
    best = max(working, key=lambda variant: variant.images_per_s) if on_gpu else chosen
    if best.error is not None:
        raise RuntimeError(best.error)
    rate, flops = best.images_per_s, training_flops(model)
    memory, loader = peers
    seconds = settings.batch_size / rate  # of a step at the default settings
    drawing = contest.seconds_of_a_grid(best.run, scratch / "run", quick=given.quick)
    saving = contest.seconds_of_a_checkpoint(best.run, scratch / "run")
    peak, peak_default = (statistics.median(values) for values in peaks)
    if given.profile:
        print(contest.profile(ours[0].run, steps=2 if given.quick else 5))
    entered = {"ours": best, "peer_memory": memory, "peer_dataloader": loader}
    return {
        "images_per_s": rate,
        "ratio_vs_peer_memory": rate / memory.images_per_s,
        "ratio_vs_peer_dataloader": rate / loader.images_per_s,
        "share_of_matmul_peak": rate * flops / peak,
        "peer_memory_images_per_s": memory.images_per_s,
        "peer_dataloader_images_per_s": loader.images_per_s,
        "matmul_peak_flops": peak,
        "matmul_peak_flops_default": peak_default,
        "training_flops_per_image": flops,
        "parameters": best.parameters,
        "peer_parameters": memory.parameters,
        "batch_size": batch_size,
        "device": device.type,
        "variant": best.name,
        "measured_to_choose": measured,
        "rounds": rounds,
        "steps_per_round": steps,
        "spread": {name: [min(entry.rates), max(entry.rates)] for name, entry in entered.items()},
        "losses": {name: {"first": entry.first_loss, "last": entry.last_loss} for name, entry in entered.items()},
        "variants": {variant.name: variant.figures() for variant in ours},
        "peak_memory_mb": {name: entry.peak_memory_mb for name, entry in entered.items()} if on_gpu else None,
        "host_syncs_per_step": contest.host_syncs(ours[0].run),
        "sampling_seconds": drawing,
        "sampling_stall": drawing / (drawing + settings.sample_every * seconds),
        "checkpoint_seconds": saving,
        "checkpoint_stall": saving / (saving + settings.checkpoint_every * seconds),
    }


if __name__ == "__main__":
    sys.exit(main())
