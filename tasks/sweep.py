"""The sweep: judge the snapshots of a training, and choose what is shipped: a step, an average, a guidance."""

import time

import pandas as pd

from tasks import show
from tasks.runs import log
from tasks.stage import stage
from tasks.training import train_generator
from tinycats_core import pictures
from tinycats_core.compute.clock import Clock
from tinycats_core.config import ComputeConfig, EvaluateConfig, ReleaseConfig, SampleOptions
from tinycats_core.evaluation import sweep
from tinycats_core.files import home
from tinycats_core.records import Choice, Course, Dataset, SweepRow, Trained, Weights


@stage(sweep.judge_snapshot)
def judge_snapshot(
    average: Weights,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    compute: ComputeConfig,
) -> SweepRow:
    """Measure an average on the validation images while its training pauses."""
    return sweep.judge_snapshot(average, dataset, options, config, classifier, home("evaluations"), compute.device)


def train_and_watch(
    dataset: Dataset, config: ReleaseConfig, classifier: Weights | None, clock: Clock | None = None
) -> tuple[Trained, Course]:
    """Train the generator from snapshot to snapshot, and end it once it copies and becomes no better.

    Within a budget its clock decides at which steps. A training on Modal is not watched: it runs to its last step, and its
    snapshots are measured afterwards.
    """
    train, compute = config.train, config.compute
    if clock:
        with clock.running():
            return _train_by_the_clock(dataset, config, classifier, clock)
    if compute.where == "modal" or len(train.snapshot_steps()) == 1:
        return train_generator(dataset, config.model, train.until(train.steps), compute), Course()
    rows: list[SweepRow] = []
    for step in train.snapshot_steps():
        trained = train_generator(dataset, config.model, train.until(step), compute)
        rows.append(_judge(trained, dataset, config, classifier))
        if ended := _ended(rows, step, config):
            return trained, Course(rows=tuple(rows), ended=ended)
    return trained, Course(rows=tuple(rows))


def _train_by_the_clock(
    dataset: Dataset, config: ReleaseConfig, classifier: Weights | None, clock: Clock
) -> tuple[Trained, Course]:
    train = config.train.model_copy(update={"snapshots": 1})  # the clock decides where they are
    rows: list[SweepRow] = []
    averages: tuple[Weights, ...] = ()
    ended = None
    step = 0
    for step in clock.stops(train.steps, config.train.snapshots):
        log().info("%.1f of %g minutes are spent; training to step %d", clock.spent / 60, clock.minutes, step)
        started = time.monotonic()
        trained = train_generator(dataset, config.model, train.until(step), config.compute)
        paused = time.monotonic()
        rows.append(_judge(trained, dataset, config, classifier))
        clock.observe(step, paused - started, time.monotonic() - paused)
        averages = (*trained.averages, *averages)
        if ended := _ended(rows, step, config):
            break
    if not ended and step < train.steps:
        ended = f"at step {step} of at most {train.steps}: the rest of the {clock.minutes:g} minutes is for judging and export"
    return trained.model_copy(update={"averages": averages}), Course(rows=tuple(rows), ended=ended)


def _judge(trained: Trained, dataset: Dataset, config: ReleaseConfig, classifier: Weights | None) -> SweepRow:
    row = judge_snapshot(trained.ema, dataset, config.sample, config.evaluate, classifier, config.compute)
    kid = f"kid_{config.evaluate.extractor}"
    rates = row.metrics["copy_rate"], row.metrics["altered_copy_rate"]
    log().info("step %d: %s %.4f, copy_rate %.3f, altered_copy_rate %.3f", row.step, kid, row.metrics[kid], *rates)
    return row


def _ended(rows: list[SweepRow], step: int, config: ReleaseConfig) -> str | None:
    """Return where and why a training ends after the snapshot of a step, None if it does not."""
    steps = config.train.steps
    why = sweep.why_stop(rows, f"kid_{config.evaluate.extractor}", config.train.patience) if step < steps else None
    if why is None:
        return None
    log().warning("the training ends at step %d of %d: %s", step, steps, why)
    return f"at step {step} of {steps}: {why}"


@stage(sweep.choose)
def choose_sampling(
    trained: Trained,
    course: Course,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    compute: ComputeConfig,
) -> Choice:
    """Choose the step, the average, the guidance and its interval on the validation images."""
    bar = show.progress("sweep-progress", "Measuring averages and guidances on the validation images")
    choice = sweep.choose(
        trained,
        dataset,
        options,
        config,
        classifier,
        home("evaluations"),
        compute.device,
        on_row=lambda done, total: bar(done / total, f"{done} of {total}"),
        course=course,
    )
    rows = [row.model_dump(mode="json") for row in choice.rows]
    frame = pd.DataFrame([{**row, "guidance_interval": str(row["guidance_interval"])} for row in rows])
    show.table("sweep", frame, f"Averages and guidances on the validation images; chosen: {choice.rule}")
    if len({row.step for row in choice.rows}) > 1:
        show.picture(
            "course",
            pictures.course(rows, f"kid_{config.extractor}", choice.bars),
            "KID and copy rates of the snapshots of the training",
        )
    if choice.note:
        log().warning(choice.note)
    decay, sample = choice.weights.facts.get("ema_decay"), choice.sample
    log().info(
        "step %d, EMA %s, guidance %s in %s: %s",
        choice.weights.step,
        decay,
        sample.guidance,
        list(sample.guidance_interval),
        choice.rule,
    )
    return choice
