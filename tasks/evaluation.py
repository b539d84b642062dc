"""The evaluation stages: measure fidelity, and decide whether a candidate may be published."""

import pandas as pd
from prefect import task

from tasks import show
from tasks.cache import key_of, uncached
from tasks.runs import log, ran_nothing, tally
from tasks.sampling import show_samples
from tasks.stage import stage
from tinycats_core.config import ComputeConfig, EvaluateConfig, ReleaseConfig
from tinycats_core.data import splits
from tinycats_core.evaluation import fidelity, gate, memorization
from tinycats_core.files import home
from tinycats_core.generator import sampling
from tinycats_core.records import Dataset, Decision, FidelityReport, Release, SampleSet, Weights


def judge_needs_classifier(config: ReleaseConfig) -> bool:
    """Return whether the breed classifier is the feature extractor or has a bar of its own."""
    return config.evaluate.extractor == "breed" or config.evaluate.min_breed_accuracy is not None


@stage(fidelity.evaluate)
def measure(
    samples: SampleSet, dataset: Dataset, config: EvaluateConfig, classifier: Weights | None, compute: ComputeConfig
) -> FidelityReport:
    """Measure the images against the test images, beside real images as the floor."""
    report = fidelity.evaluate(samples, dataset, config, classifier, home("evaluations"), compute.device)
    frame = show.report_frame(report, "generated")
    show.table("fidelity", frame, f"{samples.settings['runtime']}: {samples.count} images against the test images")
    if report.classes:
        rows = pd.DataFrame([row.model_dump() for row in report.classes])
        show.table("breed-accuracy", rows, "How often the classifier predicts the class that was asked for")
    images, labels = sampling.load_samples(samples)
    train, scale = splits.load_split(dataset, "train")[0], max(1, 64 // dataset.image_size)
    sheet = memorization.neighbour_sheet(images, labels, train, dataset.classes, scale)
    show.picture("nearest-training-images", sheet, "Images, each with the nearest training image to its right")
    for note in report.notes:
        log().warning(note)
    return report


def present(report: FidelityReport, samples: SampleSet, dataset: Dataset, title: str) -> FidelityReport:
    """Print the figures, and whether they come from the cache; then show them and the images as the stages would have."""
    frame = show.report_frame(report, "measured")
    if ran_nothing():
        show.table("fidelity", frame, title)
        show_samples(samples, dataset)
    print(f"{title}: {tally()}", frame.to_string(index=False), report.path, sep="\n\n")
    return report


@task
@uncached(gate.decide)
def decide(
    report: FidelityReport,
    baseline: FidelityReport | None,
    published: Release | None,
    config: EvaluateConfig,
    force: str | None = None,
) -> Decision:
    """Compare the candidate with the bars and with the published release. Not cached, so that every run shows it."""
    folder = home("decisions") / key_of(report, baseline, config, *([force] if force else []))
    decision = gate.decide(report, baseline, published.version if published else None, config, folder, force)
    columns = {
        "candidate": report.metrics,
        f"published {decision.baseline}": baseline.metrics if baseline else None,
        **show.columns_of(report, "candidate"),
    }
    show.table("fidelity-compared", show.metrics_frame(columns), "The candidate beside the published release and the floor")
    verdict = "promoted" if decision.promoted else "rejected"
    show.table("decision", pd.DataFrame([term.model_dump() for term in decision.terms]), f"The candidate is {verdict}")
    log().info("the candidate is %s", verdict)
    if force:
        log().warning("published anyway: %s" if decision.forced else "the gate lets it through; no force is needed: %s", force)
    return decision


@task
def require_promoted(decision: Decision, name: str, otherwise: str = "rejected") -> Decision:
    """Stop the run if the candidate was rejected and nobody forces it, and emit the event `tinycats.release.<otherwise>`."""
    if not decision.promoted and decision.forced is None:
        failed = {term.name: term.why for term in decision.terms if not term.passed}
        show.event(f"tinycats.release.{otherwise}", f"tinycats.release.{name}", failed)
        reasons = "\n".join(f"- **{term}**: {why}" for term, why in failed.items())
        show.markdown("reason", reasons, f"{name} is {otherwise}, because:")
    return gate.require_promoted(decision)
