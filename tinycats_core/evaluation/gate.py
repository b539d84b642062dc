"""The gate: decides whether a candidate may be published, and gives the reasons, term by term."""

import math
from pathlib import Path

from tinycats_core.config import OTHER, EvaluateConfig
from tinycats_core.errors import ReleaseRejected
from tinycats_core.evaluation.fidelity import NOT_COMPARED
from tinycats_core.files import sha256_of, write_json
from tinycats_core.records import Decision, FidelityReport, Term

# Bars that need no configuration and apply to a first release too. They refuse a network that has learnt nothing or
# repeats the same pictures, and let a weak but honest one pass.
TRIVIAL_SHARE = 0.75  # of the least KID of the generators that have learnt nothing: noise and the mean image
SIGHTED_ERRORS, SIGHTED_KID = 5, 1e-3  # by which the KID of those must exceed that of real images: standard errors, KID
MIN_SPREAD = 0.2  # of the real images' variance of the features within a class
MIN_DISTINCT = 0.5  # share of images that are not copies of another
MIN_AUTHENTIC = 0.5  # of the authenticity of the test images
MIN_COVERAGE = 0.05  # of the coverage of real training images
KEPT_MARGIN = 0.05  # by which coverage and breed accuracy may fall below the published ones; CHANCE_ERRORS if that is more
CHANCE_ERRORS = 3  # standard errors that a share may be off by chance: no term should refuse the same model again


def decide(
    candidate: FidelityReport,
    published: FidelityReport | None,
    published_version: str | None,
    config: EvaluateConfig,
    folder: Path,
    force: str | None = None,
) -> Decision:
    """Compare a candidate with the built-in bars, the configured bars and the published model.

    Where the cats are a group, all of these hold for the cats. Writes `folder/decision.json`. All terms must pass. KID may
    exceed the published one by `config.tolerance` standard errors of the difference: those over other generated images, since
    both models are compared with the same real images. Figures measured under other conditions are not compared: that is a
    failed term.

    Args:
        published: the published model, measured on the same images with the same extractor; None for a first release.
        published_version: its version, for the record.
        force: why a person publishes the candidate even if it is refused. Recorded only if it is.

    Raises:
        TinycatsError: a report is missing or has changed since it was written.
    """
    terms = [*_built_in(candidate.verify()), *_configured(candidate, config)]
    if published is not None:
        terms += _against(candidate, published.verify(), config.tolerance)
    promoted = all(term.passed for term in terms)
    baseline = published_version if published is not None else None
    path = folder / "decision.json"
    reports = {"candidate": candidate.sha256, "published": published.sha256 if published is not None else None}
    dumped = [term.model_dump(mode="json") for term in terms]
    facts = {"promoted": promoted, "baseline": baseline, "forced": None if promoted else force}
    write_json(path, {**facts, "reports": reports, "terms": dumped})
    return Decision(path=path, sha256=sha256_of(path), terms=tuple(terms), **facts)


def require_promoted(decision: Decision) -> Decision:
    """Return the decision if the candidate is promoted or forced. Raises ReleaseRejected, which names every failed term."""
    if not decision.promoted and decision.forced is None:
        failed = "; ".join(f"{term.name}: {term.why}" for term in decision.terms if not term.passed)
        raise ReleaseRejected(f"not published. {failed}. All terms are in {decision.path}.", decision)
    return decision


def _built_in(report: FidelityReport) -> list[Term]:
    trivial = report.conditions["trivial_kid"]
    best = min(trivial, key=lambda name: trivial[name])
    infinite = sorted(name for name, value in report.metrics.items() if value is not None and not math.isfinite(value))
    return [
        Term(
            name="finite",
            value=len(infinite),
            bar=0,
            passed=not infinite,
            why=f"metrics that are not finite: {', '.join(infinite) or 'none'}",
        ),
        _sighted(report, trivial[best], best),
        _learnt(report),
        _at_least("varied", report, "spread", MIN_SPREAD, "of the real images' variety within a class"),
        _at_least("distinct", report, "distinct", MIN_DISTINCT, "the share that are no copies"),
        _at_least("covered", report, "coverage", MIN_COVERAGE * (report.floor["coverage"] or 0), "of what training images cover"),
        _no_copies("no_copies", report, "copy_rate"),
        _no_copies("no_altered_copies", report, "altered_copy_rate"),
        _at_least(
            "authentic", report, "authenticity", MIN_AUTHENTIC * (report.floor["authenticity"] or 0), "of what test images have"
        ),
        *_obeys(report),
        *_other(report),
    ]


def _other(report: FidelityReport) -> list[Term]:
    """Require of the images of `other`, whose quality is not judged, what holds for any image: neither noise nor a copy."""
    if (other := report.of_group(OTHER)) is None:
        return []
    terms = (
        _learnt(other).model_copy(update={"name": "other_learnt"}),
        _no_copies("other_no_copies", other, "copy_rate"),
        _no_copies("other_no_altered_copies", other, "altered_copy_rate"),
    )
    return [term.model_copy(update={"why": f"of the images of {OTHER}, {term.why}"}) for term in terms]


def _learnt(report: FidelityReport) -> Term:
    """Require that the images are clearly nearer to real ones than those of a generator that has learnt nothing."""
    trivial = report.conditions["trivial_kid"]
    best = min(trivial, key=lambda name: trivial[name])
    return _at_most("learnt", report, _kid(report), TRIVIAL_SHARE * trivial[best], f"{TRIVIAL_SHARE:g} of what {best} has")


def _sighted(report: FidelityReport, trivial: float, name: str) -> Term:
    """Require that the extractor separates a trivial generator from real images; otherwise its figures mean nothing."""
    kid = _kid(report)
    floor, error = report.floor[kid] or 0, report.floor[f"{kid}_std"] or 0
    bar = floor + max(SIGHTED_ERRORS * error, SIGHTED_KID)
    passed = trivial >= bar
    limit = f"at least {bar:.4g} (the floor, plus {SIGHTED_ERRORS} standard errors): else the {kid} of anything is good"
    return _term("sighted", f"{kid} of {name}", trivial, bar, passed, limit)


def _no_copies(name: str, report: FidelityReport, metric: str) -> Term:
    """Require that images are copies of training images no more often than real images are by chance.

    These are the test images, and the training images held against each other.
    """
    counts, left_out = report.conditions, report.conditions["left_out"]
    rates = [(report.floor[metric] or 0, counts["reference"]), (left_out[metric], left_out["images"])]
    images = sum(count for _, count in rates)
    real = sum(rate * count for rate, count in rates) / images
    bar = copy_bar(real, counts["generated"], images)
    return _at_most(name, report, metric, bar, f"the {real:.4g} of {images:,} real images, plus {CHANCE_ERRORS} standard errors")


def copy_bar(real: float, generated: int, images: int) -> float:
    """Return the highest copy rate that passes, given that of real images, the number of generated images and of real ones."""
    return real + CHANCE_ERRORS * _error_of_difference(real, generated, images)


def _obeys(report: FidelityReport) -> list[Term]:
    """Require that images show the classes that were asked for more often than the same images in random order."""
    if (chance := report.conditions["trivial_accuracy"]) is None:
        return []
    bar = chance + CHANCE_ERRORS * math.sqrt(chance * (1 - chance) / report.conditions["generated"])
    return [
        _at_least("obeys", report, "breed_accuracy", bar, f"shuffled labels' {chance:.4g}, plus {CHANCE_ERRORS} standard errors")
    ]


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
    comparable = Term(
        name="comparable",
        value=mine["conditions_hash"][:12],
        bar=theirs["conditions_hash"][:12],
        passed=same,
        why="both were measured under the same conditions" if same else other,
    )
    if not same:
        return [comparable]
    kid, old = _kid(candidate), published.metrics
    error = math.hypot(candidate.metrics[f"{kid}_drawn_std"] or 0, old.get(f"{kid}_drawn_std") or 0)
    bar = (old.get(kid) or 0) + tolerance * error
    terms = [_at_most("not_worse", candidate, kid, bar, f"published, plus {tolerance:g} standard errors of {error:.2g}")]
    for name, metric, images in (("coverage_kept", "coverage", "reference"), ("breeds_kept", "breed_accuracy", "generated")):
        if (share := old.get(metric)) is not None:
            margin = max(KEPT_MARGIN, CHANCE_ERRORS * _error_of_difference(share, mine[images], mine[images]))
            terms.append(_at_least(name, candidate, metric, share - margin, f"published, less {margin:.2g}"))
    return [comparable, *terms]


def _error_of_difference(share: float, count: int, other: int) -> float:
    """Return the standard error of the difference of two shares whose true values are equal.

    Two hits and two misses are added first (Agresti and Coull, 1998), so that a share of 0 has an error too.
    """
    likely = (share * other + 2) / (other + 4)
    return math.sqrt(likely * (1 - likely) * (1 / count + 1 / other))


def _kid(report: FidelityReport) -> str:
    return f"kid_{report.conditions['extractor']}"


def _at_most(name: str, report: FidelityReport, metric: str, bar: float, what: str) -> Term:
    value = report.metrics.get(metric)
    return _term(name, metric, value, bar, value is not None and value <= bar, f"at most {bar:.4g} ({what})")


def _at_least(name: str, report: FidelityReport, metric: str, bar: float, what: str) -> Term:
    value = report.metrics.get(metric)
    return _term(name, metric, value, bar, value is not None and value >= bar, f"at least {bar:.4g} ({what})")


def _term(name: str, metric: str, value: float | None, bar: float, passed: bool, limit: str) -> Term:
    measured = "was not measured" if value is None else f"is {value:.4g}"
    finite = value if value is not None and math.isfinite(value) else None  # JSON has no nan or inf
    return Term(name=name, value=finite, bar=bar, passed=passed, why=f"{metric} {measured}; it must be {limit}")
