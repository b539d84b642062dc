"""The local side of training on Modal: start or attach to a call that outlives this process, watch it, verify its files.

The remote side is `jobs.py`, in `deployments/modal_app.py`.

Exactly one call trains: the name of a run is a digest of its data and settings, and of all calls for a run only the one that
has claimed it trains (`jobs.claim`). The others return its id and end, and whoever waits for them waits for it. So a second
orchestrator, or one that was killed before it could write down the call it had started, costs the start of a container but no
second training. This relies on Modal to begin an attempt of a call only after the previous one has ended.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tinycats_core.compute import jobs
from tinycats_core.compute.budget import Budget
from tinycats_core.compute.gpus import charge, parse_gpu, usd_per_second
from tinycats_core.compute.jobs import OnLog, run_folder
from tinycats_core.compute.modal_client import ModalClient, explained, is_over
from tinycats_core.compute.volumes import download, read_result, upload, upload_base
from tinycats_core.compute.watch import CallEnded, KnownCall, Watch
from tinycats_core.config import ClassifierConfig, ComputeConfig, ModelConfig, TrainConfig
from tinycats_core.config.training import BaseRelease
from tinycats_core.errors import ComputeError
from tinycats_core.evaluation import classifier
from tinycats_core.files import check_writable, digest_of, read_json
from tinycats_core.records import Dataset, Trained, Weights
from tinycats_core.source_code import code_of
from tinycats_core.training import start

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
        """Name of the training: equal for equal data and settings, so that a new call resumes from its files."""
        return digest_of([self.function, self.dataset.content, self.settings])[:16]

    @property
    def base(self) -> BaseRelease | None:
        """The release whose weights the training starts from."""
        return jobs.base_of(self.settings)

    def request(self, compute: ComputeConfig) -> jobs.Request:
        """Return the argument of the remote function."""
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


def generator_job(dataset: Dataset, model: ModelConfig, train: TrainConfig, code: str | None = None) -> Job[Trained]:
    """Return the training of a generator by the code of that digest, None: the present one."""
    parts = {"model": model.model_dump(mode="json"), "train": train.model_dump(mode="json")}
    return Job("train_generator", Trained, dataset, {"code": code or start.training_code(), **parts})


def classifier_job(dataset: Dataset, config: ClassifierConfig, code: str | None = None) -> Job[Weights]:
    """Return the training of a breed classifier by the code of that digest, None: the present one."""
    settings = {"code": code or code_of(classifier.train_classifier).digest, "classifier": config.model_dump(mode="json")}
    return Job("train_classifier", Weights, dataset, settings)


def check_compute(compute: ComputeConfig, client: ModalClient | None = None, app_files: Sequence[Path] = ()) -> str:
    """Check before any work that Modal can train: GPU, price, credentials, and that the deployed app is the local one.

    `app_files` are the app's files outside this package; they are compared only if all exist here. Returns the source of the
    credentials. Raises ComputeError.
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
        raise ComputeError(f"{names} differs from the one deployed on Modal; {jobs.DEPLOY}")
    return source


def train_on_modal(
    job: Job[Made], compute: ComputeConfig, folder: Path, on_log: OnLog | None = None, client: ModalClient | None = None
) -> Made:
    """Train on Modal and return the record of the weights. The folder gets the files that a local training would leave.

    The call's id is in `<folder>/modal_call.json` from its start: after this process was killed, the same command attaches to
    the same call, or starts another one if it has ended without a result. An interrupt cancels the call; after any error here
    it continues. A new call resumes from the last checkpoint on the outputs volume.

    Args:
        on_log: called with each row of the remote log, in order; `dollars` is what the GPU has cost so far. An error that it
            raises is only worth a warning.

    Raises:
        CallEnded: the call failed, expired, or has used up compute.max_cost_usd.
        ModalUnreachable: Modal does not answer for compute.patience_minutes; the call continues.
        ComputeError: the call cannot be started or polled, or its files do not arrive intact.
    """
    client = client or ModalClient()
    check_writable(folder)
    state = folder / "modal_call.json"
    known = _known_call(state, job)
    if known and known.made:
        if (made := job.made.model_validate(known.made)).is_intact():
            return made
        known = None  # that call is over; its files are on the volume, or a new call trains anew
    watch = Watch(client, job.run, compute, state, on_log)
    result = _attach(client, job, known.call_id, watch) if known and known.call_id else None
    if result is None:
        check_compute(compute, client)
        result = read_result(client, job.run)
    if result is None:
        call_id = _find_call(client, job) or _start_call(client, job, compute)
        known = KnownCall(run=job.run, call_id=call_id)
        known.write(state)
        result = watch.wait(call_id)
    for name, sha256 in result.files.items():
        download(client, f"{run_folder(job.run)}/{name}", folder / name, sha256)
    made = job.made.model_validate(result.made).in_folder(folder)
    KnownCall(run=job.run, call_id=known.call_id if known else None, made=made.model_dump(mode="json")).write(state)
    return made


def _known_call(path: Path, job: Job) -> KnownCall | None:
    """Return the call of an earlier run, None if there was none. Raises ComputeError if it is of another training."""
    known = KnownCall.model_validate(read_json(path)) if path.is_file() else None
    if known and known.run != job.run:
        raise ComputeError(f"{path} belongs to another training (call {known.call_id}); use another folder or delete that file")
    return known


def _attach(client: ModalClient, job: Job, call_id: str, watch: Watch) -> jobs.Finished | None:
    """Return the result of a call that an earlier run started; None if it was over already, without one."""
    client.check_credentials()
    logger.info("attached to call %s, which an earlier run started", call_id)
    try:
        return read_result(client, job.run) or watch.wait(call_id)
    except CallEnded as error:
        if watch.waited:
            raise
        logger.warning("call %s was over already, so a new one follows: %s", call_id, error)
        return None


def _check_gpu(compute: ComputeConfig) -> None:
    gpu, count = parse_gpu(compute.gpu)
    if count != compute.processes:
        raise ComputeError(
            f"compute.gpu is {compute.gpu!r} but compute.processes is {compute.processes}; give a process for each GPU, "
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
    return Budget(usd=compute.max_cost_usd, usd_per_second=rate, charge=charge(compute))


def _find_call(client: ModalClient, job: Job) -> str | None:
    """Return a call that does this training already, None if there is none."""
    with explained():
        call_id = jobs.last_claim(client.claims(), job.run)
        if call_id is None or is_over(client, call_id):
            return None
    logger.info("attached to call %s, which another orchestrator started", call_id)
    return call_id


def _start_call(client: ModalClient, job: Job, compute: ComputeConfig) -> str:
    request = job.request(compute)
    with explained():
        upload(client, job.dataset)
        if job.base:
            upload_base(client, job.base)
        call_id = client.spawn(job.function, request, compute)
    logger.info("started call %s on %s", call_id, compute.gpu)
    return call_id
