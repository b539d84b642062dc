"""The sweep stage: choose the average that is shipped and the guidance that it is sampled with."""

import pandas as pd

from tasks import show
from tasks.runs import log
from tasks.stage import stage
from tinycats_core.config import ComputeConfig, EvaluateConfig, SampleOptions
from tinycats_core.evaluation import sweep
from tinycats_core.files import home
from tinycats_core.records import Choice, Dataset, Trained, Weights


@stage(sweep.choose)
def choose_sampling(
    trained: Trained,
    dataset: Dataset,
    options: SampleOptions,
    config: EvaluateConfig,
    classifier: Weights | None,
    compute: ComputeConfig,
) -> Choice:
    """Choose the average, the guidance and its interval on the validation images."""
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
    )
    rows = [row.model_dump(mode="json") for row in choice.rows]
    frame = pd.DataFrame([{**row, "guidance_interval": str(row["guidance_interval"])} for row in rows])
    show.table("sweep", frame, f"Averages and guidances on the validation images; chosen: {choice.rule}")
    if choice.note:
        log().warning(choice.note)
    decay, sample = choice.weights.facts.get("ema_decay"), choice.sample
    log().info("EMA %s, guidance %s in %s: %s", decay, sample.guidance, list(sample.guidance_interval), choice.rule)
    return choice
