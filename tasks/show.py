"""What a run shows in Prefect's pages. Outside a run there is no page, and nothing is shown."""

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from PIL import Image
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event

from tinycats_core import progress as bars

if TYPE_CHECKING:
    import pandas as pd

    from tinycats_core.records import FidelityReport

LARGEST_PICTURE = 300_000  # bytes: a picture is kept in the server's database


def table(key: str, frame: "pd.DataFrame", description: str) -> None:
    """Show a data frame; what is not a number becomes empty."""
    if in_run():
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        create_table_artifact([{str(k): _plain(v) for k, v in row.items()} for row in rows], key, description)


def markdown(key: str, text: str, description: str) -> None:
    """Show a text."""
    if in_run():
        create_markdown_artifact(text, key, description)


def link(key: str, target: str, text: str, description: str) -> None:
    """Show a link."""
    if in_run():
        create_link_artifact(target, text, key, description)


def event(name: str, of: str, facts: Mapping[str, Any]) -> None:
    """Tell Prefect's automations that something has happened to a thing, such as `tinycats.release.rejected`."""
    if in_run():
        emit_event(name, resource={"prefect.resource.id": of}, payload=dict(facts))


def picture(key: str, image: Image.Image, description: str) -> None:
    """Show a picture, made smaller until it fits into the server's database.

    A markdown artifact, because the page of an image artifact spells out the whole address beside the picture.
    """
    if in_run():
        create_markdown_artifact(f"![{description}]({data_uri(image)})", key, description)


def data_uri(image: Image.Image) -> str:
    """Return a picture as a data URI of at most LARGEST_PICTURE bytes: WebP, a fifth of PNG, so that most keep their size."""
    while True:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="WEBP", quality=90)
        uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(uri) <= LARGEST_PICTURE:
            return uri
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)


def progress(key: str, description: str, on_terminal: bool = True) -> Callable[[float, str], None]:
    """Return a function of (fraction, note) that moves a progress bar on the run's page, at most once a percent.

    Args:
        on_terminal: move one on the terminal as well, if there is a terminal.
    """
    bar = bars.fractions(description) if on_terminal else lambda fraction, note: None
    if not in_run():
        return bar
    artifact = cast(UUID, create_progress_artifact(0.0, key, description))
    shown = 0

    def update(fraction: float, note: str = "") -> None:
        nonlocal shown
        bar(fraction, note)
        percent = int(100 * min(max(fraction, 0.0), 1.0))
        if percent > shown:
            shown = percent
            update_progress_artifact(artifact, float(percent), f"{description}: {note}" if note else description)

    return update


def in_run() -> bool:
    """Return whether a flow run or a task run is going on."""
    return (TaskRunContext.get() or FlowRunContext.get()) is not None


def metrics_frame(columns: Mapping[str, Mapping[str, float | None] | None]) -> "pd.DataFrame":
    """Put metrics side by side: a row a metric, a column for each set that has been measured."""
    import pandas as pd

    measured = {name: values for name, values in columns.items() if values is not None}
    return pd.DataFrame(measured, dtype="float64").rename_axis("metric").reset_index()


def columns_of(report: "FidelityReport", name: str) -> dict[str, Mapping[str, float | None]]:
    """Return the columns of a report: the images under their name, and real ones; then the same of each further group."""
    columns: dict[str, Mapping[str, float | None]] = {name: report.metrics, "real training images": report.floor}
    for group in report.groups:
        columns |= {f"{name}, {group.name}": group.metrics, f"real training images, {group.name}": group.floor}
    return columns


def report_frame(report: "FidelityReport", name: str) -> "pd.DataFrame":
    """Put the figures of a report side by side, group by group."""
    return metrics_frame(columns_of(report, name))


def markdown_table(frame: "pd.DataFrame") -> str:
    """Write a data frame as a markdown table, numbers with four significant digits."""

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else "" if value != value else f"{value:.4g}"

    rows = [
        list(frame.columns),
        ["---"] * frame.shape[1],
        *([cell(value) for value in row] for row in frame.to_numpy().tolist()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers into Python's, which JSON knows."""
    value = value.item() if hasattr(value, "item") else value
    return round(value, 5) if isinstance(value, float) else value
