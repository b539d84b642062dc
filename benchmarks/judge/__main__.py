"""Whether the evaluation can be trusted: its figures beside torch-fidelity's, its cost, and what the gate refuses.

    python -m benchmarks.judge
    TINYCATS_INCEPTION_WEIGHTS=... python -m benchmarks.judge --photos FOLDER

Figures, cost and speed are measured on toy cats with the breed classifier, or on photos with Inception. Refusals are measured
on toy cats only: the smoke preset is trained as for a release and, for a worse model, with an eighth of its steps. Both draw a
pool of images, and each resample of the pool stands for a release. The gate judges the cats, so these are its errors on cats alone.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command_line, positive, report

if TYPE_CHECKING:
    from torch import Tensor

    from tinycats_core.config import EvaluateConfig
    from tinycats_core.records import Dataset, FidelityReport, Weights

POOL = 8  # images of the pool for each image of a release
WORSE = 8  # times fewer training steps
SAME = 1e-4  # relative difference to torch-fidelity
QUICK = {"data": {"toy_train_per_class": 60, "toy_test_per_class": 20}}


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if every figure is within its bounds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="real photos, a folder a class: figures, cost and speed")
    parser.add_argument("--size", type=positive, default=128, help="pixels of the photos (default: 128)")
    parser.add_argument("--resamples", type=positive, default=200, help="releases of each kind that are judged (default: 200)")
    parser.add_argument("--quick", action="store_true", help="short trainings, few images and resamples, about three minutes")
    given = parser.parse_args(arguments)
    logging.getLogger("tinycats").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = agreement(Path(scratch), given.photos, given.size, given.quick)
        if not given.photos:
            figures |= refusals(Path(scratch), 4 if given.quick else given.resamples, given.quick)
    report("judge-photos" if given.photos else "judge", figures, given)
    good = (
        max(figures[f"{name}_rel_diff"] for name in ("fid", "fid_plain", "kid")) <= SAME
        and max(figures["precision_diff"], figures["recall_diff"]) <= SAME
        and figures["extract_speedup"] >= (1.8 if given.photos else 1)
        and figures["cost_ratio"] <= 1.15
        and figures.get("false_rejections", 0) <= 0.05
        and figures.get("missed_worse", 0) <= 0.05
        and figures.get("canaries_refused") == figures.get("canaries")
    )
    return 0 if good or given.quick else 1


def agreement(scratch: Path, photos: Path | None, size: int, quick: bool) -> dict[str, Any]:
    """Return the differences of our figures of two fixed sets of images to torch-fidelity's, and the cost of an evaluation.

    torch-fidelity reads the images from PNG files, with its own extractor, as its command line does.
    """
    from PIL import Image
    from torch_fidelity import calculate_metrics

    from tinycats_core.config import EvaluateConfig
    from tinycats_core.data.preparation import prepare
    from tinycats_core.data.splits import load_split
    from tinycats_core.evaluation import extractors, fidelity
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.metrics import Comparison, kid_subset, measure
    from tinycats_core.evaluation.reference import Judge, Reference
    from tinycats_core.presets import resolve

    smoke = resolve("smoke", QUICK if quick else {})
    config, classifier = smoke.evaluate, None
    if photos:
        # Half of the photos stand for generated images, so that both sets are as large as possible.
        data = {"folder": photos, "image_size": size, "test_fraction": 0.5, "corrupt_files": "skip"}
        dataset = prepare(
            resolve("photos", {"data": data, "model": {"image_size": size, "patch_size": 1}}).data, scratch / "photos"
        )
        config = EvaluateConfig(extractor="inception")
    else:
        dataset = prepare(smoke.data, scratch / "data")
        classifier = train_classifier(dataset, smoke.classifier, scratch / "classifier", "cpu")
    (made, labels), (real, real_labels) = load_split(dataset, "train"), load_split(dataset, "test")
    fidelity.require_enough({"training": len(made), "test": len(real)}, config)
    count = min(len(made), len(real), 64 if quick else 2_600)
    made, labels = made[:: len(made) // count][:count], labels[:: len(labels) // count][:count]
    real, real_labels = real[:: len(real) // count][:count], real_labels[:: len(real) // count][:count]

    folders = []
    for name, images in (("made", made), ("real", real)):
        folders.append(scratch / "png" / name)
        folders[-1].mkdir(parents=True)
        for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(folders[-1] / f"{index:06d}.png")

    judge = Judge.load(dataset, config, classifier, scratch / "evaluations", "cpu")
    subset = kid_subset(count)
    extractor: dict[str, Any] = {
        "feature_extractor": "inception-v3-compat" if photos else extractors.register_breed_extractor(),
        "feature_extractor_weights_path": str(classifier.path if classifier else extractors.inception_weights()),
    }
    theirs: dict[str, Any] = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        **extractor,
        fid=True,
        kid=True,
        prc=True,
        prc_neighborhood=config.neighbours,
        kid_subsets=config.kid_subsets,
        kid_subset_size=subset,
        rng_seed=config.seed,
        batch_size=config.batch_size,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    reference = Reference.of(judge.extract_features(real), real_labels, judge.extractor, config.neighbours)
    compared = Comparison(judge, reference, made, labels, judge.extract_features(made), subset, asked=False)
    ours = measure(compared, sweep=True)
    fid, kid = ours[judge.extractor.frechet_name], ours[f"kid_{judge.extractor.name}"]
    plain = _plain_frechet(compared.layer, compared.real_layer)
    agreed = {
        "fid_rel_diff": _relative(fid, theirs["frechet_inception_distance"]),
        "fid_plain_rel_diff": _relative(fid, plain),
        "kid_rel_diff": _relative(kid, theirs["kernel_inception_distance_mean"]),
        "precision_diff": abs((ours["precision"] or 0) - theirs["precision"]),
        "recall_diff": abs((ours["recall"] or 0) - theirs["recall"]),
    }
    return {
        **agreed,
        "extract_speedup": _speedup(judge, made, extractor),
        **_cost(dataset, config, classifier, made, labels, scratch, 1 if photos or quick else 3),
        "extractor": judge.extractor.name,
        "images": count,
        "image_size": dataset.image_size,
    }


def refusals(scratch: Path, resamples: int, quick: bool) -> dict[str, Any]:
    """Return how often the gate refuses a model compared with itself, misses a worse one, and refuses the canaries."""
    import torch

    from benchmarks.judge.canaries import FIRST, REPLACING
    from benchmarks.judge.needed import images_needed
    from tinycats_core.config import SampleConfig
    from tinycats_core.data import groups
    from tinycats_core.data.preparation import prepare
    from tinycats_core.data.splits import load_split
    from tinycats_core.device import fast_arithmetic
    from tinycats_core.evaluation import fidelity, gate
    from tinycats_core.evaluation.classifier import train_classifier
    from tinycats_core.evaluation.reference import Judge
    from tinycats_core.generator.sampling import labels_like, sample
    from tinycats_core.generator.weights import load_generator
    from tinycats_core.presets import resolve
    from tinycats_core.training.start import train

    config = resolve("smoke", {**QUICK, "train": {"steps": 500}} if quick else {})
    dataset = prepare(config.data, scratch / "data")
    others = config.data.model_copy(update={"seed": config.data.seed + 1})
    unseen, unseen_labels = load_split(prepare(others, scratch / "data"), "train")
    classifier = train_classifier(dataset, config.classifier, scratch / "classifier", "cpu")
    size, classes = dataset.image_size, len(dataset.classes)
    known, known_labels = load_split(dataset, "train")
    count = 16 * classes if quick else config.evaluate.samples  # of each class as many as a group needs
    labels = labels_like(load_split(dataset, "test")[1], count, classes)

    def pool(steps: int) -> "Tensor":
        """Return POOL images for each label, (count, POOL, 3, S, S), from a training of `steps` steps."""
        short = config.train.model_copy(update={"steps": steps})
        network, _ = load_generator(train(dataset, config.model, short, scratch / f"training-{steps}", "cpu").ema.path)
        with fast_arithmetic(torch.device("cpu")):
            drawn = sample(network, labels.repeat_interleave(POOL), size, classes, SampleConfig(seed=1_000))
        return drawn.view(count, POOL, 3, size, size)

    measured = 0

    def measure(images: "Tensor") -> "FidelityReport":
        nonlocal measured
        measured += 1
        samples = _samples(scratch / "samples" / f"{measured}.safetensors", images, labels, config.model.patch_size)
        return fidelity.evaluate(samples, dataset, config.evaluate, classifier, scratch / "refusals", "cpu")

    def failed(candidate: "FidelityReport", published: "FidelityReport | None") -> list[str]:
        decision = gate.decide(candidate, published, "published" if published else None, config.evaluate, scratch / "decisions")
        return [term.name for term in decision.terms if not term.passed]

    good, worse = pool(config.train.steps), pool(config.train.steps // WORSE)
    judge = Judge.load(dataset, config.evaluate, classifier, scratch / "refusals", "cpu")
    cats = groups.members(labels, dataset.classes, groups.CATS)
    sets = [judge.extract_features(images[cats].flatten(0, 1)) for images in (good, worse)]
    layer, tolerance = judge.extractor.feature_layer, config.evaluate.tolerance
    real = judge.features("test", groups.CATS)[layer]
    needed = images_needed(sets[0][layer], sets[1][layer], real, tolerance, resamples)
    generator = torch.Generator().manual_seed(0)
    verdicts, reasons = Counter[str](), Counter[str]()
    for number in range(resamples):
        # Each label gets an index into the pool, and the second release another one: they share no image.
        first = torch.randint(POOL, (count,), generator=generator)
        second = (first + torch.randint(1, POOL, (count,), generator=generator)) % POOL
        published, again, weaker = (
            measure(images[torch.arange(count), at]) for images, at in ((good, first), (good, second), (worse, second))
        )
        same, other = failed(again, published), failed(weaker, published)
        verdicts.update({"false": bool(same), "missed": not other})
        reasons.update(same)
        print({"resample": number + 1, "same": same, "worse": other}, flush=True)

    counts = torch.bincount(labels, minlength=classes).tolist()

    def firsts(images: "Tensor", of: "Tensor") -> "Tensor":
        return torch.cat([images[of == label][:wanted] for label, wanted in enumerate(counts)])

    alike, fresh = firsts(known, known_labels), firsts(unseen, unseen_labels)
    honest = measure(fresh)
    canaries = [(draw, term, None) for draw, term in FIRST] + [(draw, term, honest) for draw, term in REPLACING]
    refused = {}
    for draw, term, published in canaries:
        terms = failed(measure(draw(alike, fresh, labels)), published)
        refused[f"{draw.__name__}{' beside honest images' if published else ''}: {term}"] = terms
        print({"canary": draw.__name__, "term": term, "failed": terms}, flush=True)
    groups = {honest.conditions["group"]: honest.conditions["generated"], **honest.conditions["groups"]}
    return {
        "group": honest.conditions["group"],
        "groups": groups,
        "false_rejections": verdicts["false"] / resamples,
        "missed_worse": verdicts["missed"] / resamples,
        "rejected_by": dict(reasons),
        "canaries_refused": sum(term in refused[name] for (_, term, _), name in zip(canaries, refused, strict=True)),
        "canaries": len(canaries),
        "canaries_failed": refused,
        "honest_images_failed": failed(honest, None),
        **needed,
        "resamples": resamples,
        "samples": count,
        "steps": config.train.steps,
        "worse_steps": config.train.steps // WORSE,
    }


def _speedup(judge: Any, images: "Tensor", extractor: dict[str, Any]) -> float:
    """Return the ratio of torch-fidelity's extraction time to ours. Batches alternate, so that other load affects both."""
    import torch
    from torch_fidelity.utils import create_feature_extractor

    from tinycats_core.evaluation.extractors import extract

    layers = [layer for layer in (judge.extractor.feature_layer, judge.extractor.logit_layer) if layer]
    path = extractor["feature_extractor_weights_path"]
    network = create_feature_extractor(
        extractor["feature_extractor"], layers, cuda=False, feature_extractor_weights_path=path, verbose=False
    )

    def theirs(batch: "Tensor") -> None:
        with torch.no_grad():
            network(batch)

    seconds: dict[str, float] = {"ours": 0.0, "theirs": 0.0}
    ours = partial(extract, judge.extractor, batch_size=judge.config.batch_size)
    calls: dict[str, Callable[[Tensor], Any]] = {"ours": ours, "theirs": theirs}
    for number, batch in enumerate(images[: 8 * judge.config.batch_size].split(judge.config.batch_size)):
        for name, call in calls.items():
            started = time.perf_counter()
            call(batch)
            if number or len(images) <= judge.config.batch_size:  # the first batch is a warm-up
                seconds[name] += time.perf_counter() - started
    return seconds["theirs"] / seconds["ours"]


def _cost(
    dataset: "Dataset",
    config: "EvaluateConfig",
    classifier: "Weights | None",
    made: "Tensor",
    labels: "Tensor",
    scratch: Path,
    rounds: int,
) -> dict[str, Any]:
    """Return the ratio of the time of an evaluation with an empty cache to that of extracting the features of as many images."""
    import torch

    from tinycats_core.data.splits import load_split
    from tinycats_core.evaluation import fidelity
    from tinycats_core.evaluation.fidelity import NOISE_IMAGES
    from tinycats_core.evaluation.reference import Judge

    samples = _samples(scratch / "samples" / "cost.safetensors", made, labels, 8)
    noise = made[torch.arange(2 * NOISE_IMAGES + 1) % len(made)]  # as many as the trivial generators draw
    ratios, bare = [], 0.0
    for number in range(rounds):
        started = time.perf_counter()
        judge = Judge.load(dataset, config, classifier, scratch / f"cost-{number}", "cpu")
        for images in (made, load_split(dataset, "test")[0], load_split(dataset, "train")[0], noise):
            judge.extract_features(images)
        extracted = time.perf_counter()
        fidelity.evaluate(samples, dataset, config, classifier, scratch / f"cost-{number}", "cpu")
        bare = extracted - started
        ratios.append((time.perf_counter() - extracted) / bare)
    return {"cost_ratio": statistics.median(ratios), "extraction_seconds": round(bare, 2)}


def _samples(path: Path, images: "Tensor", labels: "Tensor", patch_size: int) -> Any:
    from tinycats_core.files import sha256_of
    from tinycats_core.records import SampleSet
    from tinycats_core.tensors import write_safetensors

    settings = {"runtime": "pytorch", "patch_size": patch_size}
    write_safetensors(path, {"images": images.contiguous(), "labels": labels}, {"kind": "samples", "settings": settings})
    return SampleSet(path=path, sha256=sha256_of(path), count=len(images), settings=settings)


def _plain_frechet(made: "Tensor", real: "Tensor") -> float:
    """Return the Fréchet distance by the formula of its paper, with NumPy's symmetric matrix roots."""
    import numpy as np

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T

    (mean, cov), (other_mean, other_cov) = ((x.mean(0), np.cov(x.T)) for x in (made.double().numpy(), real.double().numpy()))
    half = root(cov)
    return float(np.square(mean - other_mean).sum() + np.trace(cov + other_cov - 2 * root(half @ other_cov @ half)))


def _relative(ours: float | None, theirs: float) -> float:
    return abs((ours if ours is not None else float("inf")) - theirs) / abs(theirs)


if __name__ == "__main__":
    sys.exit(main())
