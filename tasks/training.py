"""The training stages: the breed classifier and the generator."""

import pandas as pd

from tasks import show
from tasks.cache import keeps_results, key_of, stage_code
from tasks.runs import log
from tasks.stage import NETWORK, stage
from tinycats_core import pictures, threads
from tinycats_core.compute import costs, remote
from tinycats_core.config import ClassifierConfig, ComputeConfig, ModelConfig, TrainConfig
from tinycats_core.evaluation import classifier
from tinycats_core.files import home, read_json
from tinycats_core.records import Dataset, Trained, Weights
from tinycats_core.signals import stop_on_signals
from tinycats_core.training import loop, run_folder, start


@stage(classifier.train_classifier, beside=("report.json",), **NETWORK)
def train_classifier(dataset: Dataset, config: ClassifierConfig, compute: ComputeConfig) -> Weights:
    """Train the network that tells the breeds, here or on Modal."""
    code = stage_code("train_classifier").core
    folder = home("classifier") / key_of(code, dataset, config)
    bar = show.progress("classifier-progress", f"Training the breed classifier for {config.epochs} epochs")

    def on_log(row: dict) -> None:
        bar(row["epoch"] / config.epochs, f"epoch {row['epoch']}")

    if compute.where == "modal":
        weights = remote.train_on_modal(remote.classifier_job(dataset, config, code), compute.one_gpu(), folder, on_log)
    else:
        with stop_on_signals() as stop:
            weights = classifier.train_classifier(dataset, config, folder, compute.device, on_log, stop, code)
    facts = {name: value for name, value in weights.facts.items() if isinstance(value, float)}
    show.table("classifier", show.metrics_frame({"value": facts}), "The breed classifier on held-out images")
    report = read_json(weights.path.with_name("report.json"))
    show.table("classifier-classes", pd.DataFrame(report["classes"]), "The breed classifier on held-out images, class by class")
    matrix = pictures.confusion_matrix(report["confusion"], dataset.classes)
    show.picture("classifier-confusion", matrix, "Held-out images of each class (a row), and which class was named (a column)")
    log().info("breed classifier: %s", ", ".join(f"{name} {value:.3f}" for name, value in facts.items()))
    return weights


@stage(start.train, apart_from=start.SHOWN, **NETWORK)
def train_generator(dataset: Dataset, model: ModelConfig, train: TrainConfig, compute: ComputeConfig) -> Trained:
    """Train the generator, here or on Modal. Run again, it resumes from the last checkpoint."""
    code = stage_code("train_generator").core
    if train.resume_from is not None and keeps_results():
        code = run_folder.code_of_checkpoint(train.resume_from) or code
    folder = home("training") / key_of(code, dataset, model, train.until(train.steps))  # shared by the parts of a training
    log().info("training to step %d of %d, %s, in %s", train.last_step, train.steps, compute.where, folder)
    what, away = f"Training the generator to step {train.last_step}", compute.where == "modal"
    bar = show.progress("training-progress", what, on_terminal=away)  # the core shows its own if it trains here

    def on_log(row: dict) -> None:
        spent = f"  ${row['dollars']:.2f} so far" if "dollars" in row else ""
        bar(row["step"] / train.last_step, loop.status(row) + spent)

    expected = costs.estimate(model, train, compute)
    if compute.where == "modal":
        trained = remote.train_on_modal(remote.generator_job(dataset, model, train, code), compute, folder, on_log)
    else:
        with stop_on_signals() as stop, threads.limited(compute.threads):
            trained = start.train(dataset, model, train, folder, compute.device, on_log, compute.processes, stop, code)
    show.picture("loss-curve", pictures.loss_curve(run_folder.read_log(folder)), "Flow-matching loss over the training steps")
    if cost := costs.record(folder, model, train, compute, expected):
        log().info(costs.account(cost))
    return trained
