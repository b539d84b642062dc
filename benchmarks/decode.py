"""Measure how fast a folder of photos is prepared, against torchvision's ImageFolder with a DataLoader of two workers.

    python -m benchmarks.decode [--photos 48]

Both read the same JPEG files of 12 megapixels, and cut and resize them to the central square with the same function of Pillow.
tinycats also lists, hashes and compares the files and writes the data set. They take turns in the same run; rates are medians
of the rounds.

`mean_difference` and `max_difference` say how equal the pixels are, in levels of 255: tinycats lets the JPEG decoder scale large
photos down to no less than four times the size that is wanted, and the peer decodes every pixel.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from benchmarks.common import command_line, positive, report

WIDTH, HEIGHT = 4032, 3024
WORKERS = 2


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if tinycats is at least twice as fast."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--photos", type=positive, default=48, help="how many photos to make (default: 48)")
    parser.add_argument("--image-size", type=positive, default=128, help="pixels of a side (default: 128)")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each of the two is measured (default: 3)")
    parser.add_argument("--quick", action="store_true", help="8 photos in one round")
    given = parser.parse_args(arguments)
    count, rounds = (8, 1) if given.quick else (given.photos, given.rounds)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        folder = Path(scratch) / "photos"
        sizes = make_photos(folder, count)
        figures = compare(folder, Path(scratch), given.image_size, rounds)
    figures = {**figures, "photos": count, "megabytes_a_photo": round(statistics.mean(sizes) / 1e6, 2), "workers": WORKERS}
    report("decode", figures, given)
    return 0 if figures["ratio_vs_imagefolder"] >= 2 else 1


def make_photos(folder: Path, count: int) -> list[int]:
    """Write JPEG files of two classes with detail at every scale, and return their sizes in bytes."""
    rng, sizes = np.random.default_rng(0), []
    for number in range(count):
        photo = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for cells, strength in ((4, 60), (16, 40), (64, 24), (256, 14), (1024, 8)):
            coarse = rng.normal(0, strength, (cells * 3 // 4, cells, 3)).astype(np.float32)
            layers = [
                Image.fromarray(coarse[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for channel in range(3)
            ]
            photo += np.stack([np.asarray(layer) for layer in layers], axis=-1)
        photo += 128 + rng.normal(0, 4, photo.shape[:2])[..., None].astype(np.float32)
        path = folder / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return sizes


def compare(folder: Path, scratch: Path, size: int, rounds: int) -> dict[str, Any]:
    """Let both read the folder in turns, and compare what they make of it."""
    own, peer, pixels, expected = [], [], {}, {}
    for number in range(rounds):
        seconds, pixels = prepare(folder, scratch / f"home-{number}", size)
        own.append(len(pixels) / seconds)
        seconds, expected = load(folder, size)
        peer.append(len(expected) / seconds)
    apart = np.stack([np.abs(pixels[name].astype(int) - image) for name, image in expected.items()])
    return {
        "photos_per_s": round(statistics.median(own), 1),
        "imagefolder_photos_per_s": round(statistics.median(peer), 1),
        "ratio_vs_imagefolder": round(statistics.median(one / other for one, other in zip(own, peer, strict=True)), 2),
        "mean_difference": round(float(apart.mean()), 3),
        "max_difference": int(apart.max()),
        "image_size": size,
    }


def prepare(folder: Path, home: Path, size: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return the seconds that tinycats takes, and the pixels by file name."""
    from tinycats_core.config import DataConfig
    from tinycats_core.data import preparation, splits

    started = time.perf_counter()
    dataset = preparation.prepare(DataConfig(source="folder", folder=folder, image_size=size), home)
    seconds = time.perf_counter() - started
    rows = splits.read_manifest(dataset)["images"]
    loaded = [image for split in ("train", "val", "test") for image in splits.load_split(dataset, split)[0].numpy()]
    return seconds, {row["name"]: pixels for row, pixels in zip(rows, loaded, strict=True)}


def load(folder: Path, size: int) -> tuple[float, dict[str, np.ndarray]]:
    """Return the seconds that ImageFolder takes with a DataLoader, and the pixels by file name."""
    import torch
    from torchvision import datasets, transforms

    square = partial(ImageOps.fit, size=(size, size), method=Image.Resampling.LANCZOS)
    started = time.perf_counter()
    images = datasets.ImageFolder(str(folder), transforms.Compose([square, transforms.PILToTensor()]))
    batches = list(torch.utils.data.DataLoader(images, batch_size=8, num_workers=WORKERS))
    seconds = time.perf_counter() - started
    names = [Path(path).relative_to(folder).as_posix() for path, _ in images.samples]
    return seconds, dict(zip(names, torch.cat([batch for batch, _ in batches]).numpy(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
