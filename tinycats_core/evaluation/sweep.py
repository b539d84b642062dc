"""The sweep: which average to ship and with which guidance to draw from it, chosen on the validation images.

The test images have no say in it: they are used once, for the figures of what was chosen.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tinycats_core.config import EvaluateConfig, SampleConfig, SampleOptions
from tinycats_core.data.splits import load_split
from tinycats_core.device import fast_arithmetic
from tinycats_core.evaluation import fidelity, reference
from tinycats_core.evaluation.memorization import copy_rate
from tinycats_core.files import digest_of, sha256_of, write_json
from tinycats_core.generator.sampling import labels_like, sample
from tinycats_core.generator.weights import ema_decay, load_generator
from tinycats_core.records import Choice, Dataset, Trained, Weights

SEED_APART = 2**31  # between the noise of the sweep and that of the final figures: above every seed that can be given


def choose(
    trained: Trained,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    folder: Path,
    device: str = "auto",
    on_row: Callable[[int, int], None] | None = None,
) -> Choice:
    """Choose one of the averages and one of the options: the pair with the lowest KID, the first of equals.

    Of each pair `options.sweep_images` images are drawn from the same noise, with the classes in the proportions of the
    validation split, and measured against that split. It is another noise than that of the final figures, which are thus
    not those of a lucky draw. A row has ema_decay, guidance, guidance_interval, the main metrics of `fidelity.compare`, and
    copy_rate, the share of copies of training images. Averages that are the same, because the training was too short for
    them to differ, are tried once. A single pair is taken as it is, and nothing is drawn; with too few validation images
    to measure with the first pair is taken, and the note says why.

    Args:
        folder: of the evaluations, which keeps the validation images' features; the choice is a file in it.
        on_row: called after each pair with how many are measured, and of how many.

    Raises:
        TinycatsError: an average is gone or has changed.
        EvaluationError: the extractor is not to be had, or a metric is not finite.
    """
    averages = distinct(trained.averages)
    pairs = [(average, setting) for average in averages for setting in options.candidates()]
    rows: list[dict[str, Any]] = []
    best, note, needed = 0, None, fidelity.images_needed(config)
    if len(pairs) == 1:
        rule = "there was one average and one setting, so nothing was drawn"
    elif dataset.val_count < needed:
        rule = "the first average and the first setting"
        note = (
            f"there are {dataset.val_count} validation images; at least {needed} are needed to choose between {len(pairs)} "
            "pairs, so the first is taken. Add images, raise data.val_fraction, or give one guidance."
        )
    else:
        kid = f"kid_{config.extractor}"
        rule = f"the lowest {kid} on the validation images, the first of equals"
        rows = _measure(pairs, dataset, config, options.sweep_images, classifier, folder, device, on_row)
        best = min(range(len(rows)), key=lambda number: rows[number][kid])
        rows[best]["chosen"] = True
    chosen, setting = pairs[best]
    facts = {"rule": rule, "rows": rows, "note": note}
    conditions = {
        "extractor": config.extractor,
        "classifier_sha256": classifier.sha256 if classifier else None,
        "kid_subset_size": fidelity.kid_subset(options.sweep_images, dataset.val_count),
        "noise_seed": options.seed + SEED_APART,
    }
    written = {
        "split": "val",
        "validation_images": dataset.val_count,
        "images": options.sweep_images if rows else 0,
        "conditions": conditions if rows else {},
        "ema_decay": chosen.facts.get("ema_decay"),
        "sample": setting.model_dump(mode="json"),
        **facts,
    }
    path = folder / f"sweep-{digest_of([chosen.content, written])[:12]}.json"
    write_json(path, written)
    return Choice(path=path, sha256=sha256_of(path), weights=chosen, sample=setting, **facts)


def distinct(averages: Sequence[Weights]) -> list[Weights]:
    """Return the averages without those that the warm-up of the decay has made equal to an earlier one."""
    found: dict[float | int | str | None, Weights] = {}
    for average in averages:
        decay = average.facts.get("ema_decay")
        found.setdefault(ema_decay(decay, average.step - 1) if isinstance(decay, float) else decay, average)
    return list(found.values())


def _measure(
    pairs: list[tuple[Weights, SampleConfig]],
    dataset: Dataset,
    config: EvaluateConfig,
    count: int,
    classifier: Weights | None,
    folder: Path,
    device: str,
    on_row: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Return a row for each pair."""
    judge = reference.Judge.appoint(dataset, config, classifier, folder, device)
    real, known = judge.reference("val"), load_split(dataset, "train")[0].to(judge.device)
    labels = labels_like(load_split(dataset, "val")[1], count, len(dataset.classes))
    subset = fidelity.kid_subset(count, dataset.val_count)
    rows = []
    for average, setting in pairs:
        network, _ = load_generator(average.verify().path, judge.device)
        settings = setting.model_copy(update={"seed": setting.seed + SEED_APART})
        with fast_arithmetic(judge.device):
            images = sample(network, labels, dataset.image_size, len(dataset.classes), settings, judge.device)
        metrics = fidelity.compare(judge.see(images), real, judge.eyes, config, subset, labels)
        fidelity.require_finite(metrics, f"EMA {average.facts.get('ema_decay')} at guidance {setting.guidance}")
        rows.append(
            {
                "chosen": False,
                "ema_decay": average.facts.get("ema_decay"),
                "guidance": setting.guidance,
                "guidance_interval": list(setting.guidance_interval),
                **{name: value for name, value in metrics.items() if not name.endswith(fidelity.DETAILS)},
                "copy_rate": copy_rate(images.to(judge.device), known) if len(known) > 1 else None,
            }
        )
        if on_row:
            on_row(len(rows), len(pairs))
    return rows
