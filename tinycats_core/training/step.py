"""One optimizer step over the effective batch, in as many parts as fit into memory."""

import logging
from contextlib import nullcontext

import torch
from torch import Tensor

from tinycats_core.device import empty_cache, is_out_of_memory
from tinycats_core.errors import TrainingError
from tinycats_core.generator.flow_matching import flow_matching_loss
from tinycats_core.generator.weights import ema_decay, update_ema
from tinycats_core.training import ranks
from tinycats_core.training.recipe import draw_batch, learning_rate
from tinycats_core.training.run_folder import RunFolder
from tinycats_core.training.state import Run

logger = logging.getLogger("tinycats.training")


def training_step(run: Run) -> tuple[Tensor, Tensor]:
    """Take one optimizer step over the effective batch. Returns loss and gradient norm as scalars on the device.

    Nothing here waits for a GPU. A step whose loss or gradient is not finite changes neither weights nor moments.
    """
    config, step = run.config, run.step
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    batch = draw_batch(run.images, run.labels, config, run.net.config.num_classes, step, run.groups)
    share = config.batch_size // ranks.world_size()
    mine = slice(ranks.rank() * share, (ranks.rank() + 1) * share)
    parts = list(zip(*(tensor[mine].split(run.micro_batch) for tensor in batch), strict=True))
    total = torch.zeros((), device=run.device)
    for number, (x_1, x_0, t, labels, *told) in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last or ranks.world_size() == 1 else run.step_net.no_sync():  # pyright: ignore
            with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
                loss = flow_matching_loss(run.step_net, x_1, x_0, t, labels, run.net.config.prediction, *told)
            weight = len(x_1) / share
            run.scaler.scale(loss * weight).backward()
        total += loss.detach() * weight
    ranks.average(total)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.net.parameters(), config.clip).detach()
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)  # skips a step whose gradient overflowed, and lowers the scale
    else:
        bad = ~(total.isfinite() & norm.isfinite())
        run.optimizer.found_inf = bad.float()  # pyright: ignore  # how GradScaler tells a fused optimizer
        run.optimizer.step()
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    for decay, ema in run.emas.items():
        update_ema(ema, run.weights, ema_decay(decay, step))
    run.step += 1
    return total, norm


def step_within_memory(run: Run, folder: RunFolder) -> None:
    """Take a step; while it runs out of memory, halve the micro-batch and take it again."""
    while (done := _try_step(run)) is None:
        _halve_micro_batch(run, folder)
    run.window.losses.append(done[0])
    run.window.norms.append(done[1])
    run.window.steps += 1


def _try_step(run: Run) -> tuple[Tensor, Tensor] | None:
    """Return what `training_step` returns, or None if it ran out of memory."""
    try:
        return training_step(run)
    except RuntimeError as error:
        short = is_out_of_memory(error)
        if ranks.is_connection_lost(error):
            raise ranks.RankLost(f"another rank is gone ({str(error).splitlines()[0]})") from None
        if short and ranks.world_size() > 1:  # the others wait for this rank's gradients, so it cannot take the step again
            raise _too_little_memory(run, run.config.accumulation * 2) from None
        if not short:
            raise
    return None


def fit_into_memory(run: Run, folder: RunFolder) -> None:
    """Find, before several ranks start, how many images at a time fit into the memory of each of them."""
    if ranks.world_size() == 1:
        return
    while not _fits(run):
        _halve_micro_batch(run, folder if ranks.rank() == 0 else None)
    run.micro_batch = -ranks.largest(-run.micro_batch)


def _fits(run: Run) -> bool:
    size, channels = run.net.config.image_size, 3
    try:
        with torch.autocast(run.device.type, run.autocast, enabled=run.autocast is not None):
            x = torch.zeros(run.micro_batch, channels, size, size, device=run.device)
            numbers = torch.zeros(run.micro_batch, device=run.device)
            run.net(x, numbers, numbers.long()).float().square().mean().backward()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        run.optimizer.zero_grad(set_to_none=True)
    return True


def _halve_micro_batch(run: Run, folder: RunFolder | None) -> None:
    """Halve what goes through the network at a time; the effective batch stays. Raises TrainingError at one image."""
    run.optimizer.zero_grad(set_to_none=True)
    empty_cache(run.device)
    if run.micro_batch == 1:
        raise _too_little_memory(run, None)
    before, run.micro_batch = run.micro_batch, -(-run.micro_batch // 2)
    logger.warning(
        "out of memory at step %d with %d images at a time: continuing with %d, the effective batch of %d stays",
        *(run.step, before, run.micro_batch, run.config.batch_size),
    )
    if folder is not None:
        folder.note("out_of_memory", run.step, images_at_a_time=run.micro_batch, before=before)


def _too_little_memory(run: Run, accumulation: int | None) -> TrainingError:
    advice = f"set train.accumulation to {accumulation}" if accumulation else "make the model or model.image_size smaller"
    return TrainingError(
        f"out of memory at step {run.step} with {run.micro_batch} image{'s' * (run.micro_batch > 1)} at a time; {advice}, or "
        "set train.gradient_checkpointing to true"
    )
