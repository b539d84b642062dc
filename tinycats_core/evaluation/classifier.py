"""The breed classifier, a network of torchvision or a small one: released on its own, and a feature extractor of the evaluation."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tinycats_core.config import ClassifierConfig, ClassifierShape
from tinycats_core.data.splits import load_split
from tinycats_core.device import pick_device, pick_precision
from tinycats_core.errors import CheckpointError, DataError, TrainingError, printable
from tinycats_core.evaluation.backbones import make_backbone
from tinycats_core.files import check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Dataset, Weights
from tinycats_core.signals import Stop
from tinycats_core.source_code import code_of
from tinycats_core.tensors import load_strictly, read_safetensors, write_safetensors

logger = logging.getLogger("tinycats.classifier")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Row = dict[str, Any]  # of the log: an epoch
OnLog = Callable[[Row], None]


class BreedClassifier(nn.Module):
    """A network that takes images as they are stored and normalises them itself.

    Args:
        backbone: the name of a torchvision network, or `resnet8` (`backbones.narrow_resnet`).
        first_stride: of the first convolution. torchvision's is 2; with 1 a small image keeps more of its resolution up to
            the last layer. It is written to the file's header, because the weights do not determine it.
        pretrained: start from ImageNet weights, downloaded by torchvision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, image_size: int, classes: Sequence[str], first_stride: int, pretrained: bool = False):
        super().__init__()
        self.backbone_name, self.image_size, self.classes = backbone, image_size, tuple(classes)
        self.first_stride = first_stride
        self.backbone = make_backbone(backbone, pretrained)
        modules = dict(self.backbone.named_modules())
        next(m for m in modules.values() if isinstance(m, nn.Conv2d)).stride = (first_stride, first_stride)
        for module in modules.values():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # MobileNet's 0.01 needs hundreds of thousands of steps
        *path, name = [key for key, m in modules.items() if isinstance(m, nn.Linear)][-1].split(".")
        last = self.backbone.get_submodule(".".join([*path, name]))
        assert isinstance(last, nn.Linear)
        self.backbone.get_submodule(".".join(path)).register_module(name, nn.Identity())
        self.head = nn.Linear(last.in_features, len(self.classes))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the last layer, (N, D), for images (N, 3, S, S): uint8, or float in 0 to 255."""
        normal = (images.float() - self.mean) / self.std
        return self.backbone(normal.contiguous(memory_format=torch.channels_last))  # halves MobileNet's time on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, classes), for images (N, 3, S, S): uint8, or float in 0 to 255."""
        return self.head(self.features(images))


def train_classifier(
    dataset: Dataset,
    config: ClassifierConfig,
    folder: Path,
    device: str = "auto",
    on_log: OnLog | None = None,
    stop: Stop | None = None,
    code: str | None = None,
) -> Weights:
    """Train a classifier on the training split and report on the test split. A finished folder is returned as it is.

    The validation split chooses the epoch; if it is empty, the last epoch is chosen. The test split is used once, for the
    report. In the loss a class weighs 1 / (its images ** config.balance). The learning rate rises to config.lr over the first
    30 % of the steps and falls to zero (OneCycleLR). The folder gets `classifier.safetensors` and `report.json` (`report_on`).

    Args:
        on_log: called after each epoch with epoch, epochs, loss, val_loss and val_accuracy (None without validation images), lr,
            images_per_s.
        code: the digest of the code to which the classifier belongs; None: of the present code.

    Raises:
        CheckpointError: the folder holds the classifier of another data set, configuration or code.
        DataError: a class has no training images, or there is a single class.
        TrainingError: the loss is not finite, a stop was requested, or the pretrained weights cannot be downloaded.
    """
    check_writable(folder)
    made_by = code or code_of(train_classifier).digest
    key = digest_of({"code": made_by, "dataset": dataset.content, "config": config.model_dump(mode="json")})
    if (folder / "report.json").is_file():
        return _finished(folder, key)
    target = pick_device(device)
    (images, labels), validation = load_split(dataset, "train"), load_split(dataset, "val")
    _check_classes(labels, len(validation[1]), dataset)
    stride = 1 if dataset.image_size < 32 else 2  # thumbnails: with 2 the last layers would be a single pixel
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(config.seed)
        classifier = BreedClassifier(config.backbone, dataset.image_size, dataset.classes, stride, config.pretrained)
        classifier.to(memory_format=torch.channels_last).to(target)
        log, weights, best = _fit(classifier, (images.to(target), labels.to(target)), validation, config, on_log, stop)
    classifier.load_state_dict(weights)
    return _write(classifier, weights, log, best, dataset, config, folder, key)


def require_classes(dataset: Dataset) -> None:
    """Raise DataError if a classifier would have nothing to tell apart."""
    if len(dataset.classes) < 2:
        raise DataError(
            f"the data has one class ({', '.join(dataset.classes)}), and a classifier with nothing to tell apart learns nothing. "
            "Set evaluate.extractor to 'inception' and leave evaluate.min_breed_accuracy out, or sort the photos into classes."
        )


def _check_classes(labels: Tensor, val_count: int, dataset: Dataset) -> None:
    require_classes(dataset)
    for label, name in enumerate(dataset.classes):
        if not (labels == label).any():
            raise DataError(f"class {name!r} has 0 training images; a classifier needs 1. Add some, or drop it.")
    if not val_count:
        logger.warning("there are no validation images to choose the classifier's epoch by: the last one is chosen")


def _write(
    classifier: BreedClassifier,
    weights: dict[str, Tensor],
    log: list[Row],
    best: Row,
    dataset: Dataset,
    config: ClassifierConfig,
    folder: Path,
    key: str,
) -> Weights:
    """Measure the classifier on the test split and write it with its report."""
    labels, (test_images, test_labels) = load_split(dataset, "train")[1], load_split(dataset, "test")
    report = report_on(predict(classifier, test_images).argmax(1), test_labels, labels, dataset.classes)
    chosen_by = "the validation images" if dataset.val_count else "nothing: without validation images the last epoch is kept"
    facts: dict[str, float | int | str | None] = {
        "test_accuracy": report["accuracy"],
        "val_accuracy": best["val_accuracy"],
        "majority_accuracy": report["majority_accuracy"],
        "macro_recall": report["macro_recall"],
        "macro_f1": report["macro_f1"],
        "epoch": best["epoch"],
        "epoch_chosen_by": chosen_by,
        "backbone": config.backbone,
    }
    path, step = folder / "classifier.safetensors", best["epoch"] * math.ceil(len(labels) / config.batch_size)
    shape = {"backbone": config.backbone, "image_size": dataset.image_size, "classes": list(dataset.classes)}
    stride = {"first_stride": classifier.first_stride}
    write_safetensors(path, weights, {"kind": "classifier", **shape, **stride, "step": step, "facts": facts})
    record = Weights(path=path, sha256=sha256_of(path), kind="classifier", step=step, facts=facts)
    counts = {"train_images": dataset.train_count, "val_images": dataset.val_count, "test_images": dataset.test_count}
    conditions = {"config": config.model_dump(mode="json"), "dataset": dataset.content, **counts}
    made = {"key": key, "checkpoint": record.model_dump(mode="json", exclude={"path"})}
    write_json(folder / "report.json", {**report, "conditions": conditions, "epochs": log, "made": made})
    return record


def load_classifier(path: Path, device: str | torch.device = "cpu") -> BreedClassifier:
    """Load a classifier in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or its weights do not fit its own header.
    """
    tensors, raw = read_safetensors(path, "classifier")
    try:
        shape = ClassifierShape.model_validate({name: raw.get(name) for name in ClassifierShape.model_fields})
    except ValidationError as error:
        reason = printable(error.errors()[0]["msg"])
        raise CheckpointError(f"{path} has a header that this version cannot read: {reason}. Train anew.") from None
    with torch.random.fork_rng(devices=[]):  # initial weights, soon replaced, must not draw random numbers
        classifier = BreedClassifier(shape.backbone, shape.image_size, shape.classes, shape.first_stride)
    load_strictly(classifier, tensors, path)
    return classifier.to(device).eval()


@torch.inference_mode()
def predict(classifier: BreedClassifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return logits on the CPU, (N, classes), for uint8 images (N, 3, S, S)."""
    classifier.eval()
    device = classifier.mean.device
    return torch.cat([classifier(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, rotate (±8°), shift (±8 %) and scale (±10 %) each image: uint8 (N, 3, S, S) to float in 0 to 255."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle, scale = uniform(-0.14, 0.14), uniform(0.9, 1.1)
    rows = [flip * scale * angle.cos(), -scale * angle.sin(), uniform(-0.16, 0.16)]  # grids are 2 wide
    rows += [flip * scale * angle.sin(), scale * angle.cos(), uniform(-0.16, 0.16)]
    theta = torch.stack(rows, 1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def report_on(predicted: Tensor, labels: Tensor, train_labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return a classification report: accuracy, its baseline, the figures of each class, and the confusion matrix.

    `majority_accuracy` is that of always predicting the commonest training class. `macro_recall` and `macro_f1` are means over
    the classes that have images here. `classes` has precision, recall, F1 and support of each class, `confusion` a row for each
    true class and a column for each predicted one. 0/0 is None.
    """
    count = len(classes)
    confusion = torch.bincount(labels * count + predicted, minlength=count * count).view(count, count)
    hits, support, predictions = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    commonest = int(torch.bincount(train_labels, minlength=count).argmax())
    rows = [
        {
            "class": classes[i],
            "precision": _ratio(hits[i], predictions[i]),
            "recall": _ratio(hits[i], support[i]),
            "f1": _ratio(2 * hits[i], predictions[i] + support[i]),
            "support": support[i],
        }
        for i in range(count)
    ]
    present = [row for row in rows if row["support"]]
    return {
        "accuracy": _ratio(sum(hits), len(labels)),
        "majority_accuracy": _ratio(support[commonest], len(labels)),
        "macro_recall": _ratio(sum(row["recall"] for row in present), len(present)),
        "macro_f1": _ratio(sum(row["f1"] for row in present), len(present)),
        "classes": rows,
        "confusion": confusion.tolist(),
    }


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class _Optimizer:
    """AdamW with its schedule, the scaling of gradients, and the weights of the classes in the loss."""

    adamw: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.OneCycleLR
    scaler: torch.amp.GradScaler
    autocast: torch.dtype | None
    class_weights: Tensor

    @classmethod
    def of(cls, classifier: BreedClassifier, labels: Tensor, steps: int, config: ClassifierConfig) -> "_Optimizer":
        class_weights = torch.bincount(labels, minlength=len(classifier.classes)).float() ** -config.balance
        adamw = torch.optim.AdamW(classifier.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, config.lr, total_steps=max(steps, 2))
        autocast = pick_precision("auto", labels.device)
        scaler = torch.amp.GradScaler(labels.device.type, enabled=autocast == torch.float16)
        return cls(adamw, schedule, scaler, autocast, class_weights / class_weights.mean())

    def step(self, classifier: BreedClassifier, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Take a step on augmented images. Returns the loss."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            logits = classifier(augment(images, generator))
        loss = F.cross_entropy(logits.float(), labels, self.class_weights, label_smoothing=0.05)
        self.adamw.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.schedule.step()
        return loss.detach()


def _fit(
    classifier: BreedClassifier,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    config: ClassifierConfig,
    on_log: OnLog | None,
    stop: Stop | None,
) -> tuple[list[Row], dict[str, Tensor], Row]:
    """Train all epochs. Returns the log, the weights of the best epoch (on the CPU) and its row of the log."""
    images, labels = train
    steps = math.ceil(len(labels) / config.batch_size)
    optimizer = _Optimizer.of(classifier, labels, steps * config.epochs, config)
    log: list[Row] = []
    weights: dict[str, Tensor] = {}
    best: Row = {}
    for epoch in range(1, config.epochs + 1):
        started, losses, rate = time.perf_counter(), [], config.lr
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        classifier.train()
        for batch in torch.randperm(len(labels), generator=generator).tensor_split(steps):  # none of a single image
            if stop and stop.requested:
                raise TrainingError(f"stopped in epoch {epoch} of {config.epochs}; run the same command to train anew")
            rate = optimizer.schedule.get_last_lr()[0]
            losses.append(optimizer.step(classifier, images[batch], labels[batch], generator))
        row = {
            "epoch": epoch,
            "epochs": config.epochs,
            "loss": torch.stack(losses).mean().item(),
            **_validate(classifier, validation),
        }
        log.append({**row, "lr": rate, "images_per_s": len(labels) / (time.perf_counter() - started)})
        _require_finite(row, config)
        if on_log:
            on_log(log[-1])
        if not best or row["val_loss"] is None or _score(row) > _score(best):
            best = log[-1]
            weights = {name: tensor.detach().cpu().clone() for name, tensor in classifier.state_dict().items()}
    return log, weights, best


def _validate(classifier: BreedClassifier, validation: tuple[Tensor, Tensor]) -> Row:
    images, labels = validation
    if not len(labels):
        return {"val_loss": None, "val_accuracy": None}
    logits = predict(classifier, images)
    accuracy = (logits.argmax(1) == labels).cpu().double().mean().item()
    return {"val_loss": F.cross_entropy(logits, labels).item(), "val_accuracy": accuracy}


def _score(row: Row) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"]


def _require_finite(row: Row, config: ClassifierConfig) -> None:
    if not (math.isfinite(row["loss"]) and math.isfinite(row["val_loss"] or 0)):
        raise TrainingError(
            f"the classifier's loss is {row['loss']} (validation: {row['val_loss']}) after epoch {row['epoch']}; "
            f"it must be finite. Lower classifier.lr, which is {config.lr}."
        )


def _finished(folder: Path, key: str) -> Weights:
    """Return the classifier of a finished folder. Raises CheckpointError if its data or configuration are others."""
    made = read_json(folder / "report.json")["made"]
    if made["key"] != key:
        raise CheckpointError(
            f"{folder} holds a classifier of other data or another configuration. Give another folder, or delete it."
        )
    return Weights(path=folder / "classifier.safetensors", **made["checkpoint"]).verify()
