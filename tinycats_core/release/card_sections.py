"""The sections of the model card, each from the JSON files of a release."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinycats_core.config.training import BaseRelease
from tinycats_core.data import sources
from tinycats_core.files import read_json
from tinycats_core.release.card_words import ENDINGS, METRICS


def number(value: Any) -> str:
    """Write a number for people: four significant digits, whole numbers in full, a dash for what is not given."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def measurements(metrics: Mapping[str, Any], benchmark: Mapping[str, Any]) -> list[str]:
    candidate = metrics["candidate"]
    group = candidate["conditions"].get("group")
    return [
        "## Measurements\n\nEach number stands beside the floor: the same measurement with real training images in place of "
        "generated ones. A perfect generator would be near the floor, not at zero.",
        *([f"These are the figures of the {group} alone; those of other groups stand below."] if group else []),
        table(["metric", "this model", *_columns(metrics), "floor", "what it is"], _metric_rows(metrics)),
        *by_group(candidate),
        *(f"- {note}" for note in candidate["notes"]),
        "Measured under these conditions (`metrics.json` holds them for the other columns, too):\n\n"
        + table(
            ["condition", "value"],
            [["EMA weights of step", number(benchmark["training"]["step"])], *_flat(candidate["conditions"])],
        ),
    ]


def by_group(candidate: Mapping[str, Any]) -> list[str]:
    """Return the table of the figures of each group; none if there is one group."""
    if not (others := candidate.get("groups")):
        return []
    columns = {candidate["conditions"]["group"]: candidate, **{group["name"]: group for group in others}}
    counts = ", ".join(f"{number(of['conditions']['generated'])} of {name}" for name, of in columns.items())
    cells = [
        [f"`{metric}`", *(number(of[kind].get(metric)) for of in columns.values() for kind in ("metrics", "floor"))]
        for metric in candidate["metrics"]
    ]
    return [
        f"The same by group, each beside real images of that group, the floor. Of the generated images, {counts} were measured. "
        "The class `other` is one group, and the cats are the other classes.",
        table(["metric", *(head for name in columns for head in (name, f"floor of {name}"))], cells),
    ]


def verdict(decision: Mapping[str, Any]) -> list[str]:
    compared = f"compared with version {decision['baseline']}" if decision["baseline"] else "nothing was published before it"
    verdict = f"The gate {'let this version through' if decision['promoted'] else 'refused this version'}; {compared}."
    if why := decision.get("forced"):
        verdict += f" A person published it anyway: {html.escape(why, quote=False)}"
    return [
        verdict,
        table(
            ["term", "value", "bar", "passed"],
            [
                [term["name"], number(term["value"]), number(term["bar"]), "yes" if term["passed"] else "no"]
                for term in decision["terms"]
            ],
        ),
    ]


def kept(kept: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a warning for each stage whose result was made by other code than the rest."""
    return [
        f"The result of the stage `{stage}` was made by earlier code and kept: {', '.join(f'`{file}`' for file in files)} changed "
        "after it was made."
        for stage, files in kept.items()
    ]


def neighbours(path: Path) -> list[str]:
    """Return the section on what the images are nearest to; none if its picture is not in the release."""
    if not path.is_file():
        return []
    return [
        "## Is it a copy?\n\nImages of each class, each with the training image that lies nearest to it, pixel by pixel, at its "
        f"right. `copy_rate` above counts all of them.\n\n![Images and their nearest training images](samples/{path.name})"
    ]


def choice(sweep: Mapping[str, Any], picture: Path) -> list[str]:
    """Return the section on which step, average and guidance were chosen, and by what; with `picture` if it is in the release."""
    low, high = sweep["sample"]["guidance_interval"]
    chosen = (
        f"## Choice\n\nThese are the EMA weights of decay {number(sweep['ema_decay'])} at step {number(sweep['step'])}, drawn with "
        f"guidance {number(sweep['sample']['guidance'])} for t from {number(low)} to {number(high)}. The rule: {sweep['rule']}."
    )
    notes = [f"The training ended {sweep['ended']}."] if sweep["ended"] else []
    notes += [f"Note: {sweep['note']}"] if sweep["note"] else []
    if not sweep["rows"]:
        return [" ".join([chosen, *notes])]
    course = [
        "KID and copy rates at each snapshot of the training; the green line is the step that was chosen.\n\n"
        f"![KID and copy rates over the steps](samples/{picture.name})"
    ]
    count = sweep.get("conditions", {}).get("group_images", sweep["validation_images"])
    against = f"{number(count)} validation images" if sweep["split"] == "val" else "the training images"
    return [
        " ".join(
            [
                f"{chosen} For each row {number(sweep['images'])} images were drawn and held against {against}.",
                "The test images had no say.",
                *notes,
            ]
        ),
        *(course if picture.is_file() else []),
        table(
            sweep["rows"][0],
            [[cell(value) for value in row.values()] for row in sweep["rows"]],
        ),
    ]


def raw(path: Path) -> list[str]:
    """Return the section on what averaging does; none if its picture is not in the release."""
    if not path.is_file():
        return []
    return [
        "## EMA and raw weights\n\nImages of the EMA weights that are shipped, each with the one that the last weights of the "
        "training draw without averaging, at its right: from the same noise, of the same class, by the same settings.\n\n"
        f"![Images of the EMA weights and of the raw ones](samples/{path.name})"
    ]


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(number, value)) if isinstance(value, list) else number(value)


def classes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section on the classes one by one; none if there was no classifier."""
    if not rows:
        return []
    cells = [[row["class"], number(row["breed_accuracy"]), number(row["floor"])] for row in rows]
    return [
        "## Class by class\n\nHow often the breed classifier sees the class that was asked for; the floor is how often it is "
        "right of held-out images of that class.",
        table(["class", "this model", "floor"], cells),
    ]


def classifier(path: Path) -> list[str]:
    """Return the section on the breed classifier; none if the release has none."""
    if not path.is_file():
        return []
    report = read_json(path)
    accuracy, majority, recall = (number(report[key]) for key in ("accuracy", "majority_accuracy", "macro_recall"))
    made, parity = report["conditions"], report["onnx"]
    return [
        f"## Classifier\n\nThe breed classifier ({made['config']['backbone']}) names the class of a share of {accuracy} of the "
        f"{number(made['test_images'])} test images; always naming the commonest class would reach {majority}. The mean of the "
        f"classes' recall is {recall}."
        + (
            f" `classifier.onnx` gives PyTorch's logits but for {number(parity['relative_error'])} of the largest (allowed: "
            f"{number(parity['tolerance'])})."
            if parity
            else ""
        ),
        table(
            ["class", "precision", "recall", "F1", "test images"],
            [[row["class"], *(number(row[key]) for key in ("precision", "recall", "f1", "support"))] for row in report["classes"]],
        ),
    ]


def base_of(settings: Mapping[str, Any]) -> BaseRelease | None:
    """Return the release whose weights the training started from, by the settings of a release."""
    return BaseRelease.parse(str(settings["train"].get("start_from")))


def base(settings: Mapping[str, Any]) -> list[str]:
    """Return where the weights came from; nothing if they began at random."""
    if (base := base_of(settings)) is None:
        return []
    return [
        f"The training started from the weights of `{base.source}`, version `{base.version}` (sha256 `{base.sha256[:12]}…`), which "
        "were trained on the images that its card names. Classes of the same name kept their embedding. The figures of this card "
        "compare with the images of this training alone: they do not see copies of the images of the base."
    ]


def training(path: Path) -> list[str]:
    """Return the section on what the training took; none if it was not recorded."""
    if not path.is_file():
        return []
    cost = read_json(path)
    gpus = f"{number(cost['gpus'])} × {cost['gpu']} of Modal ({cost['device']})" if cost["gpu"] else cost["device"]
    money = cost["charge"] if cost["dollars"] is None else f"${number(cost['dollars'])}, {cost['charge']}"
    again = f", steps run: {number(cost['steps_run'])}" if cost["steps_run"] > cost["steps"] else ""
    return [
        f"## Training\n\n{number(cost['steps'])} steps in {number(cost['hours'])} hours at {number(cost['images_per_s'])} images/s "
        f"on {gpus}, {cost['precision']}, attempts: {number(cost['attempts'])}{again}; {money}."
    ]


def _columns(metrics: Mapping[str, Any]) -> list[str]:
    return [*metrics["onnx"], *(["published before"] if metrics["baseline"] else [])]


def _metric_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    candidate = metrics["candidate"]
    others = [*metrics["onnx"].values(), *([metrics["baseline"]] if metrics["baseline"] else [])]
    return [
        [
            f"`{metric}`",
            number(value),
            *(number(other["metrics"].get(metric)) for other in others),
            number(candidate["floor"].get(metric)),
            meaning(metric),
        ]
        for metric, value in candidate["metrics"].items()
    ]


def meaning(metric: str) -> str:
    said = next((meaning for ending, meaning in ENDINGS.items() if metric.endswith(ending)), None)
    return said or METRICS.get(metric) or METRICS.get(metric.split("_")[0], "")


def limits(data: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[str]:
    shares = [candidate[of].get(name) for name in ("copy_rate", "altered_copy_rate") for of in ("metrics", "floor")]
    copies, real, altered, real_altered = shares
    limits = [
        f"It draws {data['image_size']} × {data['image_size']} pixels and knows {len(data['classes'])} class names; "
        "it understands no text.",
        "Whether it repeats training images has not been measured here."
        if copies is None
        else f"Of its {candidate['conditions'].get('group', 'images')} a share of {number(copies)} lies three times nearer to one "
        f"training image than to any other, pixel by pixel; of the test images, which nobody could copy, {number(real)}. "
        f"With copies that are mirrored, turned by up to 18 degrees, cropped or recoloured, the shares are {number(altered)} and "
        f"{number(real_altered)}. Copies in other poses, or of a part of an image, are not counted.",
    ]
    if any(metric.endswith("_breed") for metric in candidate["metrics"]):
        limits.append(
            "The judge's features come from a breed classifier trained on the same data, not from Inception: these numbers "
            "compare versions of this model with each other and with nothing else."
        )
    return [*limits, *sources.find(data["source"]).limits]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", cell(item)])
    return rows


def table(head: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
