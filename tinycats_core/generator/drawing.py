"""Draw images from this release: python sample.py --class Bengal -n 4 --out cats

Needs numpy and onnxruntime. Each image is written as <out>/<class>-<number>.png. The same seed gives the same images.
"""

# A release ships this file as its sample.py, and tinycats draws with the same functions: it imports nothing of tinycats.

import argparse
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "tinycats-graph/1"  # of the ONNX files that this draws with, in their metadata
PRECISION = "precision.json"  # beside them: how they compare, and which of them is recommended


def noise(indices: Sequence[int], size: int, seed: int) -> np.ndarray:
    """Return the noise of the images with these indices, float32 (N, 3, size, size): a function of (seed, index) alone."""
    generators = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in indices]
    return np.stack([generator.standard_normal((3, size, size), np.float32) for generator in generators])


def draw(
    session: Any,
    labels: Sequence[int],
    seed: int,
    guidance: float,
    batch_size: int = 1,
    watch: Callable[[range], Iterable[int]] = iter,
    workers: int = 1,
) -> np.ndarray:
    """Draw an image for each label with a session of onnxruntime: uint8 (N, S, S, 3).

    On a CPU many images are drawn fastest one by one, by a session of one thread and as many workers as there are cores.

    Args:
        watch: sees the batches go by.
        workers: how many batches are drawn at a time.

    Raises:
        ValueError: a label is not a class, or the guidance is not a number.
    """
    facts = session.get_modelmeta().custom_metadata_map
    size, count = int(facts["image_size"]), len(json.loads(facts["classes"]))
    if wrong := [int(label) for label in labels if not 0 <= label < count]:
        raise ValueError(f"label {wrong[0]} is not a class; allowed: 0 to {count - 1}")
    if not math.isfinite(guidance):
        raise ValueError(f"the guidance is {guidance}; give a number, or 1 for none")

    def images(start: int) -> np.ndarray:
        batch = np.asarray(labels[start : start + batch_size], np.int64)
        feeds = {
            "noise": noise(range(start, start + len(batch)), size, seed),
            "labels": batch,
            "guidance": np.array(guidance, np.float32),
        }
        return session.run(["images"], feeds)[0]

    starts = range(0, len(labels), batch_size)
    pool = ThreadPoolExecutor(workers)
    try:
        batches = [pool.submit(images, start) for start in starts]
        drawn = [batch.result() for _, batch in zip(watch(starts), batches, strict=True)]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is drawn
    return np.concatenate(drawn).transpose(0, 2, 3, 1)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def png(image: np.ndarray) -> bytes:
    """Return an image, uint8 (H, W, 3), as the bytes of a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    rows = np.insert(image.reshape(height, -1), 0, 0, axis=1).tobytes()  # each row begins with its filter, 0: none
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def load(path: Path, threads: int = 0) -> Any:
    """Return a session of onnxruntime for a file of this release. Ends the program with a message if it cannot be used.

    Args:
        threads: that share the work on an image; 0: as many as there are cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # its errors are raised
    try:
        session = onnxruntime.InferenceSession(path, options)
    except Exception as error:  # its many kinds of errors have no common base
        reason = " ".join(str(error).split())[-300:]
        sys.exit(
            f"{path} cannot be loaded by onnxruntime {onnxruntime.__version__}: {reason}\n"
            "Download the file again, or install a newer onnxruntime: pip install -U onnxruntime"
        )
    if session.get_modelmeta().custom_metadata_map.get("format") != FORMAT:
        sys.exit(f"{path} does not draw whole images; give cats-fp32.onnx or another cats-*.onnx.")
    return session


def recommended(release: Path) -> str:
    """Return the file that the release recommends: the fastest one that draws as well as the fp32 file."""
    try:
        return f"cats-{json.loads((release / PRECISION).read_text(encoding='utf-8'))['chosen']}.onnx"
    except FileNotFoundError:  # an earlier release, or its files alone
        return "cats-fp32.onnx"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw with the settings that the ONNX file holds, and write the images."""
    release = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(prog="sample.py", description="Draw images with the sampler and settings of this release.")
    parser.add_argument("--class", dest="name", metavar="CLASS", help="default: every class")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images of each class (default: 1)")
    parser.add_argument("--seed", type=int, help="default: the one that the release was measured with")
    parser.add_argument("--guidance", type=float, help="1: none; default: the one that the release was measured with")
    parser.add_argument("--model", default=recommended(release), help="an ONNX file of this release; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("cats"), help="a folder, made if it is missing; default: %(default)s")
    given = parser.parse_args(arguments)
    session = load(release / given.model, threads=0 if given.name and given.n == 1 else 1)
    facts = session.get_modelmeta().custom_metadata_map
    classes, settings = json.loads(facts["classes"]), json.loads(facts["sampling"])
    seed = settings["seed"] if given.seed is None else given.seed
    guidance = settings["guidance"] if given.guidance is None else given.guidance
    if given.name is not None and given.name not in classes:
        parser.error(f"--class is {given.name!r}; choose from {', '.join(classes)}")
    if given.n < 1 or seed < 0:
        parser.error(f"-n is {given.n} and --seed is {seed}; at least 1 and 0 are needed")
    if not math.isfinite(guidance):
        parser.error(f"--guidance is {guidance}; give a number, or 1 for none")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out is {given.out}, a file; give a folder")
    if given.out.resolve().is_relative_to(release):
        parser.error(f"--out is {given.out}, inside the release, which would damage it; give a folder elsewhere")
    labels = np.repeat([classes.index(given.name)] if given.name else np.arange(len(classes)), given.n)
    images = draw(session, labels.tolist(), seed, guidance, workers=cores())
    given.out.mkdir(parents=True, exist_ok=True)
    for index, (label, image) in enumerate(zip(labels, images, strict=True)):
        (given.out / f"{classes[label]}-{index % given.n}.png").write_bytes(png(image))
    print(f"{len(images)} images in {given.out}")


if __name__ == "__main__":
    main()
