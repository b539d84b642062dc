"""The Modal app: where the networks are trained when compute.where is `modal`.

    modal deploy deployments/modal_app.py                                   # once, and after every change of the code
    modal run deployments/modal_app.py::train --preset high-accuracy        # or train at once, without a release

Importing this file needs neither network nor credentials.
"""

import json
import logging
from pathlib import Path
from typing import Any

import modal

from tinycats_core import jobs, modal_client, remote
from tinycats_core.config import parse_overrides, resolve
from tinycats_core.errors import ComputeError, TinycatsError
from tinycats_core.files import home

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pydantic", "safetensors", "tqdm")  # what training imports
DATA, OUTPUTS = Path("/data"), Path("/outputs")  # where the volumes are mounted

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
    if not modal.is_local():  # in the container the image is made already, and constraints.txt is not there
        return image
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    image = image.add_local_file(constraints, "/constraints.txt", copy=True)
    image = image.uv_pip_install(*pinned(constraints.read_text()), extra_options="--constraint /constraints.txt")
    return image.add_local_python_source("tinycats_core")


app = modal.App(modal_client.APP)
image = make_image()
data_volume = modal.Volume.from_name(modal_client.DATA_VOLUME, create_if_missing=True)
outputs_volume = modal.Volume.from_name(modal_client.OUTPUTS_VOLUME, create_if_missing=True)
claims = modal.Dict.from_name(modal_client.CLAIMS, create_if_missing=True)
# GPU, timeout, retries, region and secrets are given by the caller; what stands here is for one that gives none.
training: dict[str, Any] = {
    "image": image,
    "volumes": {str(DATA): data_volume, str(OUTPUTS): outputs_volume},
    "timeout": 24 * 3600,
    "retries": modal.Retries(initial_delay=0.0, max_retries=10),
    "single_use_containers": True,
}


@app.function(image=image, volumes={str(DATA): data_volume}, timeout=600)
def check(dataset_sha256: str | None = None) -> dict[str, str | None]:
    """Say which code is deployed, and what lies on the data volume: asked before a GPU is paid for."""
    data_volume.reload()
    return jobs.check(DATA, dataset_sha256)


@app.function(**training)
def train_generator(request: jobs.Request) -> jobs.Result:
    """Train the generator, or go on from the last checkpoint on the volume."""
    return jobs.run(request, place(), jobs.train_generator)


@app.function(**training)
def train_classifier(request: jobs.Request) -> jobs.Result:
    """Train the breed classifier."""
    return jobs.run(request, place(), jobs.train_classifier)


def place() -> jobs.Place:
    """Return where a container stands."""

    def reload() -> None:
        data_volume.reload()
        outputs_volume.reload()

    def is_over(call_id: str) -> bool:
        return modal_client.is_over(modal_client.ModalClient(), call_id)

    return jobs.Place(DATA, OUTPUTS, reload, keep, modal.current_function_call_id() or "", claims, is_over)


def keep(in_order: bool) -> None:
    """Commit the outputs. While training holds a file open, Modal commits and then may refuse to show what others have done."""
    try:
        outputs_volume.commit()
    except RuntimeError as error:
        if in_order or "open files" not in str(error):
            raise
        logger.warning("the commit of the outputs said: %s", error)


@app.local_entrypoint()
def train(preset: str = "high-accuracy", overrides: str = "{}") -> None:
    """Prepare the data here, train on Modal, and download the checkpoint to .tinycats/modal/."""
    from tinycats_core.data import prepare

    try:
        config = resolve(preset, parse_overrides(overrides))
        dataset = prepare(config.data, home() / "data")
        job = remote.generator_job(dataset, config.model, config.train)
        client = remote.ModalClient({"check": check, "train_generator": train_generator})
        checkpoint = remote.train_on_modal(
            job, config.compute, home() / "modal" / job.run, lambda row: print(json.dumps(row)), client
        )
    except TinycatsError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{checkpoint.path}  sha256 {checkpoint.sha256}")
