"""The Hub on the loopback, undone with the test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployments.fake_hub import TOKEN as TOKEN
from deployments.fake_hub import Hub as Hub
from deployments.fake_hub import serve_hub


@contextmanager
def loopback_hub(monkeypatch: pytest.MonkeyPatch, home: Path, xet: bool = False) -> Iterator[Hub]:
    """Serve a Hub; what the test has set with `monkeypatch` is undone first."""
    with serve_hub(home, xet) as hub:
        try:
            yield hub
        finally:
            monkeypatch.undo()
