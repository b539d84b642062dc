"""Every night: is what is published still as good as it says? Its files are verified, measured and compared."""

import argparse
import sys

from prefect import flow

from flows.evaluate_model import evaluate
from flows.form import Overrides
from flows.shell import add_settings, run
from tasks.data import locate_data, prepare_data
from tasks.evaluation import decide, present, require_promoted
from tasks.preflight import check_inputs
from tasks.publishing import open_release
from tinycats_core.presets import parse_overrides
from tinycats_core.records import Decision
from tinycats_core.release import shipped


@flow(name="nightly-eval")
def nightly_eval(release: str = "releases/tinycats-smoke/latest", overrides: Overrides = None) -> Decision:
    """Sample from the shipped ONNX file, measure, and compare with the numbers in the release.

    A release is measured once for each configuration; its files are verified every time. One that is worse than it says
    ends the flow as failed, with the event `tinycats.release.regressed`.

    Args:
        release: a release folder, or hub:owner/name.
        overrides: nested settings on top of the release's own, such as {"evaluate": {"tolerance": 3}}.
    """
    opened = open_release(release)
    config = shipped.config(opened, overrides)
    sample = config.sample.single()
    config = locate_data(opened, config)
    check_inputs(config)
    dataset = shipped.require_same_data(opened, prepare_data(config.data))
    config = config.for_classes(len(dataset.classes))
    occasion = f"nightly {opened.version}"
    samples, report = evaluate(shipped.onnx(opened), sample, dataset, config, shipped.classifier(opened), occasion)
    present(report, samples, dataset, f"{opened.name} {opened.version}")
    return require_promoted(decide(report, shipped.onnx_report(opened), opened, config.evaluate), opened.name, "regressed")


def main(arguments: list[str] | None = None) -> int:
    """Run the flow from a shell. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.nightly_eval", description=__doc__)
    parser.add_argument("release", nargs="?", default="releases/tinycats-smoke/latest", help="a release folder, or hub:owner/name")
    add_settings(parser, '{"evaluate": {"tolerance": 3}}', preset=False)
    given = parser.parse_args(arguments)
    return run(lambda: nightly_eval(given.release, parse_overrides(given.overrides)))


if __name__ == "__main__":
    sys.exit(main())
