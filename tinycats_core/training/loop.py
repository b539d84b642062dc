"""Training of the generator: AdamW, mixed precision, EMA, and checkpoints from which the same command resumes.

Everything random in a step is a function of (seed, step), so a checkpoint needs no state of any random generator.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from tinycats_core import threads
from tinycats_core.config import ModelConfig, SampleConfig, TrainConfig
from tinycats_core.errors import TrainingError
from tinycats_core.files import write_atomically
from tinycats_core.generator.model import TinyDiT
from tinycats_core.generator.sampling import sample
from tinycats_core.pictures import contact_sheet
from tinycats_core.records import Dataset, Trained
from tinycats_core.signals import Stop
from tinycats_core.training import ranks
from tinycats_core.training.recipe import learning_rate
from tinycats_core.training.run_folder import RunFolder
from tinycats_core.training.state import LogWindow, Run, record_of, resume, save_averages, save_checkpoint, save_raw
from tinycats_core.training.step import fit_into_memory, step_within_memory

logger = logging.getLogger("tinycats.training")

OnLog = Callable[[dict[str, Any]], None]


class Stopped(TrainingError):
    """The training was asked to stop, and has written a checkpoint."""


def train_here(
    dataset: Dataset,
    model: ModelConfig,
    config: TrainConfig,
    folder: RunFolder,
    identity: dict[str, Any],
    device: torch.device,
    on_log: OnLog | None,
    stop: Stop,
) -> Trained:
    """Train in this process, which may be one of several ranks: see `start.train`. Rank 0 writes the files."""
    leads = ranks.rank() == 0
    if leads:
        folder.claim(identity)
    run = Run.start(dataset, model, config, device)
    source = resume(run, folder, identity)
    ranks.largest(0)  # the others have read the checkpoints before this one writes any
    if leads:
        _open_attempt(run, folder, source)
    first, since = run.step, time.perf_counter()
    try:
        with tqdm(total=config.last_step, initial=run.step, unit="step", disable=None if leads else True) as bar:
            fit_into_memory(run, folder)
            _loop(run, folder, identity, stop, bar, on_log if leads else None)
        if leads:
            with _writing(run, folder):
                save_averages(run, folder.path)
                save_raw(run, folder.path)
    except BaseException as error:
        if leads:
            cause = stop.reason if isinstance(error, Stopped) else str(error) or type(error).__name__
            seconds = round(time.perf_counter() - since, 3)
            folder.note("stop", run.step, cause=cause, steps=run.step - first, seconds=seconds)
        raise
    if leads:
        folder.close(run.step, config.batch_size, run.step - first, time.perf_counter() - since, run.facts())
    ranks.largest(0)
    return record_of(folder.path, config)


def _open_attempt(run: Run, folder: RunFolder, source: str | None) -> None:
    machine = threads.facts()
    folder.open_attempt(run.step, source, run.facts() | machine)
    if run.device.type == "cpu" and (warning := threads.warning(machine)):
        logger.warning("%s", warning)
    folder.cut_log(run.step)


def _loop(run: Run, folder: RunFolder, identity: dict[str, Any], stop: Stop, bar: tqdm, on_log: OnLog | None) -> None:
    """Step until the last one; log, draw, and write checkpoints and the averages of the snapshots on the way. Raises Stopped."""
    config, leads = run.config, ranks.rank() == 0
    *earlier, _ = config.snapshot_steps()
    while run.step < config.last_step:
        try:
            if number := ranks.largest(stop.number):
                stop.request(signal.Signals(number).name)  # it may have reached another rank
                _stop(run, folder, identity, stop)
            step_within_memory(run, folder)
        except ranks.RankLost:
            _save_last_words(run, folder, identity)
            raise
        bar.update()
        log, save, draw = (
            run.step == config.steps or run.step % every == 0
            for every in (config.log_every, config.checkpoint_every, config.sample_every)
        )
        if log or save or draw:
            _count_skipped(run, folder)
        if log:
            _log(run, folder, bar, on_log)
        if draw and leads:
            with _writing(run, folder):
                draw_sheet(run, folder.path)
        if run.step in earlier and leads:
            with _writing(run, folder):
                save_averages(run, folder.path)
        if (save or run.step == config.last_step) and leads:
            save_checkpoint(run, folder, identity)


def _stop(run: Run, folder: RunFolder, identity: dict[str, Any], stop: Stop) -> NoReturn:
    if ranks.rank() == 0:
        _count_skipped(run, folder)
        save_checkpoint(run, folder, identity)
        logger.warning("%s: stopped at step %d with a checkpoint; run the same command to resume", stop.reason, run.step)
    raise Stopped(f"stopped at step {run.step} of {run.config.steps}; run the same command to resume")


def _count_skipped(run: Run, folder: RunFolder) -> None:
    """Check that the steps since the last check were finite. Raises TrainingError if too many were not."""
    window = run.window
    if window.checked == len(window.losses):
        return
    losses, norms = torch.stack(window.losses[window.checked :]), torch.stack(window.norms[window.checked :])
    good = losses.isfinite()
    if not run.scaler.is_enabled():  # in fp16 a gradient overflows now and then, which the scaler handles
        good &= norms.isfinite()
    window.checked = len(window.losses)
    bad = [run.step - len(good) + 1 + number for number in (~good).nonzero().flatten().tolist()]
    if not bad:
        return
    run.skipped += len(bad)
    steps = f"step{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:5]))}{' …' * (len(bad) > 5)}"
    if ranks.rank() == 0:
        folder.note("skipped", run.step, steps=bad[:100], total=run.skipped)
    if run.skipped > run.config.max_skipped_steps:
        last = folder.last_good()
        raise TrainingError(
            f"the loss is not finite at {steps}; {run.skipped} such steps, train.max_skipped_steps allows "
            f"{run.config.max_skipped_steps}; the last good checkpoint is {last}. Lower train.lr or train.clip and start anew."
        )
    logger.warning("the loss is not finite at %s: skipped, %d so far", steps, run.skipped)


def _log(run: Run, folder: RunFolder, bar: tqdm, on_log: OnLog | None) -> None:
    """Write a row of the log, show it, and begin a new window."""
    row = _log_row(run)
    run.window = LogWindow()
    if ranks.rank() > 0:
        return
    with _writing(run, folder):
        folder.append_to_log(row)
    bar.set_postfix_str(status(row))
    if bar.disable:
        logger.info("step %d/%d  %s", run.step, run.config.steps, status(row))
    if on_log:
        on_log(row)


def _log_row(run: Run) -> dict[str, Any]:
    window = run.window
    losses, norms = torch.stack(window.losses), torch.stack(window.norms)
    finite = losses.isfinite() & norms.isfinite()
    seconds = time.perf_counter() - window.since
    return {
        "step": run.step,
        "steps": run.config.steps,
        "loss": float(losses[finite].mean()) if finite.any() else None,
        "lr": learning_rate(run.config, run.step - 1),
        "images_per_s": round(window.steps * run.config.batch_size / seconds, 1),
        "grad_norm": float(norms[finite].mean()) if finite.any() else None,
        "skipped": run.skipped,
        "device_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if run.device.type == "cuda" else None,
    }


def status(row: dict[str, Any]) -> str:
    """Return a row of the log as a short line."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    return f"loss {loss}  lr {row['lr']:.1e}  {row['images_per_s']:.0f} images/s"


def draw_sheet(run: Run, folder: Path) -> None:
    """Draw four images a class from the EMA, with the same noise every time."""
    with torch.random.fork_rng(devices=[]):
        model = TinyDiT(run.net.config)
    model.load_state_dict(run.emas[run.config.ema_decays[0]], assign=True)
    labels = torch.arange(model.config.num_classes).repeat_interleave(4)
    images = sample(
        model.eval(),
        labels,
        model.config.image_size,
        model.config.num_classes,
        SampleConfig(steps=10, batch_size=min(64, run.micro_batch)),
        run.device,
    )
    sheet = contact_sheet(images, labels, run.classes, per_class=4, scale=max(1, 64 // model.config.image_size))
    path = folder / "samples" / f"step-{run.step:08d}.png"
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def _save_last_words(run: Run, folder: RunFolder, identity: dict[str, Any]) -> None:
    """Write a checkpoint although another rank is gone: by rank 0, or by whichever rank locks the folder first."""
    if run.device.type == "cuda":
        return  # the GPU may wait for the lost rank for ever; the last checkpoint remains
    try:
        with folder.hold() if ranks.rank() else nullcontext():
            save_checkpoint(run, folder, identity)
    except TrainingError as error:
        logger.warning("%s", error)


@contextmanager
def _writing(run: Run, folder: RunFolder) -> Iterator[None]:
    """Turn a failed write into a TrainingError that names the last good checkpoint."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{folder.path} cannot be written at step {run.step}: {error.strerror or error}. Free space and run the same "
            f"command: it resumes from {folder.last_good()}."
        ) from None
