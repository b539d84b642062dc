"""The sweep: choose the average to ship and the guidance to sample it with, on the validation images.

The test images play no part in it: they are used once, for the figures of the chosen pair.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tinycats_core.config import EvaluateConfig, SampleConfig, SampleOptions
from tinycats_core.data import groups
from tinycats_core.data.splits import load_labels
from tinycats_core.device import fast_arithmetic
from tinycats_core.evaluation import fidelity, metrics
from tinycats_core.evaluation.reference import Judge
from tinycats_core.files import digest_of, sha256_of, write_json
from tinycats_core.generator.sampling import labels_like, sample
from tinycats_core.generator.weights import ema_decay, load_generator
from tinycats_core.records import Choice, Dataset, SweepRow, Trained, Weights

SEED_APART = 2**31  # between the noise of the sweep and that of the final figures: above every seed that can be given
Pair = tuple[Weights, SampleConfig]
OnRow = Callable[[int, int], None]


def choose(
    trained: Trained,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    folder: Path,
    device: str = "auto",
    on_row: OnRow | None = None,
) -> Choice:
    """Choose the pair of an average and a sampling option with the lowest KID, the first of equals.

    For each pair, `options.sweep_images` images are drawn from the same noise, with the classes in the proportions of the
    validation split, and measured against that split; of cats alone if the gate judges these. The final figures use other
    noise, so that they are not those of a lucky draw. A single pair is chosen without drawing, and the first pair if the
    validation images are too few.

    Args:
        folder: of the evaluations, with the cache of the validation images' features. The choice is written there.
        on_row: called after each pair with the number of measured pairs and of all pairs.

    Raises:
        TinycatsError: an average is missing or has changed.
        EvaluationError: the extractor is unavailable, or a metric is not finite.
    """
    pairs = [(average, setting) for average in distinct(trained.averages) for setting in options.candidates()]
    needed, kid = fidelity.images_needed(config), f"kid_{config.extractor}"
    if len(pairs) == 1:
        return _write(pairs[0], "there was one average and one setting, so nothing was drawn", dataset, folder)
    if dataset.val_count < needed:
        note = (
            f"there are {dataset.val_count} validation images; at least {needed} are needed to choose between {len(pairs)} "
            "pairs, so the first is taken. Add images, raise data.val_fraction, or give one guidance."
        )
        return _write(pairs[0], "the first average and the first setting", dataset, folder, note=note)
    judge = Judge.load(dataset, config, classifier, folder, device)
    group, by = _chosen_by(dataset, config)
    rows = _measure(pairs, judge, group, options.sweep_images, on_row)
    best = min(range(len(rows)), key=lambda number: rows[number].metrics[kid])
    rows[best] = rows[best].model_copy(update={"chosen": True})
    conditions = {
        "extractor": config.extractor,
        "classifier_sha256": judge.classifier_sha256,
        "kid_subset_size": metrics.kid_subset(options.sweep_images, by),
        "noise_seed": options.seed + SEED_APART,
        **({"group": group, "group_images": by} if group != groups.ALL else {}),
    }
    rule = f"the lowest {kid} on the validation images{' of cats' if group != groups.ALL else ''}, the first of equals"
    return _write(pairs[best], rule, dataset, folder, rows, options.sweep_images, conditions)


def distinct(averages: Sequence[Weights]) -> list[Weights]:
    """Return the averages without those that the warm-up of the decay has made equal to an earlier one."""
    by_decay: dict[float | int | str | None, Weights] = {}
    for average in averages:
        decay = average.facts.get("ema_decay")
        by_decay.setdefault(ema_decay(decay, average.step - 1) if isinstance(decay, float) else decay, average)
    return list(by_decay.values())


def _chosen_by(dataset: Dataset, config: EvaluateConfig) -> tuple[str, int]:
    """Return the group that the choice is made by, and its validation images.

    It is the cats if they are judged apart and there are enough to choose by.
    """
    cats = groups.sizes(load_labels(dataset, "val"), dataset.classes)[groups.CATS]
    enough = fidelity.is_divided(dataset, config) and cats >= fidelity.images_needed(config)
    return (groups.CATS, cats) if enough else (groups.ALL, dataset.val_count)


def _measure(pairs: Sequence[Pair], judge: Judge, group: str, count: int, on_row: OnRow | None) -> list[SweepRow]:
    dataset, real, real_labels = judge.dataset, judge.reference("val", group), judge.group("val", group)[1]
    classes, subset = len(dataset.classes), metrics.kid_subset(count, len(real_labels))
    labels = labels_like(real_labels, count, classes)
    rows = []
    for average, setting in pairs:
        network, _ = load_generator(average.verify().path, judge.device)
        apart = setting.model_copy(update={"seed": setting.seed + SEED_APART})
        with fast_arithmetic(judge.device):
            images = sample(network, labels, dataset.image_size, classes, apart, judge.device)
        drawn = metrics.Comparison(judge, real, images, labels, judge.extract_features(images), subset)
        values, decay = metrics.measure(drawn, sweep=True), average.facts.get("ema_decay")
        metrics.require_finite(values, f"EMA {decay} at guidance {setting.guidance}")
        main = {name: value for name, value in values.items() if not name.endswith(metrics.DETAILS)}
        interval = setting.guidance_interval
        rows.append(SweepRow(chosen=False, ema_decay=decay, guidance=setting.guidance, guidance_interval=interval, **main))
        if on_row:
            on_row(len(rows), len(pairs))
    return rows


def _write(
    pair: Pair,
    rule: str,
    dataset: Dataset,
    folder: Path,
    rows: Sequence[SweepRow] = (),
    images: int = 0,
    conditions: dict[str, str | int | None] | None = None,
    note: str | None = None,
) -> Choice:
    average, setting = pair
    content = {
        "split": "val",
        "validation_images": dataset.val_count,
        "images": images,
        "conditions": conditions or {},
        "ema_decay": average.facts.get("ema_decay"),
        "sample": setting.model_dump(mode="json"),
        "rule": rule,
        "rows": [row.model_dump(mode="json") for row in rows],
        "note": note,
    }
    path = folder / f"sweep-{digest_of([average.content, content])[:12]}.json"
    write_json(path, content)
    return Choice(path=path, sha256=sha256_of(path), weights=average, sample=setting, rule=rule, rows=tuple(rows), note=note)
