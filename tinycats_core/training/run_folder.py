"""A training's folder: its identity, checkpoints, log and diary, locked by one process at a time."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from tinycats_core.errors import CheckpointError, TrainingError
from tinycats_core.files import write_text
from tinycats_core.tensors import read_header, read_safetensors, write_safetensors

logger = logging.getLogger("tinycats.training")

CHECKPOINTS_KEPT = 5

# What may differ between a checkpoint and the run that resumes from it: how often to look, and how to fit into memory.
FREE = frozenset(
    {
        *("checkpoint_every", "sample_every", "log_every", "max_skipped_steps"),
        *("accumulation", "gradient_checkpointing", "compile"),
        *("stop_at", "patience"),
    }
)
UNEXPLAINED = "no cause recorded: killed, or the machine went down"


@dataclass(frozen=True)
class RunFolder:
    """The files of one training run, below `path`."""

    path: Path

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder until this ends or the process dies. Raises TrainingError if another process holds the lock."""
        lock = FileLock(self.path / ".lock", blocking=False, fallback_to_soft=False)  # a soft lock would survive a kill -9
        try:
            lock.acquire()
        except Timeout:
            raise TrainingError(f"another process trains in {self.path}; wait for it, or stop it") from None
        except OSError:
            logger.warning("%s cannot be locked on this file system: make sure that nothing else trains in it", self.path)
        try:
            for leftover in self.leftovers():
                leftover.unlink()
            yield
        finally:
            lock.release()

    def leftovers(self) -> list[Path]:
        """Return the temporary files of a process that was killed while it wrote: ours, and those of safetensors."""
        return [
            path for folder in (self.path, self.checkpoints_folder) for name in (".*.tmp", ".tmp*") for path in folder.glob(name)
        ]

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Write the identity of the run to run.json; refuse the folder of another run.

        Raises:
            CheckpointError: the model, the data set or a setting that decides the result differs; names each.
        """
        path = self.path / "run.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            require_same(found, identity, f"{self.path} holds another run", "Use another folder or delete it.")
            if found == identity:
                return
        write_text(path, json.dumps(identity, indent=2) + "\n")

    @property
    def checkpoints_folder(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        return sorted(self.checkpoints_folder.glob("step-*.safetensors"), reverse=True)

    def newest(self, at_most: int, tell: bool = True) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """Return path, tensors and header of the newest undamaged checkpoint. Damaged ones are skipped with a warning.

        Args:
            at_most: the last step of the training: a checkpoint of a later one belongs to a longer training.
            tell: record damaged ones in the diary.
        """
        paths = [path for path in self.checkpoints() if _step_of(path) <= at_most]
        for path in paths:
            try:
                return path, *read_safetensors(path, "training")
            except CheckpointError as error:
                logger.warning("%s %s", error, "Starting anew." if path == paths[-1] else "Using the one before.")
                if tell:
                    self.note("damaged", _step_of(path), file=path.name)
        return None

    def keep(self, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then remove all but the last five. Raises TrainingError, and then keeps the last good one."""
        path = self.checkpoints_folder / f"step-{step:08d}.safetensors"
        try:
            write_safetensors(path, tensors, {"kind": "training", "step": step, **header})
        except OSError as error:
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {path.parent}: {error}. Free space and run "
                f"the same command: it resumes from {self.last_good()}."
            ) from None
        for old in self.checkpoints()[CHECKPOINTS_KEPT:]:
            old.unlink()
        return path

    def last_good(self) -> str:
        """Return the name of the newest checkpoint, or `the start`."""
        return next((path.name for path in self.checkpoints()), "the start")

    def log(self) -> list[dict[str, Any]]:
        """Return the rows of the log, without a line that a killed process left half written."""
        return _read_lines(self.path / "log.jsonl")

    def append_to_log(self, row: Mapping[str, Any]) -> None:
        _append_line(self.path / "log.jsonl", row)

    def cut_log(self, step: int) -> None:
        """Remove the rows after a step: they will be written again."""
        rows = [row for row in self.log() if row["step"] <= step]
        write_text(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def diary(self) -> list[dict[str, Any]]:
        """Return the rows of the diary: each start, stop and incident, with its time, step and cause."""
        return _read_lines(self.path / "diary.jsonl")

    def note(self, event: str, step: int, **facts: Any) -> None:
        """Append a row to the diary. A full disk is only worth a warning."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            _append_line(self.path / "diary.jsonl", {"time": now, "event": event, "step": step, **facts})
        except OSError as error:
            logger.warning("the diary could not be written: %s", error)

    def open_attempt(self, step: int, source: str | None, facts: Mapping[str, Any]) -> None:
        """Write the diary's row of a start, and before it the stop of an earlier attempt that was killed.

        Args:
            source: the checkpoint that the run resumes from, None for the start.
        """
        rows = self.diary()
        attempts = sum(row["event"] in ("start", "resume") for row in rows)
        if not rows or not attempts:
            self.note("start", step, attempt=1, **({"from": source} if source else {}), **facts)
            return
        seen, alive = self._last_sign()
        opened = next(row for row in reversed(rows) if row["event"] in ("start", "resume", "stop", "finish"))
        if opened["event"] in ("start", "resume"):
            seconds = max(0.0, alive - datetime.fromisoformat(opened["time"]).timestamp())
            steps = max(0, seen - opened["step"])
            self.note("stop", max(seen, opened["step"]), cause=UNEXPLAINED, steps=steps, seconds=round(seconds, 3))
        steps_lost = max(0, seen - step)
        kept = self.checkpoints_folder / (source or "")
        lost = max(0.0, alive - kept.stat().st_mtime) if steps_lost and source and kept.is_file() else 0.0
        self.note(
            "resume", step, attempt=attempts + 1, **{"from": source}, steps_lost=steps_lost, seconds_lost=round(lost, 3), **facts
        )

    def close(self, step: int, batch_size: int, steps: int, seconds: float, facts: Mapping[str, Any]) -> None:
        """Write the diary's last row: seconds, images and images/s over all attempts, and what was lost between them."""
        rows = self.diary()
        last = max((number for number, row in enumerate(rows) if row["event"] == "finish"), default=-1)
        stops = [row for row in rows[last + 1 :] if row["event"] == "stop"]
        seconds += sum(row["seconds"] for row in stops)
        images = batch_size * (steps + sum(row["steps"] for row in stops))
        if last >= 0:  # of a shorter training, which this one continued
            seconds, images = seconds + rows[last]["seconds"], images + rows[last]["images"]
        self.note(
            "finish",
            step,
            attempts=sum(row["event"] in ("start", "resume") for row in rows),
            seconds=round(seconds, 3),
            seconds_lost=round(sum(row.get("seconds_lost", 0) for row in rows), 3),
            images=images,
            images_per_s=round(images / seconds, 1) if seconds else None,
            **facts,
        )

    def _last_sign(self) -> tuple[int, float]:
        """Return the last step in the log, and when it was written."""
        path = self.path / "log.jsonl"
        rows = self.log()
        return (rows[-1]["step"] if rows else 0), (path.stat().st_mtime if path.is_file() else time.time())


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, advice: str, free: frozenset[str] = FREE) -> None:
    """Raise CheckpointError naming each setting in which a checkpoint differs from a run. More steps are fine."""
    different = [
        f"{part}.{field} is {found[part].get(field)!r} there and {wanted[part].get(field)!r} here"
        for part in ("model", "train")
        for field in wanted[part].keys() | found[part].keys()
        if found[part].get(field) != wanted[part].get(field) and not (part == "train" and field in free | {"steps"})
    ]
    if (there := found["train"]["steps"]) > (here := wanted["train"]["steps"]):
        different.append(f"train.steps is {there} there and {here} here, and a run can be lengthened but not shortened")
    if (made_by := found.get("code")) != wanted["code"]:
        there = made_by[:12] if made_by else "of an earlier version of tinycats"
        different.append(f"the code of the training is {there} there and {wanted['code'][:12]} here")
    if found["dataset"] != wanted["dataset"]:
        different.append(f"the data set is {found['dataset'][:12]} there and {wanted['dataset'][:12]} here")
    if different:
        raise CheckpointError(f"{what}: {'; '.join(sorted(different))}. {advice}")


def find_checkpoint(path: Path) -> Path:
    """Return the training checkpoint at a path, or the newest one of a training's folder.

    Raises:
        CheckpointError: there is none, or the file is not a training checkpoint.
    """
    path = Path(path)
    try:
        candidates = RunFolder(path).checkpoints() or sorted(path.glob("step-*.safetensors"), reverse=True)
        found = path if path.is_file() else next(iter(candidates), None)
        what = "holds no checkpoint" if path.is_dir() else "does not exist"
    except OSError as error:
        found, what = None, f"cannot be read ({error.strerror})"
    if found is None:
        raise CheckpointError(
            f"train.resume_from is {path}, which {what}. Give a training's folder or one of its checkpoints, or leave it out "
            "to start anew."
        )
    read_header(found, "training")
    return found


def code_of_checkpoint(path: Path) -> str | None:
    """Return the digest of the code that a checkpoint belongs to; None if it is of before there was one. Raises CheckpointError."""
    return read_header(find_checkpoint(path), "training")["identity"].get("code")


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a JSON line, on a line of its own also after one that a killed process left half written."""
    with open(path, "ab+") as file:
        end = file.seek(0, 2)
        file.seek(max(0, end - 1))
        broken = end > 0 and file.read(1) != b"\n"
        file.write(b"\n" * broken + json.dumps(row, allow_nan=False).encode() + b"\n")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a training folder's log."""
    return RunFolder(folder).log()
