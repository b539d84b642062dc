"""Draw images from this release: python sample.py --class Bengal -n 4 --out cats

Needs numpy, onnxruntime and pillow. Each image is written as <out>/<class>-<number>.png. The same seed gives the same images.

Convention: t = 0 is noise, t = 1 is data; the network gives the velocity dx/dt.
"""

# A release ships this file as its sample.py, and tinycats_core.generator.sampling draws with the same functions: they take
# arrays of NumPy and tensors of PyTorch alike, and nothing of tinycats is imported here.

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Field = Callable[[Any, float], Any]  # images (B, 3, S, S) and a time to their velocities
Sampler = Callable[[Field, Any, Sequence[float]], Any]  # a field, noise (B, 3, S, S) and times from 0 to 1 to images


def euler(field: Field, x: Any, times: Sequence[float]) -> Any:
    """Euler's method, of first order: one evaluation a step."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * field(x, t)
    return x


def heun(field: Field, x: Any, times: Sequence[float]) -> Any:
    """Heun's method, of second order: two evaluations a step. The last step is Euler's, which lands on a predicted image."""
    for t, t_next in pairwise(times[:-1]):
        v, step = field(x, t), t_next - t
        x = x + step * ((v + field(x + step * v, t_next)) / 2)
    return euler(field, x, times[-2:])


def ab2(field: Field, x: Any, times: Sequence[float]) -> Any:
    """Adams-Bashforth's method of second order for uneven steps (Hairer, Norsett & Wanner, III.5): one evaluation a step.

    The first and the last step are Euler's.
    """
    v_before, step_before = None, 0.0
    for t, t_next in pairwise(times[:-1]):
        v, step = field(x, t), t_next - t
        x = x + step * (v if v_before is None else v + step / (2 * step_before) * (v - v_before))
        v_before, step_before = v, step
    return euler(field, x, times[-2:])


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "ab2": ab2}


def time_grid(steps: int, shift: float) -> list[float]:
    """Return steps + 1 times from 0 to 1: equal ones, with the noise level 1 - t shifted (SD3, 2403.03206, eq. 23)."""
    equal = [i / steps for i in range(steps + 1)]
    return [u / (u + shift * (1 - u)) for u in equal]


def noise(indices: Sequence[int], size: int, seed: int) -> np.ndarray:
    """Return the noise of the images with these indices, float32 (N, 3, size, size): a function of (seed, index) alone."""
    generators = [np.random.Generator(np.random.Philox(key=[seed, index])) for index in indices]
    return np.stack([generator.standard_normal((3, size, size), np.float32) for generator in generators])


def draw(session: Any, labels: np.ndarray, settings: dict[str, Any], watch: Callable[[range], Iterable[int]] = iter) -> np.ndarray:
    """Draw an image for each label with a session of onnxruntime: uint8 (N, S, S, 3). `watch` sees the batches go by."""
    facts = session.get_modelmeta().custom_metadata_map
    low, high = settings["guidance_interval"]
    guidance, drawn = settings["guidance"], []
    times = time_grid(settings["steps"], settings["shift"])
    for start in watch(range(0, len(labels), settings["batch_size"])):
        batch = labels[start : start + settings["batch_size"]].astype(np.int64)
        nulls = np.full_like(batch, int(facts["null_class"]))

        def velocity(x: np.ndarray, t: float, labels: np.ndarray) -> np.ndarray:
            return session.run(["velocity"], {"x": x, "t": np.full(len(x), t, np.float32), "labels": labels})[0]

        def field(x: np.ndarray, t: float, batch: np.ndarray = batch, nulls: np.ndarray = nulls) -> np.ndarray:
            if guidance == 1 or not low <= t <= high:
                return velocity(x, t, batch)
            with_class, without = np.split(velocity(np.concatenate([x, x]), t, np.concatenate([batch, nulls])), 2)
            return without + guidance * (with_class - without)

        x = noise(range(start, start + len(batch)), int(facts["image_size"]), settings["seed"])
        drawn.append(SAMPLERS[settings["sampler"]](field, x, times))
    return ((np.concatenate(drawn) + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the release's own settings, draw, and write the images."""
    import onnxruntime
    from PIL import Image

    release = Path(__file__).resolve().parent
    settings = json.loads((release / "sweep.json").read_text(encoding="utf-8"))["sample"]
    classes = json.loads((release / "data.json").read_text(encoding="utf-8"))["classes"]
    parser = argparse.ArgumentParser(prog="sample.py", description="Draw images with the sampler and settings of this release.")
    parser.add_argument("--class", dest="name", choices=classes, metavar="CLASS", help=f"one of {', '.join(classes)}; default: all")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="images of each class (default: 1)")
    parser.add_argument("--seed", type=int, default=settings["seed"], help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=settings["guidance"], help="1: none; default: %(default)s")
    parser.add_argument("--model", default="denoiser-fp32.onnx", help="an ONNX file of this release; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("cats"), help="a folder, made if it is missing; default: %(default)s")
    given = parser.parse_args(arguments)
    if given.n < 1 or given.seed < 0:
        parser.error(f"-n is {given.n} and --seed is {given.seed}; at least 1 and 0 are needed")
    if given.out.resolve().is_relative_to(release):
        parser.error(f"--out is {given.out}, inside the release, which would damage it; give a folder elsewhere")
    session = onnxruntime.InferenceSession(release / given.model)
    labels = np.repeat([classes.index(given.name)] if given.name else np.arange(len(classes)), given.n)
    images = draw(session, labels, settings | {"seed": given.seed, "guidance": given.guidance})
    given.out.mkdir(parents=True, exist_ok=True)
    for index, (label, image) in enumerate(zip(labels, images, strict=True)):
        Image.fromarray(image).save(given.out / f"{classes[label]}-{index % given.n}.png")
    print(f"{len(images)} images in {given.out}")


if __name__ == "__main__":
    main()
