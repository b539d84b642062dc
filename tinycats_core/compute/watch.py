"""Wait for a call on Modal: its log, outages, and its end."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tinycats_core.compute import jobs
from tinycats_core.compute.budget import Spent
from tinycats_core.compute.jobs import OnLog, run_folder
from tinycats_core.compute.modal_auth import one_line
from tinycats_core.compute.modal_client import APP, ModalClient, meaning_of
from tinycats_core.compute.volumes import read_result, read_text
from tinycats_core.config import ComputeConfig
from tinycats_core.errors import ComputeError, ModalUnreachable
from tinycats_core.files import write_json

logger = logging.getLogger("tinycats.remote")

AGAIN = "run the same command to resume from its last checkpoint"
ATTACH = "run the same command to attach to it again"


class CallEnded(ComputeError):
    """The remote call is over and there is no result."""


class KnownCall(BaseModel):
    """A call of which this machine knows, as `modal_call.json` holds it."""

    model_config = ConfigDict(frozen=True)

    run: str
    call_id: str | None = None  # None: the result was on the volume already
    made: dict[str, Any] | None = None  # the record of the weights, when they are here

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json", exclude={"made"} if self.made is None else None))


class Watch:
    """Waits for a call: passes its log on, outlasts outages, cancels it when the wait is interrupted.

    The file `state` stays only while one can still attach to the call.
    """

    def __init__(self, client: ModalClient, run: str, compute: ComputeConfig, state: Path, on_log: OnLog | None):
        self.client, self.run, self.compute, self.state, self.on_log = client, run, compute, state, on_log
        self.seen = 0
        self.heard = 0.0  # when Modal last answered
        self.waited = False  # whether Modal has said that a call runs
        self.compared = ""  # the call whose settings were compared last

    def wait(self, call_id: str) -> jobs.Finished:
        """Return the result of a call, or of the one that does its work. Raises CallEnded, ModalUnreachable or ComputeError."""
        self.heard = time.monotonic()
        try:
            while True:
                match self._ask(call_id):
                    case jobs.Finished() as result:
                        return result
                    case jobs.Failed(error=message):
                        raise CallEnded(f"training on Modal ended: {message}")
                    case jobs.DoneElsewhere(call_id=call_id):
                        KnownCall(run=self.run, call_id=call_id).write(self.state)
                        logger.info("call %s does this training already: attached to it", call_id)
        except CallEnded:
            self.state.unlink(missing_ok=True)  # another flow may have waited as well
            raise
        except Exception:
            logger.warning("nobody watches call %s now: it continues there, %s", call_id, ATTACH)
            raise
        except BaseException:
            try:
                self.client.cancel(call_id)
                self.state.unlink(missing_ok=True)
            except Exception as error:
                logger.error("call %s could not be cancelled (%s); run `modal app stop %s`", call_id, one_line(error), APP)
            raise

    def _ask(self, call_id: str) -> jobs.Result | None:
        """Return the result of the call; None while it runs, or while Modal may still answer."""
        try:
            result = self._poll(call_id)
            self._pass_on(call_id)
        except ModalUnreachable as error:
            minutes = (time.monotonic() - self.heard) / 60
            if minutes >= self.compute.patience_minutes:
                raise
            logger.warning("%s; trying again for up to %.0f minutes", error, self.compute.patience_minutes - minutes)
            time.sleep(min(self.compute.poll_seconds, 60 * (self.compute.patience_minutes - minutes)))
            return None
        self.heard = time.monotonic()
        return result

    def _poll(self, call_id: str) -> jobs.Result | None:
        try:
            return self.client.poll(call_id, self.compute.poll_seconds)
        except Exception as error:
            meaning, said = meaning_of(error), one_line(error)
        match meaning:
            case "running":
                self.waited = True
                return None
            case "silent":
                raise ModalUnreachable(f"Modal does not answer ({said}); call {call_id} continues there, {ATTACH}")
            case "refused":
                raise ComputeError(f"Modal refuses ({said}); call {call_id} continues there, {ATTACH}")
            case "forgotten":
                if (result := read_result(self.client, self.run)) is not None:
                    return result
                raise CallEnded(f"Modal no longer knows the result of call {call_id}; {AGAIN}")
            case "too long":
                tries, hours = self.compute.retries + 1, self.compute.timeout_hours
                raise CallEnded(
                    f"training on Modal was stopped after {tries} attempts of {hours:g} h each (compute.timeout_hours); {AGAIN}"
                )
        if "memory" in said.lower():
            advice = "its container had too little memory; ask for a larger compute.gpu, or for less data or a smaller model"
            raise CallEnded(f"training on Modal failed: {said}: {advice}")
        raise CallEnded(f"training on Modal failed: {said}; see `modal app logs {APP}`, then {AGAIN}")

    def _pass_on(self, call_id: str) -> None:
        """Pass on the new rows of the log, which is cut back when a preempted attempt resumes."""
        folder = run_folder(self.run)
        rows = [json.loads(line) for line in read_text(self.client, f"{folder}/log.jsonl").splitlines(True) if line.endswith("\n")]
        rows = [row for row in rows if _number(row) > self.seen]
        if not rows:
            return
        text = read_text(self.client, f"{folder}/meter.json")
        spent = Spent.model_validate_json(text) if text else None
        if spent:
            self._compare(call_id, spent)
        usd = None if spent is None or spent.usd is None else round(spent.usd, 4)
        self.seen = _number(rows[-1])
        so_far = "" if usd is None else f", ${usd:.2f} so far"
        logger.info("%d of %d on Modal%s", self.seen, rows[-1].get("steps", rows[-1].get("epochs")), so_far)
        if self.on_log is None:
            return
        try:
            for row in rows:
                self.on_log(row if usd is None else row | {"dollars": usd})
        except Exception as error:
            logger.warning("the progress could not be shown: %s", one_line(error))

    def _compare(self, call_id: str, spent: Spent) -> None:
        """Warn once if a call was started with another GPU or limit than is given now."""
        if call_id == self.compared or call_id != spent.call_id:
            return
        self.compared = call_id
        names = [name for name in ("gpu", "max_cost_usd") if getattr(spent, name) != getattr(self.compute, name)]
        if other := [f"compute.{name} {getattr(spent, name)}, not {getattr(self.compute, name)}" for name in names]:
            logger.warning("call %s was started with %s; it continues with this", call_id, " and ".join(other))


def _number(row: dict[str, Any]) -> int:
    return row["step"] if "step" in row else row["epoch"]
