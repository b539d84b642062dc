"""The sweep: choose the step and the average to ship and the guidance to sample it with, on the validation images.

The test images play no part in it: they are used once, for the figures of the chosen pair.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from tinycats_core.config import EvaluateConfig, SampleConfig, SampleOptions
from tinycats_core.data import groups
from tinycats_core.data.splits import Split
from tinycats_core.evaluation.memorization import COPY_RATES
from tinycats_core.evaluation.reference import Judge
from tinycats_core.evaluation.trials import Trials
from tinycats_core.files import digest_of, sha256_of, write_json
from tinycats_core.generator.weights import ema_decay
from tinycats_core.records import Choice, Course, Dataset, SweepRow, Trained, Weights

Pair = tuple[Weights, SampleConfig]
OnRow = Callable[[int, int], None]


def judge_snapshot(
    average: Weights,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    folder: Path,
    device: str = "auto",
) -> SweepRow:
    """Measure an average on the validation images with the first way of drawing, while the training goes on after it.

    Args:
        folder: of the evaluations, with the cache of the validation images' features.

    Raises:
        TinycatsError: the average is missing or has changed.
        EvaluationError: the extractor is unavailable, or a metric is not finite.
    """
    return Trials.load(dataset, options, config, classifier, folder, device).measure(average, options.candidates()[0])


def measure_real(dataset: Dataset, config: EvaluateConfig, classifier: Weights | None, folder: Path, device: str = "auto") -> float:
    """Put the statistics of the real images into the cache of the evaluations. Returns the images/s.

    Raises:
        EvaluationError: the extractor is unavailable.
    """
    judge, since = Judge.load(dataset, config, classifier, folder, device), time.perf_counter()
    for split in get_args(Split):
        judge.reference(split)
    return (dataset.train_count + dataset.val_count + dataset.test_count) / (time.perf_counter() - since)


def why_stop(rows: Sequence[SweepRow], kid: str, patience: int) -> str | None:
    """Return why a training should end after its last snapshot, None if it should not.

    It should if the snapshot's images are copies, and the last `patience` snapshots have brought none that is better than an
    earlier one: of those that do not copy, none with a lower KID. Copying only grows from there on.
    """
    best = _best(rows, kid) if rows else 0
    since = len(rows) - 1 - best if rows and not rows[best].copies else len(rows)
    if not rows or not rows[-1].copies or since < patience:
        return None
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in _copy_rates(rows[-1]).items())
    copies = f"the images of step {rows[-1].step} are copies of training images ({rates})"
    return f"{copies}, and the last {since} snapshots brought no better one that does not copy"


def choose(
    trained: Trained,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    folder: Path,
    device: str = "auto",
    on_row: OnRow | None = None,
    course: Course = Course(),  # noqa: B008 - frozen
) -> Choice:
    """Choose the step, then the pair of an average of that step and a sampling option: each time by KID, the first of equals.

    The pair with the lowest KID is chosen among those whose copy rates are within the bars of `Trials`; if there is none, the pair
    with the lowest copy rates. Each snapshot is tried once, with the first average and the first option, and then the other
    pairs of the chosen snapshot. For each trial, `options.sweep_images` images are drawn from the same noise, with the classes
    in the proportions of the validation split, and measured against that split, of cats alone if the gate judges these. The final
    figures use other noise, so that they are not those of a lucky draw. A single pair is chosen without drawing.

    Args:
        folder: of the evaluations, with the cache of the validation images' features. The choice is written there.
        on_row: called after each trial with the number of finished trials and of all trials.
        course: the snapshots that were measured during the training.

    Raises:
        TinycatsError: an average is missing or has changed.
        EvaluationError: the extractor is unavailable, or a metric is not finite.
    """
    averages, settings = distinct(trained.averages), options.candidates()
    if len(averages) == len(settings) == 1:
        return _write((averages[0], settings[0]), "there was one average and one setting, so nothing was drawn", dataset, folder)
    trials = Trials.load(dataset, options, config, classifier, folder, device)
    known = {row.step: row for row in course.rows}
    firsts = {average.step: average for average in reversed(averages)}  # the first one of each step, the steps falling
    pairs: list[Pair] = [(firsts[step], settings[0]) for step in sorted(firsts)]
    others = max(sum(average.step == step for average in averages) for step in firsts) * len(settings) - 1
    total = sum(average.step not in known for average, _ in pairs) + others
    rows: list[SweepRow] = []

    def measure(pair: Pair) -> None:
        rows.append(trials.measure(*pair))
        if on_row:
            on_row(sum(row not in course.rows for row in rows), total)

    for pair in pairs:
        if pair[0].step in known:
            rows.append(known[pair[0].step])
        else:
            measure(pair)
    step = pairs[_best(rows, trials.kid)][0].step
    for pair in [(average, setting) for average in averages if average.step == step for setting in settings]:
        if pair not in pairs:
            measure(pair)
            pairs.append(pair)
    at_step = [number for number, (average, _) in enumerate(pairs) if average.step == step]
    best = at_step[_best([rows[number] for number in at_step], trials.kid)]
    rows[best] = rows[best].model_copy(update={"chosen": True})
    return _write(pairs[best], _rule(rows[best], trials, len(firsts)), dataset, folder, trials, rows, course.ended)


def distinct(averages: Sequence[Weights]) -> list[Weights]:
    """Return the averages without those that the warm-up of the decay has made equal to an earlier one of the same step."""
    found: dict[tuple[int, float | int | str | None], Weights] = {}
    for average in averages:
        decay = average.facts.get("ema_decay")
        effective = ema_decay(decay, average.step - 1) if isinstance(decay, float) else decay
        found.setdefault((average.step, effective), average)
    return list(found.values())


def _best(rows: Sequence[SweepRow], kid: str) -> int:
    """Return the number of the row with the lowest KID of those that do not copy, else of the one that copies least."""
    clean = [number for number, row in enumerate(rows) if not row.copies]
    if clean:
        return min(clean, key=lambda number: rows[number].metrics[kid])
    return min(range(len(rows)), key=lambda number: (max(_copy_rates(rows[number]).values()), rows[number].metrics[kid]))


def _copy_rates(row: SweepRow) -> dict[str, float]:
    return {name: row.metrics[name] or 0.0 for name in COPY_RATES}


def _rule(chosen: SweepRow, trials: Trials, snapshots: int) -> str:
    kid, of = trials.kid, "" if trials.group == groups.ALL else f" of {trials.group}"
    images = ("validation images" if trials.split == "val" else "training images") + of
    if chosen.copies:
        return "the lowest copy rates: each one's images are copies of training images more often than the bars allow"
    first = " of the snapshots first, then of the averages and settings at that step" if snapshots > 1 else ""
    return f"the lowest {kid} on the {images}{first}, the first of equals; none whose copy rates are above the bars"


def _write(
    pair: Pair,
    rule: str,
    dataset: Dataset,
    folder: Path,
    trials: Trials | None = None,
    rows: Sequence[SweepRow] = (),
    ended: str | None = None,
) -> Choice:
    average, setting = pair
    content = {
        "split": trials.split if trials else "val",
        "validation_images": dataset.val_count,
        "images": len(trials.labels) if trials else 0,
        "conditions": trials.conditions() if trials else {},
        "step": average.step,
        "ema_decay": average.facts.get("ema_decay"),
        "sample": setting.model_dump(mode="json"),
        "rule": rule,
        "rows": [row.model_dump(mode="json") for row in rows],
        "ended": ended,
        "note": trials.note if trials else None,
    }
    path = folder / f"sweep-{digest_of([average.content, content])[:12]}.json"
    write_json(path, content)
    return Choice(
        path=path,
        sha256=sha256_of(path),
        weights=average,
        sample=setting,
        rule=rule,
        rows=tuple(rows),
        bars=dict(trials.bars) if trials else {},
        ended=ended,
        note=content["note"],
    )
