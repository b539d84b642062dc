"""The whole release: from images to a published, measured cat generator. Read the flow: it is the product."""

import argparse
import sys

from prefect import flow

from flows.evaluate_model import evaluate, evaluate_published
from flows.form import Overrides, Preset
from flows.shell import add_settings, run, settings
from tasks.budget import measure_and_choose, plan_budget
from tasks.cache import used_code
from tasks.data import prepare_data, validate_data
from tasks.evaluation import decide, judge_needs_classifier, require_promoted
from tasks.export import (
    benchmark_inference,
    check_onnx,
    choose_precision,
    export_classifier,
    export_forms,
    export_graph,
    export_onnx,
    quantize,
)
from tasks.preflight import check_force, check_ready, configure, find_base, fit_to_data
from tasks.publishing import (
    build_bundle,
    find_published,
    find_web_runtime,
    is_release_of,
    publish,
    publish_space,
    read_back,
    show_plan,
    summarize,
    wait_for_approval,
)
from tasks.sampling import compare_with_raw
from tasks.sweep import choose_sampling, train_and_watch
from tasks.training import train_classifier
from tinycats_core.records import Release, ReleaseParts
from tinycats_core.release.forms import shipped


@flow(name="release-model")
def release_model(
    preset: Preset = "smoke",
    overrides: Overrides = None,
    keep_results: bool = False,
    force: str | None = None,
    dry_run: bool = False,
) -> Release:
    """Train, judge and publish a cat generator. The same parameters again find everything done.

    Args:
        preset: smoke, photos, standard, budget, high-accuracy, aggressive or max-quality.
        overrides: nested settings on top of the preset, such as {"train": {"steps": 100}}.
        keep_results: use finished results of a stage although its code has changed since; the release records it.
        force: why the release is published even if the gate refuses it. Recorded in decision.json and on the card.
        dry_run: print what publishing would change, and publish nothing.
    """
    config, reason = configure(preset, overrides, keep_results), check_force(force)
    config = find_base(config)
    check_ready(config)
    config, speeds = measure_and_choose(config, overrides)

    dataset = prepare_data(config.data)
    validate_data(dataset, config.data)
    config, clock = plan_budget(fit_to_data(config, dataset), dataset, speeds, overrides)
    published, runtime = find_published(config.publish), find_web_runtime(config.publish)
    if is_release_of(published, config, dataset, runtime):
        return summarize(published, "already published")

    classifier = train_classifier(dataset, config.classifier, config.compute) if judge_needs_classifier(config) else None
    baseline = evaluate_published(published, dataset, config, classifier).report if published else None
    trained, course = train_and_watch(dataset, config, classifier, clock)
    choice = choose_sampling(trained, course, dataset, config.sample, config.evaluate, classifier, config.compute)
    compared = compare_with_raw(choice.weights, trained.raw, choice.sample, config.compute)
    samples, report = evaluate(choice.weights, choice.sample, dataset, config, classifier)
    decision = require_promoted(decide(report, baseline, published, config.evaluate, reason), config.publish.name)

    fp32 = check_onnx(choice.weights, export_onnx(choice.weights, config.export), config.export)
    int8 = check_onnx(choice.weights, quantize(fp32), config.export) if config.export.int8 else None
    onnx_report = evaluate(int8 or fp32, choice.sample, dataset, config, classifier).report

    models = (fp32, int8) if int8 else (fp32,)
    graphs = [export_graph(model, choice.sample, config.export) for model in models]
    graphs += export_forms(choice.weights, fp32, choice.sample, config.export)
    speed = benchmark_inference(choice.weights, graphs, choice.sample, config.compute)
    precision = choose_precision(graphs, speed, dataset, choice.sample, config.evaluate, config.export, classifier, config.compute)
    parts = ReleaseParts(
        config=config,
        dataset=dataset,
        choice=choice,
        samples=samples,
        report=report,
        decision=decision,
        models=models,
        graphs=shipped(graphs, precision.chosen),
        classifier=classifier,
        classifier_onnx=export_classifier(classifier, dataset, config.export) if classifier else None,
        baseline=baseline,
        onnx_reports=(onnx_report,),
        precision=precision,
        inference=speed,
        ema_and_raw=compared,
        web_runtime=runtime,
        code=used_code("build_bundle"),
        parent=published.as_parent if published else None,
    )
    release = build_bundle(parts)
    if dry_run:
        return show_plan(release, config.publish, decision.baseline)
    wait_for_approval(config.publish, release)
    sent = read_back(publish(release, config.publish, decision.baseline), config.publish)
    publish_space(release, config.publish)
    return summarize(sent, "published")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow from a shell. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.release_model", description=__doc__)
    add_settings(parser, '{"train": {"steps": 100}}')
    parser.add_argument("--keep-results", action="store_true", help="use finished results of stages whose code has changed since")
    parser.add_argument("--force", metavar="WHY", help="publish it even if the gate refuses it, and record why")
    parser.add_argument("--dry-run", action="store_true", help="print what publishing would change, and publish nothing")
    given = parser.parse_args(arguments)
    chosen = {"keep_results": given.keep_results, "force": given.force, "dry_run": given.dry_run}
    return run(lambda: release_model(**settings(given), **chosen))


if __name__ == "__main__":
    sys.exit(main())
