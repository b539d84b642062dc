"""The training runs on this machine, and the state that each is in."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from tinycats_core.training.run_folder import RunFolder

State = Literal["finished", "running", "stopped", "unreadable"]


class RunState(NamedTuple):
    """One run: its steps so far and in all, and when it last changed (ISO 8601, UTC)."""

    folder: Path
    state: State
    step: int
    steps: int
    resumes_from: int | None  # the step of its newest checkpoint, if it is stopped
    when: str


def list_runs(folder: Path) -> list[RunState]:
    """Return the runs below a folder, the one that changed last first. Changes nothing."""
    found = [_look(RunFolder(path.parent)) for path in folder.glob("*/run.json")]
    return sorted(found, key=lambda run: run.when, reverse=True)


def _look(run: RunFolder) -> RunState:
    files = [run.path / name for name in ("run.json", "log.jsonl", "diary.jsonl")]
    changed = max(file.stat().st_mtime for file in files if file.is_file())
    when = datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds")
    try:
        train = json.loads(files[0].read_text(encoding="utf-8"))["train"]
        steps = int(train.get("stop_at") or train["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return RunState(run.path, "unreadable", 0, 0, None, when)
    rows = run.diary()
    kept = max((int(path.stem.removeprefix("step-")) for path in run.checkpoints()), default=0)
    step = max([kept, *(row["step"] for row in [*rows[-1:], *run.log()[-1:]])])
    if _is_held(run.path / ".lock"):
        return RunState(run.path, "running", step, steps, None, when)
    if rows and rows[-1]["event"] == "finish" and step >= steps:
        return RunState(run.path, "finished", step, steps, None, when)
    return RunState(run.path, "stopped", step, steps, kept, when)


def _is_held(path: Path) -> bool:
    """Return whether a process holds a lock file, which is not created."""
    if not path.exists():
        return False
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except (Timeout, OSError):  # held; on a file system without locks nobody can tell
        return True
    lock.release()
    return False
