"""Is every file of any folder accounted for? Random folders: formats x damage x names x layouts.

python -m benchmarks.folders
"""

import argparse
import io
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.common import command_line, positive, report

SIZE = 16
NAMES = ("luna", "grid", "$^$", "caf\udce9", "猫", "Мурка", "a\nb", "Luna", "x" * 200, "con", "other")
SIDE_FILES = (".DS_Store", "Thumbs.db", "desktop.ini", "._IMG_1.jpg", "@eaDir/1.jpg", "$RECYCLE.BIN/2.jpg", ".git/config")
OTHER_FILES = ("notes.txt", "IMG_1.MOV", "scan.pdf", "IMG_1.AAE", "raw.CR2", "noext", "picture.svg", "empty.txt")


class Made(NamedTuple):
    """A folder that was made: its layout, and the number of files in it."""

    layout: str
    files: int


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if every file of every folder was accounted for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folders", description=__doc__)
    parser.add_argument("--folders", type=positive, default=500, help="how many folders to make (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the first folder")
    parser.add_argument("--quick", action="store_true", help="25 folders, in seconds")
    given = parser.parse_args(arguments)
    started, counts, bad = time.perf_counter(), Counter[str](), []
    for seed in range(given.seed, given.seed + (25 if given.quick else given.folders)):
        with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
            found = account(seed, Path(scratch))
        counts.update({name: value for name, value in found.items() if isinstance(value, int)})
        counts["folders"] += 1
        if found["unaccounted"] or found["tracebacks"]:
            bad.append({"seed": seed, **found})
    for item in bad:
        print(item)
    report("folders", {**counts, "seconds": round(time.perf_counter() - started, 1)}, given)
    return 1 if bad else 0


def account(seed: int, scratch: Path) -> dict[str, Any]:
    """Make a folder, prepare and validate it. Returns the files that exist, and what became of them."""
    from tinycats_core.config import DataConfig
    from tinycats_core.data import preparation, splits, validation
    from tinycats_core.errors import TinycatsError

    made = make_folder(scratch / "in", random.Random(seed))
    found: dict[str, Any] = dict.fromkeys(("used", "named", "hidden", "refused", "asked", "tracebacks", "unaccounted"), 0)
    found |= {"files": made.files, "layout": made.layout}
    config = DataConfig(source="folder", folder=scratch / "in", image_size=SIZE)
    try:
        try:
            dataset = preparation.prepare(config, scratch / "home")
        except TinycatsError as error:
            return found | {"asked": 1, "error": _one_line(error)}
        manifest = splits.read_manifest(dataset)
        found["used"], found["hidden"] = len(manifest["images"]), manifest["hidden_files"]
        found["named"] = sum(item["kind"] in (*validation.LEFT_OUT, "outside") for item in manifest["findings"])
        found["unaccounted"] = abs(made.files - found["used"] - found["named"] - found["hidden"])
        try:
            rows = validation.validate(dataset, config).rows
        except TinycatsError as error:
            found |= {"refused": 1, "error": _one_line(error)}
        else:
            of_classes = found["used"] + found["named"] - sum(item["kind"] == "outside" for item in manifest["findings"])
            found["unaccounted"] += abs(sum(row["found"] for row in rows) - of_classes)
    except Exception as error:
        found |= {"tracebacks": 1, "error": repr(error)}
    return found


def _one_line(error: Exception) -> str:
    text = str(error)
    text.encode()  # a name that cannot be printed would end the program with a traceback
    assert "\n" not in text
    return text


def make_folder(root: Path, rng: random.Random) -> Made:
    """Make a folder in a random layout, with good and damaged photos, other files and hidden ones."""
    layout = rng.choice(("single", "classes", "classes", "breeds", "splits", "ambiguous"))
    names = rng.sample(NAMES, rng.randint(1, 4))
    places = {
        "single": [""],
        "classes": names,
        "breeds": [f"cat/{name}" for name in names] + ["other"] * rng.randint(0, 1),
        "splits": [f"{split}/{name}" for split in ("train", "val", "Test")[: rng.randint(2, 3)] for name in names],
        "ambiguous": [f"{outer}/{name}" for outer in ("2023", "2024") for name in names],
    }[layout]
    pictures: list[bytes] = []
    count = sum(_fill(root / place, root.with_name("linked"), rng, pictures) for place in places)
    if rng.random() < 0.2:
        count += _write(root / "stray.png", _encode("PNG", rng))
    return Made(layout, count)


def _fill(folder: Path, elsewhere: Path, rng: random.Random, pictures: list[bytes]) -> int:
    """Fill a folder, and return the number of its files."""
    count = 0
    for number in range(rng.randint(3, 9)):
        name = rng.choice(("IMG_%04d", "%d", "foto %d \udcff", "ネコ%d", "$%d$", "a\n%d")) % number
        kind = rng.choice(tuple(KINDS))
        content = rng.choice(pictures) if pictures and rng.random() < 0.1 else KINDS[kind](rng)
        pictures.append(content)
        suffix = rng.choice((f".{kind.split()[0]}",) * 4 + (".jpg", ".JPG", ".txt", ""))
        below = rng.choice(("", "", "", f"2024-{rng.randrange(1000)}/trip"))
        count += _write(folder / below / f"{name}{suffix}", content)
    for name in (*rng.sample(SIDE_FILES, rng.randint(0, 3)), *rng.sample(OTHER_FILES, rng.randint(0, 3))):
        count += _write(folder / name, b"" if name == "empty.txt" else rng.randbytes(50))
    if rng.random() < 0.1:
        (folder / "broken link.jpg").symlink_to("nowhere.jpg")
        count += 1
    if rng.random() < 0.1:
        (folder / "loop").symlink_to(folder)  # holds nothing of its own
    if rng.random() < 0.1:
        linked = elsewhere / str(rng.random())
        count += _write(linked / "1.png", _encode("PNG", rng))
        (folder / linked.name).symlink_to(linked)
    return count


def _write(path: Path, content: bytes) -> int:
    """Write a file, and return 1 if there was none of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.write_bytes(content)
    return int(is_new)


def _encode(kind: str, rng: random.Random, mode: str = "RGB", side: int = 24, **options: Any) -> bytes:
    """Return a picture of its own in a format and a mode."""
    coarse = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side + rng.randint(0, 9), side), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


PLAIN = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM", "avif": "AVIF"}
KINDS: dict[str, Callable[[random.Random], bytes]] = {  # by suffix, and what is odd about them
    **{suffix: lambda rng, kind=kind: _encode(kind, rng) for suffix, kind in PLAIN.items()},
    **{f"{suffix} cut": lambda rng, kind=kind: _cut(_encode(kind, rng), rng) for suffix, kind in PLAIN.items()},
    **{f"{suffix} flipped": lambda rng, kind=kind: _flipped(_encode(kind, rng), rng) for suffix, kind in PLAIN.items()},
    "png transparent": lambda rng: _encode("PNG", rng, "RGBA"),
    "png palette": lambda rng: _encode("PNG", rng, "P"),
    "png tiny": lambda rng: _encode("PNG", rng, side=4),
    "png small": lambda rng: _encode("PNG", rng, side=12),
    "tif float": lambda rng: _encode("TIFF", rng, "F"),
    "tif whole": lambda rng: _encode("TIFF", rng, "I"),
    "jpg cmyk": lambda rng: _encode("JPEG", rng, "CMYK"),
    "jpg page": lambda rng: b"<html>not found</html>",
    "jpg empty": lambda rng: b"",
    "png odd profile": lambda rng: _encode("PNG", rng, icc_profile=rng.randbytes(200)),
    "jpg odd exif": lambda rng: _encode("JPEG", rng, exif=b"Exif\0\0II*\0" + rng.randbytes(40)),
    "heic junk": lambda rng: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + rng.randbytes(99),
}


if __name__ == "__main__":
    sys.exit(main())
