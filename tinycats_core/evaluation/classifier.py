"""The breed classifier: a torchvision network that tells the classes. A product of its own, and the judge's eyes."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinycats_core.config import ClassifierConfig
from tinycats_core.data.splits import load_split
from tinycats_core.device import pick_device, pick_precision
from tinycats_core.errors import CheckpointError, DataError, TrainingError
from tinycats_core.files import check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.records import Dataset, Weights
from tinycats_core.signals import Stop
from tinycats_core.tensors import load_strictly, read_safetensors, write_safetensors

logger = logging.getLogger("tinycats.classifier")

VERSION = 3  # of the recipe and the report below: bump it when the same configuration gives others
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BreedClassifier(nn.Module):
    """A torchvision network that takes images as they are stored and normalises them itself.

    Args:
        first_stride: of the first convolution. torchvision's is 2; with 1 a small image keeps more of its pixels up to
            the last layer. Kept in the file's header, because the weights do not tell.
        pretrained: start from ImageNet's weights, downloaded by torchvision.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str, image_size: int, classes: Sequence[str], first_stride: int, pretrained: bool = False):
        super().__init__()
        self.backbone_name, self.image_size, self.classes = backbone, image_size, tuple(classes)
        self.first_stride = first_stride
        self.backbone = _torchvision_network(backbone, pretrained)
        modules = dict(self.backbone.named_modules())
        next(m for m in modules.values() if isinstance(m, nn.Conv2d)).stride = (first_stride, first_stride)
        for module in modules.values():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # MobileNet's 0.01 is for hundreds of thousands of steps
        *path, name = [key for key, m in modules.items() if isinstance(m, nn.Linear)][-1].split(".")
        last = self.backbone.get_submodule(".".join([*path, name]))
        assert isinstance(last, nn.Linear)
        self.backbone.get_submodule(".".join(path)).register_module(name, nn.Identity())
        self.head = nn.Linear(last.in_features, len(self.classes))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Return what the last layer sees, (N, D), of images (N, 3, S, S): uint8, or float in 0 to 255."""
        normal = (images.float() - self.mean) / self.std
        return self.backbone(normal.contiguous(memory_format=torch.channels_last))  # MobileNet: half the time on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (N, classes), of images (N, 3, S, S): uint8, or float in 0 to 255."""
        return self.head(self.features(images))


def train_classifier(
    dataset: Dataset,
    config: ClassifierConfig,
    folder: Path,
    device: str = "auto",
    on_log: Callable[[dict[str, Any]], None] | None = None,
    stop: Stop | None = None,
) -> Weights:
    """Train a classifier on the training split and report on the test split. A finished folder is returned as it is.

    The epoch is chosen on the validation split, without one it is the last; the test split is used once, for the report.
    In the loss a class weighs 1 / (its images ** config.balance). The learning rate rises to config.lr over the first 30 % of
    the steps and falls to nothing (OneCycleLR). The folder gets `classifier.safetensors` and `report.json`: see `report_on`.

    Args:
        on_log: called after each epoch with epoch, epochs, loss, val_loss and val_accuracy (None without validation images), lr,
            images_per_s.

    Raises:
        CheckpointError: the folder holds the classifier of another data set or configuration.
        DataError: a class has no training images.
        TrainingError: the loss is not finite, or the pretrained weights cannot be downloaded.
    """
    check_writable(folder)
    key = digest_of({"version": VERSION, "dataset": dataset.content, "config": config.model_dump(mode="json")})
    if (folder / "report.json").is_file():
        return _finished(folder, key)
    target = pick_device(device)
    images, labels = load_split(dataset, "train")
    for label, name in enumerate(dataset.classes):
        if not (labels == label).any():
            raise DataError(f"class {name!r} has 0 training images; a classifier needs 1. Add some, or drop it.")
    val_images, val_labels = load_split(dataset, "val")
    chosen_by = "the validation images" if len(val_labels) else "nothing: without validation images the last epoch is kept"
    if not len(val_labels):
        logger.warning("there are no validation images to choose the classifier's epoch by: the last one is kept")
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(config.seed)
        classifier = BreedClassifier(
            config.backbone, dataset.image_size, dataset.classes, _first_stride(dataset.image_size), config.pretrained
        )
        classifier.to(memory_format=torch.channels_last).to(target)
        log, weights, best = _fit(classifier, images.to(target), labels.to(target), val_images, val_labels, config, on_log, stop)
    classifier.load_state_dict(weights)

    test_images, test_labels = load_split(dataset, "test")
    report = report_on(predict(classifier, test_images).argmax(1), test_labels, labels, dataset.classes)
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
    path = folder / "classifier.safetensors"
    step = best["epoch"] * math.ceil(len(labels) / config.batch_size)
    header = {
        "kind": "classifier",
        "backbone": config.backbone,
        "image_size": dataset.image_size,
        "classes": list(dataset.classes),
        "first_stride": classifier.first_stride,
        "step": step,
        "facts": facts,
    }
    write_safetensors(path, weights, header)
    checkpoint = Weights(path=path, sha256=sha256_of(path), kind="classifier", step=step, facts=facts)
    conditions = {
        "config": config.model_dump(mode="json"),
        "dataset": dataset.content,
        "train_images": len(labels),
        "val_images": len(val_labels),
        "test_images": len(test_labels),
    }
    made = {"key": key, "checkpoint": checkpoint.model_dump(mode="json", exclude={"path"})}
    write_json(folder / "report.json", {**report, "conditions": conditions, "epochs": log, "made": made})
    return checkpoint


def load_classifier(path: Path, device: str | torch.device = "cpu") -> BreedClassifier:
    """Build the network of a classifier file, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or its weights do not fit its own header.
    """
    tensors, header = read_safetensors(path, "classifier")
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights, which are thrown away, must not cost random numbers
            classifier = BreedClassifier(*(header[k] for k in ("backbone", "image_size", "classes", "first_stride")))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a header that this version cannot read: {error!r}. Train anew.") from None
    load_strictly(classifier, tensors, path)
    return classifier.to(device).eval()


@torch.inference_mode()
def predict(classifier: BreedClassifier, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return logits on the CPU, (N, classes), of uint8 images (N, 3, S, S)."""
    classifier.eval()
    device = classifier.mean.device
    return torch.cat([classifier(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, turn (±8°), shift (±8 %) and scale (±10 %) each image: uint8 (N, 3, S, S) to float in 0 to 255."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    angle, scale = draw(-0.14, 0.14), draw(0.9, 1.1)
    rows = [flip * scale * angle.cos(), -scale * angle.sin(), draw(-0.16, 0.16)]  # grids are 2 wide
    rows += [flip * scale * angle.sin(), scale * angle.cos(), draw(-0.16, 0.16)]
    theta = torch.stack(rows, 1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)


def report_on(predicted: Tensor, labels: Tensor, train_labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return what a classifier got right: accuracy beside the baseline, the report of each class, the confusion matrix.

    `majority_accuracy` is that of always naming the commonest training class; `macro_recall` and `macro_f1` are means over the
    classes that have images here (recall of the majority baseline: 1 / their number); `classes` holds precision, recall, F1 and
    support of each class, `confusion` a row a true class and a column a named one. 0/0 is None.
    """
    count = len(classes)
    confusion = torch.bincount(labels * count + predicted, minlength=count * count).view(count, count)
    hits, support, named = confusion.diagonal().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    commonest = int(torch.bincount(train_labels, minlength=count).argmax())
    rows = [
        {
            "class": classes[i],
            "precision": _ratio(hits[i], named[i]),
            "recall": _ratio(hits[i], support[i]),
            "f1": _ratio(2 * hits[i], named[i] + support[i]),
            "support": support[i],
        }
        for i in range(count)
    ]
    seen = [row for row in rows if row["support"]]
    return {
        "accuracy": _ratio(sum(hits), len(labels)),
        "majority_accuracy": _ratio(support[commonest], len(labels)),
        "macro_recall": _ratio(sum(row["recall"] for row in seen), len(seen)),
        "macro_f1": _ratio(sum(row["f1"] for row in seen), len(seen)),
        "classes": rows,
        "confusion": confusion.tolist(),
    }


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _fit(
    classifier: BreedClassifier,
    images: Tensor,
    labels: Tensor,
    val_images: Tensor,
    val_labels: Tensor,
    config: ClassifierConfig,
    on_log: Callable[[dict[str, Any]], None] | None,
    stop: Stop | None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Any]]:
    """Train all epochs. Returns the log, the weights of the chosen epoch (on the CPU) and its row of the log."""
    device = images.device
    class_weights = torch.bincount(labels, minlength=len(classifier.classes)).float() ** -config.balance
    class_weights = class_weights / class_weights.mean()
    steps = math.ceil(len(labels) / config.batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(steps * config.epochs, 2))
    autocast = pick_precision("auto", device)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    log: list[dict[str, Any]] = []
    weights: dict[str, Tensor] = {}
    best: dict[str, Any] = {}
    for epoch in range(1, config.epochs + 1):
        started, losses, rate = time.perf_counter(), [], config.lr
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        classifier.train()
        for batch in torch.randperm(len(labels), generator=generator).tensor_split(steps):  # none of a single image
            if stop and stop.requested:
                raise TrainingError(f"stopped in epoch {epoch} of {config.epochs}; run the same command to train anew")
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                logits = classifier(augment(images[batch], generator))
            loss = F.cross_entropy(logits.float(), labels[batch], class_weights, label_smoothing=0.05)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            losses.append(loss.detach())
        logits = predict(classifier, val_images) if len(val_labels) else None
        row = {
            "epoch": epoch,
            "epochs": config.epochs,
            "loss": torch.stack(losses).mean().item(),
            "val_loss": None if logits is None else F.cross_entropy(logits, val_labels).item(),
            "val_accuracy": None if logits is None else (logits.argmax(1) == val_labels).double().mean().item(),
            "lr": rate,
            "images_per_s": len(labels) / (time.perf_counter() - started),
        }
        if not (math.isfinite(row["loss"]) and math.isfinite(row["val_loss"] or 0)):
            raise TrainingError(
                f"the classifier's loss is {row['loss']} (validation: {row['val_loss']}) after epoch {epoch}; "
                f"it must be finite. Lower classifier.lr, which is {config.lr}."
            )
        log.append(row)
        if on_log:
            on_log(row)
        if not best or logits is None or (row["val_accuracy"], -row["val_loss"]) > (best["val_accuracy"], -best["val_loss"]):
            best = row
            weights = {name: tensor.detach().cpu().clone() for name, tensor in classifier.state_dict().items()}
    return log, weights, best


def _finished(folder: Path, key: str) -> Weights:
    """Return the classifier that a finished folder holds, if it was made from the same data and configuration."""
    made = read_json(folder / "report.json")["made"]
    if made["key"] != key:
        raise CheckpointError(
            f"{folder} holds a classifier of other data or another configuration. Give another folder, or delete it."
        )
    return Weights(path=folder / "classifier.safetensors", **made["checkpoint"]).verify()


def _first_stride(image_size: int) -> int:
    """Return 1 for thumbnails, of which torchvision's own stride of 2 would leave a single pixel a layer too early."""
    return 1 if image_size < 32 else 2


def _torchvision_network(backbone: str, pretrained: bool) -> nn.Module:
    from torchvision.models import get_model

    try:
        return get_model(backbone, weights="DEFAULT" if pretrained else None, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no such page, or a file that does not match its hash
        raise TrainingError(
            f"the ImageNet weights of {backbone} cannot be downloaded ({error}). Set classifier.pretrained to false, "
            f"or put torchvision's file into {torch.hub.get_dir()}/checkpoints."
        ) from None
