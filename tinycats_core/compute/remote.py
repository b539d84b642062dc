"""Training on Modal, seen from here: one call that outlives this process, watched, paid for, and its files verified.

What runs there is `jobs.py`, in `deployments/modal_app.py`.

Exactly one training: a run's name is made of its data and settings, and of all calls for a run only the one that has claimed
it trains (`jobs.claim`); the others name that one and end, and whoever waits for them waits for it. So a second
orchestrator, or one that was killed before it could note the call that it had started, costs a container's start and no
second training. This holds as far as Modal keeps its word that an attempt of a call begins when the one before has ended.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tinycats_core.compute import jobs
from tinycats_core.compute.budget import Budget
from tinycats_core.compute.gpus import parse_gpu, usd_per_second
from tinycats_core.compute.jobs import OnLog, run_folder
from tinycats_core.compute.modal_client import ModalClient, explained, is_over
from tinycats_core.compute.volumes import download, read_result, upload
from tinycats_core.compute.watch import CallEnded, Watch
from tinycats_core.config import ClassifierConfig, ComputeConfig, ModelConfig, TrainConfig
from tinycats_core.errors import ComputeError
from tinycats_core.evaluation import classifier
from tinycats_core.files import check_writable, digest_of, read_json, write_json
from tinycats_core.records import Dataset, Trained, Weights
from tinycats_core.training import recipe

logger = logging.getLogger("tinycats.remote")


Made = TypeVar("Made", Weights, Trained)


@dataclass(frozen=True)
class Job(Generic[Made]):
    """One training: the remote function that does it, its data and its settings."""

    function: str
    made: type[Made]  # the record of what it leaves behind
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
            "budget": _budget(compute).model_dump(mode="json"),
            **self.settings,
        }


def generator_job(dataset: Dataset, model: ModelConfig, train: TrainConfig) -> Job[Trained]:
    """Return the training of a generator."""
    settings = {"recipe": recipe.VERSION, "model": model.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    return Job("train_generator", Trained, dataset, settings)


def classifier_job(dataset: Dataset, config: ClassifierConfig) -> Job[Weights]:
    """Return the training of a breed classifier."""
    settings = {"recipe": classifier.VERSION, "classifier": config.model_dump(mode="json")}
    return Job("train_classifier", Weights, dataset, settings)


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
    job: Job[Made], compute: ComputeConfig, folder: Path, on_log: OnLog | None = None, client: ModalClient | None = None
) -> Made:
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
    if "made" in call:
        if (made := job.made.model_validate(call["made"])).is_intact():
            return made
        call = {}  # that call is over, and what it made is on the volume, or made anew
    result, watch = None, Watch(client, job.run, compute, state, on_log)
    if call:
        client.check_credentials()
        logger.info("attached to call %s, which an earlier run started", call["call_id"])
        try:
            result = read_result(client, job.run) or watch.wait(call["call_id"])
        except CallEnded as error:
            if watch.waited:
                raise
            logger.warning("call %s was over already, so another one follows: %s", call["call_id"], error)
    if result is None:
        check_compute(compute, client)
        result = read_result(client, job.run)
    if result is None:
        call = {"run": job.run, "call_id": _find_call(client, job) or _start_call(client, job, compute)}
        write_json(state, call)
        result = watch.wait(call["call_id"])
    for name, sha256 in result.files.items():
        download(client, f"{run_folder(job.run)}/{name}", folder / name, sha256)
    made = job.made.model_validate(result.made).in_folder(folder)
    write_json(state, {"run": job.run, "call_id": call.get("call_id"), "made": made.model_dump(mode="json")})
    return made


def _check_gpu(compute: ComputeConfig) -> None:
    gpu, count = parse_gpu(compute.gpu)
    if count != compute.processes:
        raise ComputeError(
            f"compute.gpu is {compute.gpu!r} but compute.processes is {compute.processes}; there must be a process for each GPU, "
            f"as in '{gpu.name}:2' and 2"
        )


def _budget(compute: ComputeConfig) -> Budget:
    """Return the budget of a training. Raises ComputeError for a limit without a known price."""
    rate = usd_per_second(compute)
    if rate is None and compute.max_cost_usd is not None:
        raise ComputeError(
            f"compute.max_cost_usd is {compute.max_cost_usd:g} but no price of {compute.gpu} is known; ask for another "
            "compute.gpu, or leave the limit out"
        )
    return Budget(usd=compute.max_cost_usd, usd_per_second=rate)


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
        upload(client, job.dataset)
        call_id = client.spawn(job.function, request, compute)
    logger.info("started call %s on %s", call_id, compute.gpu)
    return call_id
