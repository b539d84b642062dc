"""The Modal app: where the generator is trained when compute.where is `modal`.

    modal deploy deployments/modal_app.py                              # once, and after every change of the code
    modal run deployments/modal_app.py --preset high-accuracy          # or train at once, without a release

Importing this file needs neither network nor credentials.
"""

import json
import time
from pathlib import Path
from typing import Any

import modal
from pydantic import ValidationError

from tinycats_core import remote
from tinycats_core.config import ModelConfig, TrainConfig, parse_overrides, resolve
from tinycats_core.errors import ComputeError, TinycatsError
from tinycats_core.files import home, sha256_of
from tinycats_core.records import Dataset

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pydantic", "safetensors", "tqdm")  # what training imports
DATA, OUTPUTS = Path("/data"), Path("/outputs")  # where the volumes are mounted
COMMIT_SECONDS = 30.0  # a preempted attempt loses at most the checkpoints of this time


def pinned(text: str) -> list[str]:
    """Return the requirements of PACKAGES from the text of constraints.txt. Raises ComputeError for a missing one."""
    pins = {line.split("==")[0].lower(): line for line in text.split() if "==" in line}
    if missing := [name for name in PACKAGES if name not in pins]:
        raise ComputeError(f"constraints.txt has no version of {', '.join(missing)}; add a line NAME==VERSION for each")
    return [pins[name] for name in PACKAGES]


app = modal.App(remote.APP)
image = modal.Image.debian_slim(python_version="3.11")
if modal.is_local():  # in the container the image is made already, and constraints.txt is not there
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    image = image.uv_pip_install(*pinned(constraints.read_text())).add_local_python_source("tinycats_core")
data_volume = modal.Volume.from_name(remote.DATA_VOLUME, create_if_missing=True)
outputs_volume = modal.Volume.from_name(remote.OUTPUTS_VOLUME, create_if_missing=True)


@app.function(
    image=image,
    volumes={str(DATA): data_volume, str(OUTPUTS): outputs_volume},
    timeout=24 * 3600,
    retries=modal.Retries(initial_delay=0.0, max_retries=10),
    single_use_containers=True,
)
def train_generator(request: dict[str, Any]) -> dict[str, Any]:
    """Train, or go on from the last checkpoint on the volume, and return the record and the sha256 of each file.

    What a retry cannot mend comes back as {"error": message}: raising it would start ten more attempts. GPU, timeout
    and retries are given by the caller.
    """
    from tinycats_core.training import train

    data_volume.reload()
    outputs_volume.reload()
    folder = OUTPUTS / remote.run_folder(request["run"])
    data = remote.data_folder(request["dataset"]["sha256"])
    committed = time.monotonic()

    def commit_in_time(row: dict[str, Any]) -> None:
        nonlocal committed
        if time.monotonic() - committed >= COMMIT_SECONDS:
            outputs_volume.commit()
            committed = time.monotonic()

    try:
        dataset = Dataset(path=DATA / data / "images.safetensors", **request["dataset"])
        model, training = ModelConfig(**request["model"]), TrainConfig(**request["train"])
        if not dataset.is_intact():
            volume = remote.DATA_VOLUME
            raise ComputeError(f"{data} on {volume} is missing or damaged; run `modal volume rm -r {volume} {data}`")
        checkpoint = train(dataset, model, training, folder, request["device"], commit_in_time, request["processes"])
    except TinycatsError as error:
        return {"error": str(error)}
    except ValidationError:
        return {"error": "the deployed code does not know these settings; run `modal deploy deployments/modal_app.py`"}
    finally:
        outputs_volume.commit()
    weights = [checkpoint.path, *(other.path for other in checkpoint.others)]
    files = [*weights, folder / "log.jsonl", folder / "diary.jsonl", *sorted((folder / "samples").glob("*.png"))]
    return {
        "checkpoint": checkpoint.model_dump(mode="json"),
        "files": {str(file.relative_to(folder)): sha256_of(file) for file in files},
    }


@app.local_entrypoint()
def train(preset: str = "high-accuracy", overrides: str = "{}") -> None:
    """Prepare the data here, train on Modal, and download the checkpoint to .tinycats/modal/."""
    from tinycats_core.data import prepare

    try:
        config = resolve(preset, parse_overrides(overrides))
        dataset = prepare(config.data, home() / "data")
        folder = home() / "modal" / remote.run_id(dataset, config.model, config.train)
        checkpoint = remote.train_on_modal(
            dataset,
            config.model,
            config.train,
            config.compute,
            folder,
            on_log=lambda row: print(json.dumps(row)),
            client=remote.ModalClient(train_generator),
        )
    except TinycatsError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{checkpoint.path}  sha256 {checkpoint.sha256}")
