"""The sources of the page: HTML, style and scripts, as text."""

from pathlib import Path


def read(name: str) -> str:
    """Return a file of this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
