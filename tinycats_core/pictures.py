"""Pictures that people look at: contact sheets of images, the loss curve, and the confusion matrix."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contact_sheet(
    images: Tensor, labels: Tensor, classes: Sequence[str], per_class: int = 8, scale: int = 1, captions: Sequence[str] = ()
) -> Image.Image:
    """Lay out the first images of each class, a row a class with its name at the left.

    Args:
        images: uint8 (N, 3, H, W).
        scale: whole number by which each pixel is enlarged.
        captions: of the parts that each image consists of, from left to right; above every column.
    """
    height, width = (side * scale for side in images.shape[-2:])
    gap, name_width, head = 2, 130, 20 if captions else 0
    shown = [label for label in range(len(classes)) if (labels == label).any()]
    sheet = Image.new("RGB", (name_width + per_class * (width + gap), head + len(shown) * (height + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for column in range(per_class):
        for part, caption in enumerate(captions):
            middle = name_width + column * (width + gap) + width * (part + 0.5) / len(captions)
            pen.text((middle, head / 2), caption, "black", font, anchor="mm")
    for row, label in enumerate(shown):
        top = head + row * (height + gap)
        pen.text((6, top + height / 2), classes[label].replace("_", " "), "black", font, anchor="lm")
        for column, image in enumerate(images[labels == label][:per_class]):
            sheet.paste(to_pil(image, scale), (name_width + column * (width + gap), top))
    return sheet


def to_pil(image: Tensor, scale: int = 1) -> Image.Image:
    """Return a picture of one uint8 image (3, S, S), each pixel enlarged to scale × scale."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def first_of_each_class(labels: Tensor, per_class: int) -> Tensor:
    """Return the indices of the first `per_class` entries of each class, in order of class."""
    return torch.cat([torch.nonzero(labels == label).flatten()[:per_class] for label in labels.unique()])


def loss_curve(log: Sequence[dict[str, Any]]) -> Image.Image:
    """Draw the training loss over steps from the rows of a training log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in log], [row["loss"] for row in log], linewidth=1.2)
    axes.set(xlabel="step", ylabel="flow-matching loss (velocity MSE)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    return _drawn(figure)


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """Draw how many images of each class (a row) were put into each class (a column), shaded by their share of the row."""
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    names = [name.replace("_", " ") for name in classes]
    figure = Figure(figsize=(2.2 + 0.42 * len(names), 1.8 + 0.36 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)  # a class without images stays white
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="class that was named", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, column in np.argwhere(counts):
        colour = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    return _drawn(figure)


def _drawn(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
