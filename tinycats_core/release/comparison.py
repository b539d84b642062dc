"""Two releases side by side: their figures, and pictures that both draw from the same noise."""

import base64
import html
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from tinycats_core.errors import printable
from tinycats_core.pictures import contact_sheet
from tinycats_core.release import contents
from tinycats_core.release.card_words import ENDINGS, METRICS
from tinycats_core.release.cats import Cats
from tinycats_core.release.contents import read

PICTURES = 6  # of each class
ERRORS = 2.0  # standard errors of a difference within which neither release is called better
OWN = {"guidance", "guidance_interval", "drawn_by", "device", "conditions_hash", "trivial_kid", "trivial_accuracy", "left_out"}


@dataclass(frozen=True)
class Row:
    """A figure of both releases. `better` is 0 or 1, the release that is; None if neither is, or if it cannot be told."""

    metric: str
    values: tuple[float | None, float | None]
    difference: float | None
    better: int | None
    meaning: str

    def of(self, group: str) -> "Row":
        """Return the row under the name of a further group."""
        return replace(self, metric=f"{self.metric} of {printable(group, 20)}")


@dataclass(frozen=True)
class Comparison:
    """What two releases have in common and what not. `obstacles` are the conditions that differ: none if they compare."""

    names: tuple[str, str]
    rows: tuple[Row, ...]
    obstacles: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as a JSON value."""
        rows = [
            {"metric": row.metric, "values": row.values, "difference": row.difference, "better": row.better} for row in self.rows
        ]
        return {"releases": self.names, "comparable": not self.obstacles, "obstacles": self.obstacles, "figures": rows}


def compare(first: Cats, second: Cats) -> Comparison:
    """Compare what was measured of two releases when they were made. Raises RegistryError for figures of another form."""
    a, b = (read(cats.release.folder, "metrics.json", contents.Metrics).candidate for cats in (first, second))
    mine, theirs = a.conditions, b.conditions
    differ = sorted(key for key in {*mine, *theirs} - OWN if mine.get(key) != theirs.get(key))
    obstacles = tuple(f"{key}: {_brief(mine.get(key))} and {_brief(theirs.get(key))}" for key in differ)
    rows = _rows(a.metrics, b.metrics, not obstacles)
    groups = {group.name: group.metrics for group in b.groups}
    for group in a.groups:
        if group.name in groups:
            rows += [row.of(group.name) for row in _rows(group.metrics, groups[group.name], not obstacles)]
    return Comparison((_title(first), _title(second)), tuple(rows), obstacles)


def page(comparison: Comparison, first: Cats, second: Cats, seed: int = 0) -> str:
    """Return a comparison as one HTML file with the pictures in it: of the classes that both have, from the same noise."""
    shared = [name for name in first.classes if name in second.classes]
    names = [html.escape(name) for name in comparison.names]
    body = [f"<h1>{names[0]} <small>and</small> {names[1]}</h1>"]
    if comparison.obstacles:
        listed = "".join(f"<li>{html.escape(line)}</li>" for line in comparison.obstacles)
        body.append(f"<p class=warning>Not comparable: measured on other data or under other conditions.</p><ul>{listed}</ul>")
    cells = "".join(_html_row(row) for row in comparison.rows)
    heads = "".join(f"<th>{name}</th>" for name in ("figure", *names, "second − first", "better", "meaning"))
    body.append(f"<table><tr>{heads}</tr>{cells}</table>")
    body.append(f"<p>Pictures of the classes that both have, with the guidance of each release{_noise(first, second, seed)}.</p>")
    sheets = [(name, _sheet(cats, shared, seed)) for name, cats in zip(names, (first, second), strict=True) if shared]
    figures = "".join(f'<figure><figcaption>{name}</figcaption><img alt="" src="{uri}"></figure>' for name, uri in sheets)
    body.append(f"<div class=sheets>{figures}</div>")
    return PAGE.format(title=" and ".join(names), body="\n".join(body))


def _rows(a: Mapping[str, float | None], b: Mapping[str, float | None], comparable: bool) -> list[Row]:
    return [_row(name, a, b, comparable) for name in {**a, **b} if not name.endswith(tuple(ENDINGS))]


def _row(name: str, a: Mapping[str, float | None], b: Mapping[str, float | None], comparable: bool) -> Row:
    x, y = a.get(name), b.get(name)
    meaning = METRICS.get(name) or METRICS.get(name.split("_")[0], "")
    difference = None if x is None or y is None else y - x
    better = None
    if comparable and difference and ("lower is better" in meaning or "higher is better" in meaning):
        error = math.hypot(a.get(f"{name}_drawn_std") or 0, b.get(f"{name}_drawn_std") or 0)
        if abs(difference) > ERRORS * error:
            better = int((difference > 0) == ("higher is better" in meaning))
    return Row(name, (x, y), difference, better, meaning)


def _title(cats: Cats) -> str:
    return f"{cats.release.name} {cats.release.version}"


def _brief(value: Any) -> str:
    text = printable(value, 80)
    return text[:12] + "…" if len(text) == 64 and text.isalnum() else text


def figure(value: float | None, signed: bool = False) -> str:
    """Return a figure with four significant digits, or a dash."""
    return "–" if value is None else f"{value:+.4g}" if signed and value else f"{value:.4g}"


def _html_row(row: Row) -> str:
    values = [f"<td class={'better' if row.better == i else 'value'}>{figure(value)}</td>" for i, value in enumerate(row.values)]
    better = "" if row.better is None else ("first", "second")[row.better]
    rest = (figure(row.difference, signed=True), better, row.meaning)
    cells = "".join(f"<td>{html.escape(text)}</td>" for text in rest)
    return f"<tr><th>{html.escape(row.metric)}</th>{''.join(values)}{cells}</tr>"


def _noise(first: Cats, second: Cats, seed: int) -> str:
    if first.image_size == second.image_size:
        return f", from the same noise (seed {seed})"
    return f" (seed {seed}; the noise is not the same, because one draws {first.image_size} and one {second.image_size} px)"


def _sheet(cats: Cats, classes: list[str], seed: int) -> str:
    """Draw each class from the same noise, and return the sheet as a data URI."""
    drawn = [np.asarray(picture) for name in classes for picture in cats.sample(name, PICTURES, seed)]
    labels = np.repeat(np.arange(len(classes)), PICTURES)
    sheet = contact_sheet(np.stack(drawn).transpose(0, 3, 1, 2), labels, classes, PICTURES, max(1, 64 // cats.image_size))
    return _data_uri(sheet)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h1 small {{ font-weight: normal; color: #666 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top }}
tr > :nth-child(n+2):nth-child(-n+4) {{ font-variant-numeric: tabular-nums }}
.better {{ font-weight: bold; color: #0a6b2d }}
.warning {{ background: #fff3cd; border-left: 4px solid #d39e00; padding: .5rem 1rem }}
.sheets {{ display: flex; flex-wrap: wrap; gap: 1.5rem }} figure {{ margin: 0 }} figcaption {{ font-weight: bold }}
img {{ max-width: 100%; image-rendering: pixelated }}
</style></head><body>
{body}
</body></html>
"""
