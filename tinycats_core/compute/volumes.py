"""The files of trainings on the volumes of Modal: upload, download, verify, and remove old ones."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tinycats_core.compute import jobs
from tinycats_core.compute.jobs import BASES, base_file, data_folder, run_folder
from tinycats_core.compute.modal_client import DATA_VOLUME, OUTPUTS_VOLUME, ModalClient, explained, is_over
from tinycats_core.config.training import BaseRelease
from tinycats_core.errors import ComputeError
from tinycats_core.files import atomic_path, sha256_of
from tinycats_core.records import Dataset
from tinycats_core.training.base_weights import base_path

logger = logging.getLogger("tinycats.remote")


def prune(keep: int, dry_run: bool = False, client: ModalClient | None = None) -> list[str]:
    """Remove all but the newest runs from the outputs volume, and return a line for each of them.

    A run with a running call stays.

    Raises:
        ComputeError: `keep` is negative, or Modal cannot be reached.
    """
    if keep < 0:
        raise ComputeError(f"--keep is {keep}; give 0 or more")
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


def upload(client: ModalClient, dataset: Dataset) -> None:
    """Put the data set on the data volume under its digest, unless it is there, and verify that it has arrived intact."""
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


def upload_base(client: ModalClient, base: BaseRelease) -> None:
    """Put the weights that a training starts from on the data volume under their digest, unless they are there."""
    path, remote = base_path(base), base_file(base)
    if client.list_data(BASES).get(Path(remote).name) != path.stat().st_size:
        client.upload({remote: path})
        logger.info("uploaded the weights of %s to %s/%s", base.source, DATA_VOLUME, remote)


def _data_there(client: ModalClient, dataset: Dataset) -> str | None:
    with explained(runs_code=True):
        return client.check(dataset.sha256)["data"]


def read_result(client: ModalClient, run: str) -> jobs.Finished | None:
    """Return the result that a finished run has left on the volume, None if there is none."""
    text = read_text(client, f"{run_folder(run)}/result.json")
    return jobs.Finished.model_validate_json(text) if text else None


def read_text(client: ModalClient, path: str) -> str:
    try:
        return b"".join(_read(client, path)).decode()
    except FileNotFoundError:
        return ""  # nothing has been committed yet


def download(client: ModalClient, remote: str, path: Path, sha256: str) -> None:
    """Download one file. Raises ComputeError, and leaves no file, if its sha256 is another than on Modal."""
    if path.is_file() and sha256_of(path) == sha256:
        return
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                file.writelines(_read(client, remote))
        except FileNotFoundError:
            raise ComputeError(
                f"{remote} is gone from the volume {OUTPUTS_VOLUME}; run `modal volume rm -r {OUTPUTS_VOLUME} "
                f"{PurePosixPath(remote).parent}` and then the same command to train anew"
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
