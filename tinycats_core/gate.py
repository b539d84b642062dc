"""The gate: decides whether a candidate may be published, and says why, term by term."""

import math
from pathlib import Path
from typing import Any

from tinycats_core.config import EvaluateConfig
from tinycats_core.errors import ReleaseRejected
from tinycats_core.fidelity import NOT_COMPARED
from tinycats_core.files import sha256_of, write_json
from tinycats_core.records import Decision, FidelityReport

# The bars that hold without any configuration, also for a first release. They refuse a network that has learnt nothing
# or draws the same pictures again and again, and are meant to let a weak but honest one pass.
TRIVIAL_SHARE = 0.75  # of the KID of the best of the generators that have learnt nothing: noise, and the mean image
SIGHTED_ERRORS, SIGHTED_KID = 5, 1e-3  # by which the KID of those must at least lie above that of real images
MIN_SPREAD = 0.2  # of the features' variance within a class, by that of the real images
MIN_DISTINCT = 0.5  # share of images that are no copy of another
BREED_MARGIN = 0.05  # by which the breed accuracy may fall: more than twice the noise of a difference at N = 1,000

Term = dict[str, Any]


def decide(
    candidate: FidelityReport,
    published: FidelityReport | None,
    published_version: str | None,
    config: EvaluateConfig,
    folder: Path,
) -> Decision:
    """Hold a candidate against the built-in bars, the configured ones, and what is published.

    Writes `folder/decision.json`. Each term has name, value, bar, passed and why; all must pass. KID may exceed the
    published one by `config.tolerance` standard errors of the difference. Numbers measured under other conditions are
    not compared: that is a failed term.

    Args:
        published: the published model, measured on the same images with the same eyes; None for a first release.
        published_version: its version, for the record.

    Raises:
        TinycatsError: a report is missing or has changed since it was written.
    """
    terms = [*_built_in(candidate.verify()), *_configured(candidate, config)]
    if published is not None:
        terms += _against(candidate, published.verify(), config.tolerance)
    promoted = all(term["passed"] for term in terms)
    baseline = published_version if published is not None else None
    path = folder / "decision.json"
    reports = {"candidate": candidate.sha256, "published": published.sha256 if published is not None else None}
    write_json(path, {"promoted": promoted, "baseline": baseline, "reports": reports, "terms": terms})
    return Decision(path=path, sha256=sha256_of(path), promoted=promoted, terms=tuple(terms), baseline=baseline)


def require_promoted(decision: Decision) -> Decision:
    """Return a decision that lets the candidate pass. Raises ReleaseRejected, which names every term that failed."""
    if not decision.promoted:
        failed = "; ".join(f"{term['name']}: {term['why']}" for term in decision.terms if not term["passed"])
        raise ReleaseRejected(f"not published. {failed}. All terms are in {decision.path}.", decision)
    return decision


def _built_in(report: FidelityReport) -> list[Term]:
    trivial = report.conditions["trivial_kid"]
    best = min(trivial, key=lambda name: trivial[name])
    infinite = sorted(name for name, value in report.metrics.items() if value is not None and not math.isfinite(value))
    return [
        {
            "name": "finite",
            "value": len(infinite),
            "bar": 0,
            "passed": not infinite,
            "why": f"metrics that are not finite: {', '.join(infinite) or 'none'}",
        },
        _sighted(report, trivial[best], best),
        _at_most("learnt", report, _kid(report), TRIVIAL_SHARE * trivial[best], f"{TRIVIAL_SHARE:g} of what {best} has"),
        _at_least("varied", report, "spread", MIN_SPREAD, "of the real images' variety within a class"),
        _at_least("distinct", report, "distinct", MIN_DISTINCT, "the share that are no copies"),
    ]


def _sighted(report: FidelityReport, trivial: float, name: str) -> Term:
    """Whether the extractor tells a generator that knows nothing from real images: else its numbers say nothing."""
    kid = _kid(report)
    floor, error = report.floor[kid] or 0, report.floor[f"{kid}_std"] or 0
    bar = floor + max(SIGHTED_ERRORS * error, SIGHTED_KID)
    passed = trivial >= bar
    limit = f"at least {bar:.4g} (the floor, plus {SIGHTED_ERRORS} standard errors): else the {kid} of anything is good"
    return _term("sighted", f"{kid} of {name}", trivial, bar, passed, limit)


def _configured(report: FidelityReport, config: EvaluateConfig) -> list[Term]:
    terms = []
    if config.max_kid is not None:
        terms.append(_at_most("max_kid", report, _kid(report), config.max_kid, "evaluate.max_kid"))
    if config.min_recall is not None:
        terms.append(_at_least("min_recall", report, "recall", config.min_recall, "evaluate.min_recall"))
    if config.min_breed_accuracy is not None:
        bar = config.min_breed_accuracy
        terms.append(_at_least("min_breed_accuracy", report, "breed_accuracy", bar, "evaluate.min_breed_accuracy"))
    return terms


def _against(candidate: FidelityReport, published: FidelityReport, tolerance: float) -> list[Term]:
    mine, theirs = candidate.conditions, published.conditions
    same = mine["conditions_hash"] == theirs["conditions_hash"]
    differ = sorted(key for key in {*mine, *theirs} - {*NOT_COMPARED} if mine.get(key) != theirs.get(key))
    other = f"the published model was measured under other conditions ({', '.join(differ)}): measure it again"
    comparable = {
        "name": "comparable",
        "value": mine["conditions_hash"][:12],
        "bar": theirs["conditions_hash"][:12],
        "passed": same,
        "why": "both were measured under the same conditions" if same else other,
    }
    if not same:
        return [comparable]
    kid, old = _kid(candidate), published.metrics
    error = math.hypot(candidate.metrics[f"{kid}_std"] or 0, old[f"{kid}_std"] or 0)
    bar = (old[kid] or 0) + tolerance * error
    terms = [_at_most("not_worse", candidate, kid, bar, f"published, plus {tolerance:g} standard errors of {error:.2g}")]
    accuracy = old.get("breed_accuracy")
    if accuracy is not None:
        bar = accuracy - BREED_MARGIN
        terms.append(_at_least("breeds_kept", candidate, "breed_accuracy", bar, f"published, less {BREED_MARGIN:g}"))
    return [comparable, *terms]


def _kid(report: FidelityReport) -> str:
    return f"kid_{report.conditions['extractor']}"


def _at_most(name: str, report: FidelityReport, metric: str, bar: float, what: str) -> Term:
    value = report.metrics.get(metric)
    return _term(name, metric, value, bar, value is not None and value <= bar, f"at most {bar:.4g} ({what})")


def _at_least(name: str, report: FidelityReport, metric: str, bar: float, what: str) -> Term:
    value = report.metrics.get(metric)
    return _term(name, metric, value, bar, value is not None and value >= bar, f"at least {bar:.4g} ({what})")


def _term(name: str, metric: str, value: float | None, bar: float, passed: bool, limit: str) -> Term:
    found = "was not measured" if value is None else f"is {value:.4g}"
    finite = value if value is not None and math.isfinite(value) else None  # JSON knows no other
    why = f"{metric} {found}; it must be {limit}"
    return {"name": name, "value": finite, "bar": bar, "passed": passed, "why": why}
