"""The model card: what a release is, what was measured of it, and how to use it. Every number comes from the release's files."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinycats_core.config.training import BaseRelease
from tinycats_core.data import groups, sources
from tinycats_core.evaluation.metrics import DETAILS
from tinycats_core.files import read_json
from tinycats_core.release import card_onnx
from tinycats_core.release import card_sections as sections
from tinycats_core.release.card_sections import number, table
from tinycats_core.release.card_words import FILES, HEADLINES

TASK = "unconditional-image-generation"
PARTS = ("sweep", "data", "metrics", "benchmark", "decision", "release_config")


def model_card(
    folder: Path, name: str, version: str, kept: Mapping[str, Sequence[str]] | None = None, repo_id: str | None = None
) -> str:
    """Return the README.md of a release from the JSON files that already lie in its folder.

    Args:
        kept: by stage, the files that changed after its result was made, which was used all the same.
        repo_id: where it is published on the Hub, `owner/name`; None: in a folder.
    """
    facts = {part: read_json(folder / f"{part}.json") for part in PARTS}
    header = _header(name, facts["data"], facts["metrics"]["candidate"], sections.base_of(facts["release_config"]))
    body = [*_front(name, version, repo_id, facts, kept or {}), *_details(folder, facts)]
    return f"---\n{header}\n---\n\n" + "\n\n".join(body) + "\n"


def _header(name: str, data: Mapping[str, Any], candidate: Mapping[str, Any], base: BaseRelease | None) -> str:
    """Return the YAML header that the Hub reads. The model index has no standard errors and no ends of intervals."""
    from huggingface_hub import EvalResult, ModelCardData

    source, group = sources.find(data["source"]), candidate["conditions"].get("group")
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Class-conditional image generation",
            dataset_type=source.dataset_id,
            dataset_name=source.dataset_name,
            dataset_split="test",
            dataset_args={"group": group} if group else None,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in candidate["metrics"].items()
        if value is not None and not metric.endswith(("_std", *DETAILS))
    ]
    header = ModelCardData(
        license=source.licence,
        license_name=source.licence_name,
        license_link="LICENSE" if source.licence == "other" else None,
        datasets=list(source.hub_datasets) or None,
        library_name="tinycats",
        base_model=base.source.removeprefix("hub:") if base and base.source.startswith("hub:") else None,
        pipeline_tag=TASK,
        tags=["cats", "flow-matching", "diffusion-transformer", "class-conditional", "onnx"],
        model_name=name,
        eval_results=results,
    )
    return header.to_yaml()


def _front(name: str, version: str, repo_id: str | None, facts: Mapping[str, Any], kept: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what everybody should read: the picture, five figures, how to use it, the verdict and the limits."""
    data, metrics, benchmark = facts["data"], facts["metrics"], facts["benchmark"]
    candidate = metrics["candidate"]
    return [
        f"# {name}",
        "![Samples, a row a class](samples/grid.png)",
        _opening(version, data, benchmark),
        _headlines(candidate),
        *_use(data["classes"][0], name, repo_id),
        *sections.verdict(facts["decision"]),
        *sections.kept(kept),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in sections.limits(data, candidate)),
        f"## Training data\n\n{sources.find(data['source']).note} {number(data['train_count'])} images to train on, "
        f"{number(data['val_count'])} to choose by, {number(data['test_count'])} to measure with.",
        *sections.base(facts["release_config"]),
    ]


def _details(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """Return what is folded: every measurement, how it was made, and where the numbers are."""
    metrics, benchmark = facts["metrics"], facts["benchmark"]
    present = [[f"`{file}`", what] for file, what in FILES.items() if file == "release.json" or (folder / file).exists()]
    folded = {
        "All measurements": [
            *sections.measurements(metrics, benchmark),
            *sections.classes(metrics["candidate"]["classes"]),
            *sections.neighbours(folder / "samples" / "neighbours.png"),
        ],
        "Choice of weights and guidance": [
            *sections.choice(facts["sweep"], folder / "samples" / "course.png"),
            *sections.raw(folder / "samples" / "ema_and_raw.png"),
        ],
        "ONNX files and speed": [
            *card_onnx.onnx(benchmark),
            *card_onnx.graphs(benchmark),
            *card_onnx.precision(folder / "precision.json"),
            *card_onnx.speed(benchmark["inference"]),
        ],
        "Breed classifier": sections.classifier(folder / "classifier.json"),
        "Training": sections.training(folder / "training_cost.json"),
        "Files": [
            table(["file", "holds"], present),
            "`tinycats verify .` checks every file against `release.json`.",
        ],
    }
    return [
        f"<details>\n<summary>{title}</summary>\n\n" + "\n\n".join(texts) + "\n\n</details>"
        for title, texts in folded.items()
        if texts
    ]


def _opening(version: str, data: Mapping[str, Any], benchmark: Mapping[str, Any]) -> str:
    parameters = next((facts["parameters"] for facts in benchmark["onnx"].values() if "parameters" in facts), None)
    size, classes = data["image_size"], data["classes"]
    return (
        f"Version `{version}`. A small diffusion transformer (TinyDiT) that draws {size} × {size} pictures of "
        f"{len(classes)} classes, trained by flow matching: {', '.join(classes)}."
        + (f" It has {number(parameters)} parameters." if parameters else "")
    )


def _headlines(candidate: Mapping[str, Any]) -> str:
    """Return the table of the figures that say most, beside the same figures of real images."""
    extractor = candidate["conditions"]["extractor"]
    names = [name.format(extractor=extractor, frechet="fid" if extractor == "inception" else "fd") for name in HEADLINES]
    known = [name for name in names if name in candidate["metrics"]]
    group = candidate["conditions"].get("group")
    columns = {f" ({group})" if group else "": candidate}
    columns |= {f" ({of['name']})": of for of in candidate.get("groups", ()) if of["name"] == groups.ALL}
    heads = [head + ending for ending in columns for head in ("this model", "real images")]
    rows = [
        [
            f"`{name}`",
            *(number(of[kind].get(name)) for of in columns.values() for kind in ("metrics", "floor")),
            sections.meaning(name),
        ]
        for name in known
    ]
    return table(["headline", *heads, "what it is"], rows)


def _use(example: str, name: str, repo_id: str | None) -> list[str]:
    folder = name if repo_id else "RELEASE"
    download = f"hf download {repo_id} --local-dir {folder}\n" if repo_id else ""
    library = "huggingface_hub " if repo_id else ""
    where = "" if repo_id else f" `{folder}` is the folder of this file."
    return [
        f"## Use\n\nThis draws four images of a class, with the sampler and the settings that were measured.{where}\n\n"
        f"```sh\npip install {library}numpy onnxruntime\n{download}"
        f"python {folder}/sample.py --class {shlex.quote(example)} -n 4 --out cats\n```\n\n"
        f"Without `--class` it draws every class; `python {folder}/sample.py --help` lists the other options.",
        "With tinycats installed, the same in Python:\n\n"
        f'```python\nimport tinycats_core\n\ncats = tinycats_core.load("{repo_id or folder}")\n'
        f'cats.sample("{example}", n=4, seed=3)[0].save("cat.png")\n```',
    ]
