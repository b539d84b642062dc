"""Training on Modal, seen from here: one call that outlives this process, watched, paid for, and its files verified.

What runs there is `jobs.py`, in `deployments/modal_app.py`.

Exactly one training: a run's name is made of its data and settings, and of all calls for a run only the one that has claimed
it trains (`jobs.claim`); the others name that one and end, and whoever waits for them waits for it. So a second
orchestrator, or one that was killed before it could note the call that it had started, costs a container's start and no
second training. This holds as far as Modal keeps its word that an attempt of a call begins when the one before has ended.

Command line: `python -m tinycats_core.remote prune --keep N [--dry-run]` removes old runs from the outputs volume.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tinycats_core import classifier, jobs, training
from tinycats_core.config import ClassifierConfig, ComputeConfig, ModelConfig, TrainConfig
from tinycats_core.errors import ComputeError, ModalUnreachable, TinycatsError
from tinycats_core.files import atomic_path, check_writable, digest_of, read_json, sha256_of, write_json
from tinycats_core.jobs import OnLog, data_folder, run_folder
from tinycats_core.modal_auth import one_line
from tinycats_core.modal_client import APP, DATA_VOLUME, OUTPUTS_VOLUME, ModalClient, explained, is_over, meaning_of
from tinycats_core.prices import parse_gpu, usd_per_second
from tinycats_core.records import Checkpoint, Dataset

AGAIN = "run the same command to go on from its last checkpoint"
ATTACH = "run the same command to attach to it again"

logger = logging.getLogger("tinycats.remote")


class CallEnded(ComputeError):
    """The remote call is over and there is no result."""


@dataclass(frozen=True)
class Job:
    """One training: the remote function that does it, its data and its settings."""

    function: str
    dataset: Dataset
    settings: dict[str, Any]

    @property
    def run(self) -> str:
        """The name of the training: equal for equal data and settings, so that a new call goes on from its files."""
        return digest_of([self.function, self.dataset.content, self.settings])[:16]

    def request(self, compute: ComputeConfig) -> jobs.Request:
        """Return what the remote function is given."""
        return {
            "run": self.run,
            "revision": jobs.revision(),
            "dataset": self.dataset.verify().model_dump(mode="json", exclude={"path"}),
            "device": compute.device_on_modal,
            "processes": compute.processes,
            "gpu": compute.gpu,
            "budget": _budget(compute),
            **self.settings,
        }


def generator_job(dataset: Dataset, model: ModelConfig, train: TrainConfig) -> Job:
    """Return the training of a generator."""
    settings = {"recipe": training.VERSION, "model": model.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    return Job("train_generator", dataset, settings)


def classifier_job(dataset: Dataset, config: ClassifierConfig) -> Job:
    """Return the training of a breed classifier."""
    settings = {"recipe": classifier.VERSION, "classifier": config.model_dump(mode="json")}
    return Job("train_classifier", dataset, settings)


def check_compute(compute: ComputeConfig, client: ModalClient | None = None, app_files: Sequence[Path] = ()) -> str:
    """Check before any work that Modal will train: GPU, price, credentials, and that the app is deployed as it is here.

    `app_files` are the app's own, beside this package; where they are not here they are not compared. Returns where the
    credentials come from. Raises ComputeError.
    """
    client = client or ModalClient()
    _check_gpu(compute)
    _budget(compute)
    source = client.check_credentials()
    with explained(runs_code=True):
        deployed = client.check()
    if deployed["revision"] != jobs.revision():
        raise ComputeError(f"the code deployed on Modal is {deployed['revision']}, not {jobs.revision()} as here; {jobs.DEPLOY}")
    if app_files and all(map(Path.is_file, app_files)) and deployed["app"] != jobs.digest_of_files(app_files):
        names = " or ".join(path.name for path in app_files)
        raise ComputeError(f"{names} is not here as it was deployed on Modal; {jobs.DEPLOY}")
    return source


def train_on_modal(
    job: Job, compute: ComputeConfig, folder: Path, on_log: OnLog | None = None, client: ModalClient | None = None
) -> Checkpoint:
    """Train on Modal and return the weights, as the training here would. The folder gets the files that it would get.

    The call's id is kept in `<folder>/modal_call.json` from its start on: after this process was killed, the same
    command attaches to the same call, or starts another one where it has ended without a result. An interrupt cancels the
    call; after any error here it goes on. A new call goes on from the last checkpoint on the outputs volume.

    Args:
        on_log: called with each row of the remote log, in order; `dollars` is what the GPU has cost so far. An error of its is
            only worth a warning.

    Raises:
        CallEnded: the call failed, expired, or has used up compute.max_cost_usd.
        ModalUnreachable: Modal does not answer for compute.patience_minutes; the call goes on.
        ComputeError: the call cannot be started or asked, or what it made does not arrive intact.
    """
    client = client or ModalClient()
    check_writable(folder)
    state = folder / "modal_call.json"
    call = read_json(state) if state.is_file() else {}
    if call and call["run"] != job.run:
        raise ComputeError(f"{state} belongs to another training (call {call['call_id']}); use another folder or delete that file")
    if "checkpoint" in call:
        if (checkpoint := Checkpoint.model_validate(call["checkpoint"])).is_intact():
            return checkpoint
        call = {}  # that call is over, and what it made is on the volume, or made anew
    result, watch = None, Watch(client, job.run, compute, state, on_log)
    if call:
        client.check_credentials()
        logger.info("attached to call %s, which an earlier run started", call["call_id"])
        try:
            result = _read_result(client, job.run) or watch.wait(call["call_id"])
        except CallEnded as error:
            if watch.waited:
                raise
            logger.warning("call %s was over already, so another one follows: %s", call["call_id"], error)
    if result is None:
        check_compute(compute, client)
        result = _read_result(client, job.run)
    if result is None:
        call = {"run": job.run, "call_id": _find_call(client, job) or _start_call(client, job, compute)}
        write_json(state, call)
        result = watch.wait(call["call_id"])
    for name, sha256 in result["files"].items():
        _download(client, f"{run_folder(job.run)}/{name}", folder / name, sha256)
    checkpoint = Checkpoint.model_validate(result["checkpoint"]).in_folder(folder)
    write_json(state, {"run": job.run, "call_id": call.get("call_id"), "checkpoint": checkpoint.model_dump(mode="json")})
    return checkpoint


class Watch:
    """Waiting for a call: passes its log on, outlasts outages, cancels it when the wait is interrupted.

    The file `state` is left only while the call can still be attached to.
    """

    def __init__(self, client: ModalClient, run: str, compute: ComputeConfig, state: Path, on_log: OnLog | None):
        self.client, self.run, self.compute, self.state, self.on_log = client, run, compute, state, on_log
        self.seen = 0
        self.heard = 0.0  # when Modal last answered
        self.waited = False  # whether a call was seen at work
        self.compared = ""  # the call whose settings were last held against those given

    def wait(self, call_id: str) -> jobs.Result:
        """Return the result of a call, or of the one that does its work."""
        self.heard = time.monotonic()
        try:
            while True:
                result = self._ask(call_id)
                if result is None:
                    continue
                if "error" in result:
                    raise CallEnded(f"training on Modal ended: {result['error']}")
                if "call_id" not in result:
                    return result
                call_id = result["call_id"]
                write_json(self.state, {"run": self.run, "call_id": call_id})
                logger.info("call %s does this training already: attached to it", call_id)
        except CallEnded:
            self.state.unlink(missing_ok=True)  # another flow may have waited as well
            raise
        except Exception:
            logger.warning("nobody watches call %s now: it goes on there, %s", call_id, ATTACH)
            raise
        except BaseException:
            try:
                self.client.cancel(call_id)
                self.state.unlink(missing_ok=True)
            except Exception as error:
                logger.error("call %s could not be cancelled (%s); run `modal app stop %s`", call_id, one_line(error), APP)
            raise

    def _ask(self, call_id: str) -> jobs.Result | None:
        """Return the result of the call; None while it runs, or while there is still hope that Modal will answer."""
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
                raise ModalUnreachable(f"Modal does not answer ({said}); call {call_id} goes on there, {ATTACH}")
            case "refused":
                raise ComputeError(f"Modal refuses ({said}); call {call_id} goes on there, {ATTACH}")
            case "forgotten":
                if (result := _read_result(self.client, self.run)) is not None:
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
        """Pass on the rows of the log that are new. It is cut back when a preempted attempt resumes."""
        folder = run_folder(self.run)
        rows = [json.loads(line) for line in _read_text(self.client, f"{folder}/log.jsonl").splitlines(True) if line.endswith("\n")]
        rows = [row for row in rows if _number(row) > self.seen]
        if not rows:
            return
        meter = json.loads(_read_text(self.client, f"{folder}/meter.json") or "{}")
        self._compare(call_id, meter)
        dollars = {} if meter.get("usd") is None else {"dollars": round(meter["usd"], 4)}
        self.seen = _number(rows[-1])
        spent = f", ${dollars['dollars']:.2f} so far" if dollars else ""
        logger.info("%d of %d on Modal%s", self.seen, rows[-1].get("steps", rows[-1].get("epochs")), spent)
        if self.on_log is None:
            return
        try:
            for row in rows:
                self.on_log(row | dollars)
        except Exception as error:
            logger.warning("the progress could not be shown: %s", one_line(error))

    def _compare(self, call_id: str, meter: dict[str, Any]) -> None:
        """Say once where a call was started with another GPU or limit than is given now."""
        if call_id == self.compared or call_id != meter.get("call_id"):
            return
        self.compared = call_id
        given = {"gpu": self.compute.gpu, "max_cost_usd": self.compute.max_cost_usd}
        if other := [f"compute.{name} {meter[name]}, not {value}" for name, value in given.items() if meter[name] != value]:
            logger.warning("call %s was started with %s; it goes on with this", call_id, " and ".join(other))


def prune(keep: int, dry_run: bool = False, client: ModalClient | None = None) -> list[str]:
    """Remove all but the newest runs from the outputs volume, and return a line for each of them.

    A run that a call works on stays.
    """
    client = client or ModalClient()
    client.check_credentials()
    with explained():
        sizes: dict[str, int] = {}
        changed: dict[str, float] = {}
        for path, size, time_of_change in client.list_outputs("runs"):
            run = path.partition("/")[0]
            sizes[run] = sizes.get(run, 0) + size
            changed[run] = max(changed.get(run, 0.0), time_of_change)
        lines = []
        for number, run in enumerate(sorted(sizes, key=lambda run: changed[run], reverse=True)):
            call_id = jobs.last_claim(client.claims(), run) if number >= keep else None
            works = call_id is not None and not is_over(client, call_id)
            if number < keep or works:
                fate = f"kept: call {call_id} works on it" if works else "kept"
            else:
                fate = "would be removed" if dry_run else "removed"
                if not dry_run:
                    client.remove_outputs(run_folder(run))
            when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(changed[run]))
            lines.append(f"{run}  {when}  {sizes[run] / 1e6:10,.1f} MB  {fate}")
    return lines


def _check_gpu(compute: ComputeConfig) -> None:
    name, count = parse_gpu(compute.gpu)
    if count != compute.processes:
        raise ComputeError(
            f"compute.gpu is {compute.gpu!r} but compute.processes is {compute.processes}; there must be a process for each GPU, "
            f"as in '{name}:2' and 2"
        )


def _budget(compute: ComputeConfig) -> dict[str, float | None]:
    """Return what a training may cost and what a second of it costs. Raises ComputeError for a limit without a known price."""
    rate = usd_per_second(compute)
    if rate is None and compute.max_cost_usd is not None:
        raise ComputeError(
            f"compute.max_cost_usd is {compute.max_cost_usd:g} but no price of {compute.gpu} is known; ask for another "
            "compute.gpu, or leave the limit out"
        )
    return {"usd": compute.max_cost_usd, "usd_per_second": rate}


def _find_call(client: ModalClient, job: Job) -> str | None:
    """Return a call that does this training already, None where there is none."""
    with explained():
        call_id = jobs.last_claim(client.claims(), job.run)
        if call_id is None or is_over(client, call_id):
            return None
    logger.info("attached to call %s, which somebody else started", call_id)
    return call_id


def _start_call(client: ModalClient, job: Job, compute: ComputeConfig) -> str:
    request = job.request(compute)
    with explained():
        _upload(client, job.dataset)
        call_id = client.spawn(job.function, request, compute)
    logger.info("started call %s on %s", call_id, compute.gpu)
    return call_id


def _upload(client: ModalClient, dataset: Dataset) -> None:
    """Put the data set on the data volume under its digest, unless it is there, and see that it has arrived intact."""
    folder = data_folder(dataset.sha256)
    files = [dataset.path, dataset.path.with_name("manifest.json")]
    if not files[1].is_file():
        raise ComputeError(f"{files[1]} is gone; delete {dataset.path.parent} and prepare the data again")
    present = client.list_data(folder)
    if all(present.get(file.name) == file.stat().st_size for file in files) and _data_there(client, dataset) == dataset.sha256:
        return
    client.upload({f"{folder}/{file.name}": file for file in files})
    logger.info("uploaded the data set to %s/%s", DATA_VOLUME, folder)
    found = _data_there(client, dataset)
    if found != dataset.sha256:
        raise ComputeError(
            f"the data set did not arrive intact on {DATA_VOLUME}: its sha256 is {str(found)[:12]}… there and "
            f"{dataset.sha256[:12]}… here; run the same command to upload it again"
        )


def _data_there(client: ModalClient, dataset: Dataset) -> str | None:
    with explained(runs_code=True):
        return client.check(dataset.sha256)["data"]


def _read_result(client: ModalClient, run: str) -> jobs.Result | None:
    """Return the result that a finished run has left on the volume, None where there is none."""
    text = _read_text(client, f"{run_folder(run)}/result.json")
    return json.loads(text) if text else None


def _number(row: dict[str, Any]) -> int:
    return row["step"] if "step" in row else row["epoch"]


def _read_text(client: ModalClient, path: str) -> str:
    try:
        return b"".join(_read(client, path)).decode()
    except FileNotFoundError:
        return ""  # nothing has been committed yet


def _download(client: ModalClient, remote: str, path: Path, sha256: str) -> None:
    """Bring one file here. Raises ComputeError, and leaves nothing, when it is not the file that was made there."""
    if path.is_file() and sha256_of(path) == sha256:
        return
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                file.writelines(_read(client, remote))
        except FileNotFoundError:
            raise ComputeError(
                f"{remote} is gone from the volume {OUTPUTS_VOLUME}; run `modal volume rm -r {OUTPUTS_VOLUME} "
                f"{PurePosixPath(remote).parent}` and then the same command, to train anew"
            ) from None
        found = sha256_of(temporary)
        if found != sha256:
            raise ComputeError(
                f"{remote} arrived damaged from Modal: its sha256 is {found[:12]}…, there it was {sha256[:12]}…; "
                "run the same command to download it again"
            )


def _read(client: ModalClient, path: str) -> Iterator[bytes]:
    with explained():
        yield from client.read(path)


def main(arguments: Sequence[str] | None = None, connect: Callable[[], ModalClient] = ModalClient) -> int:
    """Look after the outputs volume. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tinycats_core.remote", description="Look after the outputs volume on Modal.")
    command = parser.add_subparsers(required=True).add_parser("prune", help="remove all but the newest runs")
    command.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the newest runs stay")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    given = parser.parse_args(arguments)
    try:
        if given.keep < 0:
            raise ComputeError(f"--keep is {given.keep}; give 0 or more")
        lines = prune(given.keep, given.dry_run, connect())
    except TinycatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines) or "no runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
