"""The Modal app: where the networks are trained when compute.where is `modal`.

    modal deploy deployments/modal_app.py                                   # once, and after every change of the code
    modal run deployments/modal_app.py::train --preset high-accuracy        # or train at once, without a release
    modal run deployments/modal_app.py::prepare --preset standard           # the data set, remotely, without an upload
    modal run deployments/modal_app.py::generate --run RUN --per-class 64   # draw from the weights, in parallel
    modal run deployments/modal_app.py::judge --run RUN                     # and measure it

Importing this file needs neither network nor credentials.
"""

import json
import logging
from pathlib import Path
from typing import Any

import modal
import torch

from tinycats_core.compute import budget, costs, jobs, modal_client, remote
from tinycats_core.config import ModelConfig, ReleaseConfig
from tinycats_core.errors import ComputeError, exit_on_error
from tinycats_core.files import home
from tinycats_core.presets import parse_overrides, resolve

# What training and judging import, by the names of constraints.txt.
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pydantic", "safetensors", "tqdm", "filelock", "torch_fidelity")
DATA, OUTPUTS = Path("/data"), Path("/outputs")  # where the volumes are mounted
IN_IMAGE = "/constraints.txt"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt" if modal.is_local() else Path(IN_IMAGE)

logger = logging.getLogger("tinycats.modal")


def pinned(text: str) -> list[str]:
    """Return the requirements of PACKAGES from the text of constraints.txt. Raises ComputeError for a missing one."""
    pins = {line.split("==")[0].lower(): line for line in text.split() if "==" in line}
    if missing := [name for name in PACKAGES if name not in pins]:
        raise ComputeError(f"constraints.txt has no version of {', '.join(missing)}; add a line NAME==VERSION for each")
    return [pins[name] for name in PACKAGES]


def make_image() -> modal.Image:
    """Return an image with PACKAGES and what they require, all in the versions of constraints.txt, and the core's sources."""
    image = modal.Image.debian_slim(python_version="3.11")
    if not modal.is_local():  # in the container the image exists already
        return image
    image = image.add_local_file(CONSTRAINTS, IN_IMAGE, copy=True)
    image = image.uv_pip_install(*pinned(CONSTRAINTS.read_text()), extra_options=f"--constraint {IN_IMAGE}")
    return image.add_local_python_source("tinycats_core")


app = modal.App(modal_client.APP)
image = make_image()
data_volume = modal.Volume.from_name(modal_client.DATA_VOLUME, create_if_missing=True)
outputs_volume = modal.Volume.from_name(modal_client.OUTPUTS_VOLUME, create_if_missing=True)
claims = modal.Dict.from_name(modal_client.CLAIMS, create_if_missing=True)
# GPU, cores, memory, timeout, retries, region and secrets are set by the caller; these are the defaults.
training: dict[str, Any] = {
    "image": image,
    "volumes": {str(DATA): data_volume, str(OUTPUTS): outputs_volume},
    "timeout": 24 * 3600,
    "startup_timeout": 1800,  # a container that hangs before the work begins keeps its GPU for no longer than this
    "retries": modal.Retries(initial_delay=0.0, max_retries=10),
    "single_use_containers": True,
}


@app.function(image=image, volumes={str(DATA): data_volume}, timeout=600)
def check(dataset_sha256: str | None = None) -> dict[str, str | None]:
    """Return which code is deployed and which data is on the volume, before a GPU is paid for."""
    data_volume.reload()
    return with_app(jobs.check(DATA, dataset_sha256))


@app.function(**training)
def train_generator(request: jobs.Request) -> dict[str, Any]:
    """Train the generator, or resume from the last checkpoint on the volume."""
    return jobs.perform(request, site(), jobs.train_generator).model_dump(mode="json")


@app.function(**training)
def train_classifier(request: jobs.Request) -> dict[str, Any]:
    """Train the breed classifier."""
    return jobs.perform(request, site(), jobs.train_classifier).model_dump(mode="json")


@app.function(image=image, volumes={str(OUTPUTS): outputs_volume}, timeout=3600, retries=2)
def generate_samples(run: str, labels: list[int], first: int, sample: dict[str, Any], device: str) -> bytes:
    """Draw a part of a set of images."""
    outputs_volume.reload()
    return jobs.draw(OUTPUTS, run, labels, first, sample, device)


@app.function(image=image, volumes={str(DATA): data_volume, str(OUTPUTS): outputs_volume}, timeout=6 * 3600)
def evaluate(
    run: str, sample: dict[str, Any], settings: dict[str, Any], device: str, classifier_run: str | None = None
) -> dict[str, Any]:
    """Measure the images that a run's weights draw."""
    data_volume.reload()
    outputs_volume.reload()
    report = jobs.evaluate(DATA, OUTPUTS, run, sample, settings, device, classifier_run)
    outputs_volume.commit()
    return report


@app.function(image=image, volumes={str(DATA): data_volume}, timeout=6 * 3600)
def prepare_data(config: dict[str, Any]) -> str:
    """Prepare a data set on the data volume, and return its sha256."""
    data_volume.reload()
    dataset = jobs.prepare_data(DATA, config)
    data_volume.commit()
    return dataset.sha256


def with_app(found: dict[str, str | None]) -> dict[str, str | None]:
    """Return the result of `jobs.check` and `app`, a digest of this file and of constraints.txt."""
    return found | {"app": jobs.digest_of_files([Path(__file__), CONSTRAINTS])}


def site() -> jobs.Site:
    """Return the volumes and the call of this container."""

    def reload() -> None:
        data_volume.reload()
        outputs_volume.reload()

    def is_over(call_id: str) -> bool:
        return modal_client.is_over(modal_client.ModalClient(), call_id)

    return jobs.Site(DATA, OUTPUTS, reload, keep, modal.current_function_call_id() or "", claims, is_over, budget.process_start())


def keep(must: bool) -> None:
    """Commit the outputs. Unless it `must` succeed, a failure is only worth a warning: the next commit includes everything."""
    try:
        outputs_volume.commit()
    except Exception as error:
        if must:
            raise
        logger.warning("the outputs were not committed: %s", error)


@app.local_entrypoint()
def train(preset: str = "high-accuracy", overrides: str = "{}") -> None:
    """Prepare the data here, train on Modal, and download the checkpoint to .tinycats/modal/."""
    from tinycats_core.data.preparation import prepare
    from tinycats_core.release import base

    with exit_on_error():
        config = base.resolve(resolve(preset, parse_overrides(overrides)))
        compute = config.compute.model_copy(update={"where": "modal"})
        costs.check_budget(costs.estimate(config.model, config.train, compute), compute)
        dataset = prepare(config.data, home("data"))
        job = remote.generator_job(dataset, config.model, config.train)
        client = remote.ModalClient({"check": check, "train_generator": train_generator})
        folder = home("modal") / job.run
        checkpoint = remote.train_on_modal(job, compute, folder, lambda row: print(json.dumps(row)), client)
        print(f"{checkpoint.ema.path}  sha256 {checkpoint.ema.sha256}")


@app.local_entrypoint()
def prepare(preset: str = "standard", overrides: str = "{}") -> None:
    """Prepare the data on Modal: a training that needs them finds them."""
    with exit_on_error():
        config = resolve(preset, parse_overrides(overrides)).data
        if config.folder is not None:
            raise ComputeError("data.source is 'folder', and the folder is here: a training uploads it by itself")
        print(prepare_data.remote(config.model_dump(mode="json")))


@app.local_entrypoint()
def generate(
    run: str, per_class: int = 8, shards: int = 4, preset: str = "standard", overrides: str = "{}", out: str = "samples"
) -> None:
    """Draw images of every class from a run's weights, in parallel shards, and write OUT.safetensors and OUT.png."""
    from tinycats_core.pictures import contact_sheet
    from tinycats_core.tensors import write_safetensors

    with exit_on_error():
        for name, count in (("per-class", per_class), ("shards", shards)):
            if count < 1:
                raise ComputeError(f"--{name} is {count}; give 1 or more")
        config = resolve(preset, parse_overrides(overrides))
        sample = config.sample.candidates()[0]
        shape = read_shape(run)
        labels = torch.arange(shape.num_classes).repeat_interleave(per_class)
        size = max(1, -(-len(labels) // shards // sample.batch_size)) * sample.batch_size  # whole batches, to change no bit
        parts = [(run, part.tolist(), number * size) for number, part in enumerate(labels.split(size))]
        given = sample.model_dump(mode="json"), config.compute.device_on_modal
        with modal_client.explained(runs_code=True):
            drawn = b"".join(on_gpu(generate_samples, config).starmap([(*part, *given) for part in parts]))
        images = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(len(labels), 3, shape.image_size, shape.image_size)
        header = {"kind": "samples", "settings": {**given[0], "run": run, "runtime": "pytorch"}}
        write_safetensors(Path(f"{out}.safetensors"), {"images": images, "labels": labels}, header)
        names = tuple(map(str, range(shape.num_classes)))
        contact_sheet(images, labels, names, per_class=min(per_class, 8), scale=1).save(f"{out}.png")
        print(f"{out}.safetensors  {len(images)} images in {len(parts)} shards")


@app.local_entrypoint()
def judge(run: str, preset: str = "standard", overrides: str = "{}", classifier_run: str = "") -> None:
    """Measure on Modal the images that a run's weights draw, and print the report."""
    with exit_on_error():
        config = resolve(preset, parse_overrides(overrides))
        settings = config.sample.candidates()[0].model_dump(mode="json"), config.evaluate.model_dump(mode="json")
        with modal_client.explained(runs_code=True):
            report = on_gpu(evaluate, config).remote(run, *settings, config.compute.device_on_modal, classifier_run or None)
        print(json.dumps(report, indent=2))


def read_shape(run: str) -> ModelConfig:
    """Return which network a run trains. Raises ComputeError if there is no such run."""
    path = f"{jobs.run_folder(run)}/run.json"
    try:
        with modal_client.explained():
            return ModelConfig(**json.loads(b"".join(remote.ModalClient().read(path)))["model"])
    except FileNotFoundError:
        see = f"see `modal volume ls {modal_client.OUTPUTS_VOLUME} runs`"
        raise ComputeError(f"--run is {run!r}, but there is no {path} on the outputs volume; {see}") from None


def on_gpu(function: Any, config: ReleaseConfig) -> Any:
    """Return a function of the app with the GPU, cores, memory, region and secrets of a configuration."""
    compute = config.compute.one_gpu()
    return function.with_options(**modal_client.resources(compute), secrets=modal_client.secrets(compute))
