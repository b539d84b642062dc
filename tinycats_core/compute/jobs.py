"""The remote side of a training: claimed by one call, metered, and stopped in order.

`deployments/modal_app.py` runs it on Modal, on which this module does not depend. The folder of a run on the outputs volume
holds the files of the training, `meter.json` (what the attempts took) and, written last, `result.json`.
"""

import errno
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tinycats_core.compute.budget import USED_UP, Budget, Meter
from tinycats_core.config import ClassifierConfig, DataConfig, EvaluateConfig, ModelConfig, SampleConfig, TrainConfig
from tinycats_core.config.training import BaseRelease
from tinycats_core.device import fast_arithmetic, is_out_of_memory
from tinycats_core.errors import CheckpointError, ComputeError, TinycatsError
from tinycats_core.files import atomic_path, digest_of, make_folder, read_json, sha256_of, write_json
from tinycats_core.records import Dataset, Trained, Weights
from tinycats_core.signals import Stop, stop_on_signals
from tinycats_core.source_code import code_of
from tinycats_core.training.base_weights import keep
from tinycats_core.training.run_folder import RunFolder

KEEP_SECONDS = 30.0  # a killed attempt loses at most the checkpoints, and the metered seconds, of this time
DEPLOY = "run `modal deploy deployments/modal_app.py`"
LARGER = "a larger compute.gpu, or more compute.memory_gb if it was no GPU's memory"
BASES = "bases"  # on the data volume: weights that trainings start from
PRUNE = "`tinycats prune --keep 3`"
Request = dict[str, Any]
OnLog = Callable[[dict[str, Any]], None]
Work = Callable[[Request, Dataset, Path, OnLog, Stop], Weights | Trained]


class Failed(BaseModel):
    """The training ended in an error that no further attempt can mend."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["failed"] = "failed"
    error: str


class DoneElsewhere(BaseModel):
    """Another call does this training."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["elsewhere"] = "elsewhere"
    call_id: str


class Finished(BaseModel):
    """The training is finished, as `result.json` holds it: the record of its weights, and the sha256 of each file."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["finished"] = "finished"
    made: dict[str, Any]
    files: dict[str, str]


Result = Failed | DoneElsewhere | Finished


def parse_result(value: Any) -> Result:
    """Return a result from the JSON value that a call has returned. Raises ValidationError."""
    return TypeAdapter(Annotated[Result, Field(discriminator="kind")]).validate_python(value)


class Claims(Protocol):
    """A mapping that all calls share and that takes a key once: a `modal.Dict`."""

    def get(self, key: str) -> Any: ...

    def put(self, key: str, value: Any, *, skip_if_exists: bool = False) -> bool: ...


@dataclass(frozen=True)
class Site:
    """Where a job runs: two mounted volumes, how to reload and commit them, and the calls that share them."""

    data: Path
    outputs: Path
    reload: Callable[[], None]
    keep: Callable[[bool], None]  # commits the outputs; a failure is an error for True, a warning for False
    call_id: str
    claims: Claims
    is_over: Callable[[str], bool]  # whether a call has ended
    since: float = field(default_factory=time.monotonic)  # when the container began


def perform(request: Request, site: Site, work: Work) -> Result:
    """Do the work of a request, or resume where the call before was stopped.

    What no further attempt can mend is returned as `Failed`: raising it would start the next attempt. If another call does
    the same work, this one does nothing and returns `DoneElsewhere`. After a signal everything is committed to the volume
    before the signal takes its usual effect.
    """
    if request["revision"] != revision():
        return Failed(error=f"the deployed code is {revision()}, not {request['revision']} as here; {DEPLOY}")
    try:
        owner = claim(site.claims, request["run"], site.call_id, site.is_over)
        if owner != site.call_id:
            return DoneElsewhere(call_id=owner)
        site.reload()
        folder = make_folder(site.outputs / run_folder(request["run"]))
        if (finished := _finished(folder)) is not None:
            return finished
        meter = Meter(folder / "meter.json", site.call_id, request["gpu"], Budget(**request["budget"]), since=site.since)
        with stop_on_signals() as stop:
            try:
                result = _work(request, site, work, folder, meter, stop)
            except BaseException as error:
                if not (stop.requested and isinstance(error, Exception)):
                    site.keep(False)
                    raise
                result = Failed(error=f"{type(error).__name__} while it was stopped: {error}")
            if isinstance(result, Failed) and stop.reason == USED_UP:
                result = Failed(error=meter.explain(RunFolder(folder).last_good()))
            site.keep(isinstance(result, Finished) and stop.reason in (None, USED_UP))  # a failure hides neither signal nor error
    except Exception as error:  # so that nothing raised here is mistaken for an outage of Modal
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    return result


def _work(request: Request, site: Site, work: Work, folder: Path, meter: Meter, stop: Stop) -> Result:
    kept = time.monotonic()

    def on_log(row: dict[str, Any]) -> None:
        nonlocal kept
        meter.write()
        if time.monotonic() - kept >= KEEP_SECONDS:
            site.keep(False)
            kept = time.monotonic()

    try:
        write_json(folder / "request.json", request)
        dataset = _dataset(request, site.data)
        if not dataset.is_intact():
            found = sha256_of(dataset.path)[:12] if dataset.path.is_file() else None
            what = f"has the sha256 {found}… instead of {dataset.sha256[:12]}…" if found else "is not there"
            raise ComputeError(f"the data set on the data volume {what}; run the same command to upload it again")
        fetch_base(request, site.data)
        with meter.running(stop):
            site.keep(False)  # the attempt is metered from here on, however it ends
            if stop.requested:
                return Failed(error="stopped before it began; run the same command again")
            made = work(request, dataset, folder, on_log, stop)
    except ValidationError:
        return Failed(error=f"the deployed code does not know these settings; {DEPLOY}")
    except (TinycatsError, OSError, RuntimeError) as error:
        if _is_full(error):
            return Failed(error=f"the outputs volume is full: {error} {PRUNE} removes old runs.")
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return Failed(error=f"out of memory: {error}; ask for {LARGER}, or a smaller batch or model")
        if not isinstance(error, TinycatsError):
            raise
        return Failed(error=str(error))
    weights = [file.path for file in made.files]
    beside = [folder / name for name in ("log.jsonl", "diary.jsonl", "report.json", "meter.json")]
    files = [*weights, *filter(Path.is_file, beside), *sorted((folder / "samples").glob("*.png"))]
    digests = {str(file.relative_to(folder)): sha256_of(file) for file in files}
    result = Finished(made=made.model_dump(mode="json"), files=digests)
    write_json(folder / "result.json", result.model_dump(mode="json"))
    return result


def draw(outputs: Path, run: str, labels: list[int], first: int, sample: dict[str, Any], device: str) -> bytes:
    """Draw a part of a set of images from the weights of a run; `first` is the index of its first image in the set.

    Returns uint8 (N, 3, S, S) as bytes: on the same device those of the set drawn at once, where `first` is a multiple of the
    batch size.
    """
    from tinycats_core.generator import sampling, weights

    network, header = weights.load_generator(outputs / run_folder(run) / "ema.safetensors", device)
    size, classes = header.model.image_size, len(header.classes)
    config = SampleConfig(**sample)
    with fast_arithmetic(torch.device(device)):
        images = sampling.sample(network, torch.tensor(labels), size, classes, config, device, first)
    return images.numpy().tobytes()


def evaluate(
    data: Path, outputs: Path, run: str, sample: dict[str, Any], settings: dict[str, Any], device: str, classifier_run: str | None
) -> dict[str, Any]:
    """Measure samples of a run's weights against the test images of its data set.

    Args:
        settings: of `EvaluateConfig`.
        classifier_run: the training of the breed classifier.

    Returns:
        `metrics`, `floor`, `conditions` and `groups` of the report.
    """
    from tinycats_core.evaluation import fidelity
    from tinycats_core.evaluation.samples import draw_samples

    folder, config = outputs / run_folder(run), EvaluateConfig(**settings)
    dataset = _dataset(read_json(folder / "request.json"), data)
    weights = Trained.model_validate(read_json(folder / "result.json")["made"]).in_folder(folder).ema
    path = folder / "evaluation" / "samples.safetensors"
    samples = draw_samples(weights, dataset, SampleConfig(**sample), config.samples, path, device, other_share=config.other_share)
    classifier = None
    if classifier_run:
        other = outputs / run_folder(classifier_run)
        classifier = Weights.model_validate(read_json(other / "result.json")["made"]).in_folder(other)
    report = fidelity.evaluate(samples, dataset, config, classifier, folder / "evaluation", device)
    return report.model_dump(mode="json", include={"metrics", "floor", "conditions", "groups"})


def prepare_data(data: Path, config: dict[str, Any]) -> Dataset:
    """Prepare a data set on the data volume, in the folder in which a training looks for it."""
    from tinycats_core.data.preparation import prepare

    dataset = prepare(DataConfig(**config), data / "prepared")
    target = data / data_folder(dataset.sha256)
    with atomic_path(target) as temporary:
        shutil.copytree(dataset.path.parent, temporary)
    return dataset.model_copy(update={"path": target / dataset.path.name})


def train_generator(request: Request, dataset: Dataset, folder: Path, on_log: OnLog, stop: Stop) -> Trained:
    """Train the generator of a request."""
    from tinycats_core.training.start import train

    model, settings = ModelConfig(**request["model"]), TrainConfig(**request["train"])
    return train(dataset, model, settings, folder, request["device"], on_log, request["processes"], stop, request["code"])


def train_classifier(request: Request, dataset: Dataset, folder: Path, on_log: OnLog, stop: Stop) -> Weights:
    """Train the classifier of a request, from the start: it takes minutes."""
    from tinycats_core.evaluation import classifier

    log = RunFolder(folder)
    (folder / "log.jsonl").unlink(missing_ok=True)

    def keep_row(row: dict[str, Any]) -> None:
        log.append_to_log(row)
        on_log(row)

    config = ClassifierConfig(**request["classifier"])
    return classifier.train_classifier(dataset, config, folder, request["device"], keep_row, stop, request["code"])


def check(data: Path, dataset_sha256: str | None = None) -> dict[str, str | None]:
    """Return `revision`, of this code, and `data`, the sha256 of a data set on the data volume."""
    path = data / data_folder(dataset_sha256 or "") / "images.safetensors"
    return {"revision": revision(), "data": sha256_of(path) if path.is_file() else None}


def claim(claims: Claims, run: str, call_id: str, is_over: Callable[[str], bool]) -> str:
    """Return the call that does a run's work: this one, or another one that claimed it earlier and is not over.

    The claims of a run are numbered, and each is taken once: if several calls find the last owner gone, one gets the next
    number. Every attempt reads them all, because Modal deletes an entry that is not touched for a week.
    """
    number = 0
    while not claims.put(f"{run}/{number}", call_id, skip_if_exists=True):
        owner = claims.get(f"{run}/{number}")
        if owner == call_id or not is_over(owner):
            return owner
        number += 1
    return call_id


def last_claim(claims: Claims, run: str) -> str | None:
    """Return the call that claimed a run last, None if none has."""
    owner, number = None, 0
    while (found := claims.get(f"{run}/{number}")) is not None:
        owner, number = found, number + 1
    return owner


@cache
def revision() -> str:
    """Return a digest of what a call runs: equal here and on Modal until an edit of it that means something."""
    return code_of(perform, train_generator, train_classifier, draw, evaluate, prepare_data, check).digest[:12]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return a short digest of the content of files."""
    return digest_of([sha256_of(path) for path in paths])[:12]


def run_folder(run: str) -> str:
    """Return the folder of a training on the outputs volume."""
    return f"runs/{run}"


def data_folder(dataset_sha256: str) -> str:
    """Return the folder of a data set on the data volume."""
    return f"datasets/{dataset_sha256}"


def base_file(base: BaseRelease) -> str:
    """Return the path of the weights of a base on the data volume."""
    return f"{BASES}/{base.sha256}.safetensors"


def fetch_base(request: Request, data: Path) -> None:
    """Put the weights that a training starts from where it looks for them. Raises ComputeError."""
    if base := base_of(request):
        try:
            keep(data / base_file(base), base)
        except CheckpointError as error:
            raise ComputeError(
                f"{error}; remove {BASES} from the data volume, and run the same command to upload them again"
            ) from None


def base_of(settings: Mapping[str, Any]) -> BaseRelease | None:
    """Return the release whose weights a job starts from; None if it starts at random, or trains no generator."""
    train = settings.get("train")
    return TrainConfig(**train).base if isinstance(train, Mapping) else None


def _dataset(request: Request, data: Path) -> Dataset:
    return Dataset(path=data / data_folder(request["dataset"]["sha256"]) / "images.safetensors", **request["dataset"])


def _finished(folder: Path) -> Finished | None:
    """Return the result of a finished run, None if it is not finished or a file has been damaged."""
    if not (folder / "result.json").is_file():
        return None
    result = Finished.model_validate(read_json(folder / "result.json"))
    files = {folder / name: sha256 for name, sha256 in result.files.items()}
    return result if all(path.is_file() and sha256_of(path) == sha256 for path, sha256 in files.items()) else None


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, means that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
