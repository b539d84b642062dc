"""The CSV file data.boxes: a box around the subject of each photo of a folder."""

import csv
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from tinycats_core.data.crop import Box
from tinycats_core.data.layout import storable
from tinycats_core.errors import NAMED, DataError, printable

EDGES = ("left", "top", "right", "bottom")
COLUMNS = ("file", *EDGES)
MAX_BYTES = 1 << 28


def read_boxes(path: Path, files: Iterable[str]) -> dict[str, Box]:
    """Return {file: box}, of a CSV file whose rows name some of the `files`, each once, below data.folder.

    The columns are file, left, top, right and bottom, in pixels of the upright photo; others are ignored. Whether a box lies
    inside its photo shows when that is decoded.

    Raises:
        DataError: the file cannot be read, lacks a column, or rows of it are wrong; it names rows, values and what to do.
    """
    known, boxes, wrong = set(files), dict[str, Box](), list[str]()
    for number, row in _rows(path):
        name, where = storable(PurePosixPath(row["file"] or "").as_posix()), f"row {number}"
        try:
            if name not in known:
                raise ValueError("there is no such file in data.folder")
            if name in boxes:
                raise ValueError(f"it has a box already in {boxes[name].where}")
            boxes[name] = _box(row, where)
        except ValueError as error:
            wrong.append(f"{where} ({printable(name)}): {error}")
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DataError(f"data.boxes {_shown(path)}: {'; '.join(wrong[:NAMED])}{more}. Correct or delete these rows.")
    if not boxes:
        raise DataError(f"data.boxes {_shown(path)} has no rows. Add a row for each photo, or set data.crop to 'centre'.")
    return boxes


def _rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    """Return each row with the number of its line."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"data.boxes {_shown(path)} has more than {MAX_BYTES >> 20} MB. Give the CSV file with the boxes.")
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                columns = f"the columns {', '.join(COLUMNS)} are needed, separated by commas"
                raise DataError(f"data.boxes {_shown(path)} has no column {', '.join(missing)}; {columns}. Add the heading.")
            return [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"cannot read data.boxes {_shown(path)}: {error.strerror}. Give the CSV file with the boxes.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"data.boxes {_shown(path)} is not a CSV file in UTF-8 ({error}). Export it again.") from None


def _box(row: dict[str, str | None], where: str) -> Box:
    left, top, right, bottom = (_number(name, row[name]) for name in EDGES)
    if left >= right or top >= bottom:
        ends = ("left", left, "right", right) if left >= right else ("top", top, "bottom", bottom)
        raise ValueError("the box is empty: {} {:g} is not less than {} {:g}".format(*ends))
    return Box(left, top, right, bottom, where)


def _number(name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} is {printable(text or 'empty', 40)!r}, not a number")
    return value


def _shown(path: Path) -> str:
    return storable(str(path))
