"""Pictures that people look at: contact sheets of images, the loss curve, and the confusion matrix."""

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    Array = Tensor | np.ndarray

LONGEST, LONGEST_FILE = 28, 64  # characters of a class name on a picture, and in a file name
# Names of other files in a folder of sheets, and those that Windows keeps for itself.
RESERVED = {"grid", "neighbours", "ema_and_raw", "metadata", "con", "prn", "aux", "nul"}
RESERVED |= {f"{device}{number}" for device in ("com", "lpt") for number in range(10)}


def contact_sheet(
    images: "Array", labels: "Array", classes: Sequence[str], per_class: int = 8, scale: int = 1, captions: Sequence[str] = ()
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
        pen.text((6, top + height / 2), _fitted(legible(classes[label]), name_width - 12, font), "black", font, anchor="lm")
        for column, image in enumerate(images[labels == label][:per_class]):
            sheet.paste(to_pil(image, scale), (name_width + column * (width + gap), top))
    return sheet


def legible(name: str) -> str:
    """Return a class name in ASCII, which every font has: other letters transliterated, symbols by their Unicode names."""
    text = unicodedata.normalize("NFC", name.replace("_", " "))
    return " ".join("".join(char if char.isascii() else _spelled(char) for char in text).split()) or (name and "?")


def sheet_names(classes: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each class: safe on every system, and none equal to another but for case."""
    taken, names = set(RESERVED), []
    for name in classes:
        plain = name if name.isascii() else legible(name)
        base = re.sub(r"[^\w.-]+", "_", plain, flags=re.ASCII).strip("._-")[:LONGEST_FILE] or "class"
        numbered = (f"{base}-{number}" for number in itertools.count(2))
        chosen = base if base.lower() not in taken else next(other for other in numbered if other.lower() not in taken)
        taken.add(chosen.lower())
        names.append(chosen)
    return names


def _spelled(char: str) -> str:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):  # marks on letters, and what joins emoji
        return ""
    try:
        from text_unidecode import unidecode
    except ImportError:  # on a bare GPU machine
        return char.encode("unicode_escape").decode()
    return unidecode(char) or f" {unicodedata.name(char, '?').lower()} "


def _shortened(text: str, longest: int) -> str:
    """Cut a text in its middle to at most `longest` characters."""
    if len(text) <= longest:
        return text
    kept = max(longest - 3, 2)
    return f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"


def _fitted(text: str, width: int, font: Any) -> str:
    """Cut a text in its middle until it is at most `width` pixels wide."""
    longest = min(len(text), LONGEST)
    while font.getlength(_shortened(text, longest)) > width and longest > 5:
        longest -= 1
    return _shortened(text, longest)


def to_pil(image: "Array", scale: int = 1) -> Image.Image:
    """Return a picture of one uint8 image (3, S, S), each pixel enlarged to scale × scale."""
    picture = Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def first_of_each_class(labels: "Tensor", per_class: int) -> "Tensor":
    """Return the indices of the first `per_class` entries of each class, in order of class."""
    import torch

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


def course(rows: Sequence[Mapping[str, Any]], kid: str, bars: Mapping[str, float]) -> Image.Image:
    """Draw KID and the copy rates over the steps of a training, from the first row of each step of its sweep.

    Args:
        kid: the name of the KID.
        bars: the highest copy rates that could be chosen, by name.
    """
    from matplotlib.figure import Figure

    snapshots = sorted({row["step"]: row for row in reversed(rows)}.values(), key=lambda row: row["step"])
    steps, chosen = [row["step"] for row in snapshots], [row["step"] for row in rows if row["chosen"]]
    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(steps, [row[kid] for row in snapshots], marker="o", markersize=3.5)
    above.set(ylabel=kid)
    for (name, bar), color in zip(bars.items(), ("tab:red", "tab:purple"), strict=True):
        below.plot(steps, [row[name] for row in snapshots], marker="o", markersize=3.5, color=color, label=name)
        below.axhline(bar, color=color, linewidth=1, linestyle="--", label="its bar")
    below.legend(loc="upper left", frameon=False)
    below.set(xlabel="step", ylabel="share of copies", ylim=(-0.02, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        for step in chosen:
            axes.axvline(step, color="tab:green", linewidth=1)
    return _drawn(figure)


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """Draw how many images of each class (a row) were put into each class (a column), shaded by their share of the row."""
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    names = [_shortened(legible(name), LONGEST) for name in classes]
    figure = Figure(figsize=(2.2 + 0.42 * len(names), 1.8 + 0.36 * len(names)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    share = counts / counts.sum(axis=1, keepdims=True).clip(1)  # a class without images stays white
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="class that was named", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    for row, column in np.argwhere(counts):
        colour = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8, color=colour)
    return _drawn(figure)


def _drawn(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
