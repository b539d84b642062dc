"""Trials on the validation images: an average of the weights with one way of drawing, measured like every other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tinycats_core.config import EvaluateConfig, SampleConfig, SampleOptions
from tinycats_core.data import groups
from tinycats_core.data.splits import Split, load_labels
from tinycats_core.device import fast_arithmetic
from tinycats_core.evaluation import metrics
from tinycats_core.evaluation.fidelity import images_needed, is_divided
from tinycats_core.evaluation.gate import copy_bar
from tinycats_core.evaluation.memorization import COPY_RATES, CopyRates
from tinycats_core.evaluation.reference import Judge, Reference
from tinycats_core.evaluation.samples import labels_to_draw
from tinycats_core.generator.sampling import labels_like, sample
from tinycats_core.generator.weights import load_generator
from tinycats_core.records import Dataset, SweepRow, Weights

SEED_APART = 2**31  # between the noise of the trials and that of the final figures: above every seed that can be given


@dataclass(frozen=True)
class Trials:
    """What all trials share: the judge, the real images, the labels to draw, and the highest copy rates that pass, by name.

    The real images are the validation images, of cats alone if the gate judges these. If they are too few to measure anything
    with, they are the training images: nothing but the bars on the copy rates then speaks against a generator that repeats them,
    and `note` says so.
    """

    judge: Judge
    split: Split
    group: str
    real: Reference
    labels: Tensor
    subset: int
    left_out: CopyRates
    bars: Mapping[str, float]
    note: str | None

    @classmethod
    def load(
        cls,
        dataset: Dataset,
        options: SampleOptions,
        config: EvaluateConfig,
        classifier: Weights | None,
        folder: Path,
        device: str = "auto",
    ) -> "Trials":
        """Load the judge. Raises EvaluationError if the extractor is unavailable."""
        fast = config.model_copy(update={"dinov2_weights": None})  # large, slow, and without a say in the choice
        judge, needed = Judge.load(dataset, fast, classifier, folder, device), images_needed(config)
        split: Split = "val" if dataset.val_count >= needed else "train"
        cats = groups.sizes(load_labels(dataset, split), dataset.classes)[groups.CATS]
        group = groups.CATS if is_divided(dataset, config) and cats >= needed else groups.ALL
        note = None
        if split == "train":
            note = (
                f"there are {dataset.val_count} validation images; at least {needed} are needed, so the training images took "
                "their place: the copy rates alone kept generators out that repeat them. Add images, or raise data.val_fraction."
            )
        count = options.sweep_images
        real_labels = judge.group(split, group)[1]
        labels, subset = labels_like(real_labels, count, len(dataset.classes)), metrics.kid_subset(count, len(real_labels))
        left_out = judge.left_out(group)
        bars = _bars(left_out, dataset, config, group, count)
        return cls(judge, split, group, judge.reference(split, group), labels, subset, left_out, bars, note)

    @property
    def kid(self) -> str:
        """The name of the metric that trials are compared by."""
        return f"kid_{self.judge.extractor.name}"

    def measure(self, average: Weights, setting: SampleConfig) -> SweepRow:
        """Draw from an average and measure the images. Raises EvaluationError for a metric that is not finite."""
        judge, dataset = self.judge, self.judge.dataset
        network, _ = load_generator(average.verify().path, judge.device)
        apart = setting.model_copy(update={"seed": setting.seed + SEED_APART})
        with fast_arithmetic(judge.device):
            images = sample(network, self.labels, dataset.image_size, len(dataset.classes), apart, judge.device)
        drawn = metrics.Comparison(judge, self.real, images, self.labels, judge.extract_features(images), self.subset)
        values, decay = metrics.measure(drawn, sweep=True), average.facts.get("ema_decay")
        metrics.require_finite(values, f"EMA {decay} of step {average.step} at guidance {setting.guidance}")
        measured: dict[str, Any] = {name: value for name, value in values.items() if not name.endswith(metrics.DETAILS)}
        return SweepRow(
            step=average.step,
            copies=any((values[name] or 0) > bar for name, bar in self.bars.items()),
            ema_decay=decay,
            guidance=setting.guidance,
            guidance_interval=setting.guidance_interval,
            **measured,
        )

    def conditions(self) -> dict[str, Any]:
        """Return what the figures of the trials depend on."""
        images = len(self.judge.group(self.split, self.group)[1])
        return {
            **({"group": self.group, "group_images": images} if self.group != groups.ALL else {}),
            "extractor": self.judge.extractor.name,
            "classifier_sha256": self.judge.classifier_sha256,
            "kid_subset_size": self.subset,
            "noise_seed_apart": SEED_APART,
            "left_out": self.left_out._asdict(),
            "copy_bars": dict(self.bars),
        }


def _bars(left_out: CopyRates, dataset: Dataset, config: EvaluateConfig, group: str, count: int) -> dict[str, float]:
    """Return the highest copy rates of `count` images that leave little doubt that the gate's bars will be kept.

    What passes here is measured again, with other noise: a rate just below the gate's bar would fail there half of the time. So
    the bar is the highest rate whose own chance, two standard errors, stays below that of the gate: the lower end of Wilson's
    interval around it.
    """
    drawn, test = labels_to_draw(dataset, config.samples, config.other_share), load_labels(dataset, "test")
    generated, tested = (int(groups.members(labels, dataset.classes, group).sum()) for labels in (drawn, test))
    at_gate = {name: copy_bar(getattr(left_out, name), generated, left_out.images + tested) for name in COPY_RATES}
    return {name: metrics.share_interval(bar, count)[0] for name, bar in at_gate.items()}
