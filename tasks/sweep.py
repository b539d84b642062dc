"""The sweep: judge the snapshots of a training, and choose what is shipped: a step, an average, a guidance."""

import pandas as pd

from tasks import show
from tasks.runs import log
from tasks.stage import stage
from tasks.training import train_generator
from tinycats_core import pictures
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


def train_and_watch(dataset: Dataset, config: ReleaseConfig, classifier: Weights | None) -> tuple[Trained, Course]:
    """Train the generator from snapshot to snapshot, and end it once it copies and becomes no better.

    A training on Modal is not watched: it runs to its last step, and its snapshots are measured afterwards.
    """
    train, compute, kid = config.train, config.compute, f"kid_{config.evaluate.extractor}"
    if compute.where == "modal" or len(train.snapshot_steps()) == 1:
        return train_generator(dataset, config.model, train.until(train.steps), compute), Course()
    rows: list[SweepRow] = []
    for step in train.snapshot_steps():
        trained = train_generator(dataset, config.model, train.until(step), compute)
        rows.append(judge_snapshot(trained.ema, dataset, config.sample, config.evaluate, classifier, compute))
        figures = rows[-1].metrics
        rates = figures["copy_rate"], figures["altered_copy_rate"]
        log().info("step %d: %s %.4f, copy_rate %.3f, altered_copy_rate %.3f", step, kid, figures[kid], *rates)
        if step < train.steps and (why := sweep.why_stop(rows, kid, train.patience)):
            log().warning("the training ends at step %d of %d: %s", step, train.steps, why)
            return trained, Course(rows=tuple(rows), ended=f"at step {step} of {train.steps}: {why}")
    return trained, Course(rows=tuple(rows))


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
