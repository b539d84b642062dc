"""The sections of the model card on the ONNX files, their precision and their speed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinycats_core.files import read_json
from tinycats_core.release.card_sections import cell, number, table


def onnx(benchmark: Mapping[str, Any]) -> list[str]:
    return [
        "## ONNX files\n\nThe error is that of the velocity, relative to PyTorch in fp32: the largest over several times and "
        "all classes.",
        table(
            ["file", "bytes", "relative error", "allowed"],
            [
                [f"`denoiser-{precision}.onnx`", *(number(facts.get(key)) for key in ("bytes", "relative_error", "tolerance"))]
                for precision, facts in benchmark["onnx"].items()
            ],
        ),
    ]


def graphs(benchmark: Mapping[str, Any]) -> list[str]:
    """Return the section on the ONNX files that hold the whole sampler; none if there are none."""
    if not (rows := benchmark.get("graphs")):
        return []
    keys = ("bytes", "max_abs_diff", "alone_max_abs_diff", "script_max_abs_diff", "tolerance")
    facts = next(iter(rows.values()))
    return [
        "## From noise to image\n\n`cats-*.onnx` hold the network and the whole sampler: `noise` (B, 3, S, S) float32, "
        "`labels` (B,) int64 and `guidance` () float32 go in, `images` (B, 3, S, S) uint8 come out. The differences are those of a "
        "pixel, of 255, from what the sampler draws with the denoiser file: here over "
        f"{number(facts['images'])} images of all classes, in a fresh process with NumPy {facts['alone_numpy']} and onnxruntime "
        f"{facts['alone_onnxruntime']} alone, and by `sample.py` there.",
        table(
            ["file", "bytes", "difference", "without tinycats", "by sample.py", "allowed"],
            [[f"`cats-{precision}.onnx`", *(number(row.get(key)) for key in keys)] for precision, row in rows.items()],
        ),
    ]


def precision(path: Path) -> list[str]:
    """Return the section on the forms of the graph that were compared; none if they were not."""
    if not path.is_file():
        return []
    facts = read_json(path)
    unknown = {
        True: "has instructions for dot products of bytes (VNNI). Without them int8 is slower, how much is not known: "
        "`tinycats bench` measures it on your machine.",
        False: "has no instructions for dot products of bytes (VNNI). With them int8 may be faster: `tinycats bench` measures it.",
        None: "does not say whether it has instructions for dot products of bytes (VNNI), on which the speed of int8 depends: "
        "`tinycats bench` measures it on your machine.",
    }
    head, rows = precision_table(facts)
    return [
        f"## Precision\n\n`cats-{facts['chosen']}.onnx` is recommended, and `sample.py` draws with it unless told otherwise. The "
        f"rule: {facts['rule']}. Each form drew {number(facts['images'])} images from the same noise; the differences are those "
        "of a pixel, of 255, from fp32. The times are of one image.",
        table(head, rows),
        f"The CPU that this was measured on, {facts['cpu']}, {unknown[facts['vnni']]}",
    ]


def precision_table(facts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of forms; KID and the others by group."""
    rows = facts["rows"]
    metrics = [(group["name"], name) for group in rows[0]["groups"] for name in group["metrics"]]
    several = len(rows[0]["groups"]) > 1
    plain = {
        "bytes": "bytes",
        "load_ms": "ms to load",
        "p50_ms": "p50, ms",
        "p95_ms": "p95, ms",
        "max_abs_diff": "largest difference",
        "mean_abs_diff": "mean difference",
    }
    head = ["form", *plain.values(), *(f"{name} ({group})" if several else name for group, name in metrics), "allowed"]
    head += ["recommended"]
    return head, [
        [row["name"], *(number(row[key]) for key in plain)]
        + [number(group["metrics"].get(name)) for group in row["groups"] for name in group["metrics"]]
        + [cell(row["admissible"]), cell(row["chosen"])]
        for row in rows
    ]


def speed(inference: Mapping[str, Any]) -> list[str]:
    """Return the section on how fast each runtime draws, on which machine."""
    rows, sample = inference["rows"], inference["sample"]
    ratio = inference["ratios"].get("fp32_over_int8")
    memory = sorted({f"{row['memory']} ({row['device']})" for row in rows})
    percentiles, batches = rows[0]["latency_ms"], rows[0]["images_per_s"]
    return [
        f"## Speed\n\nWhole images, from noise to pixels, by {sample['sampler']} in {number(sample['steps'])} steps at guidance "
        f"{number(sample['guidance'])}. The percentiles are of the time of one image, in ms, after a warm-up; memory is the "
        f"{', '.join(memory)} at its peak, in MB."
        + (f" The int8 file draws one image {number(ratio)} times as fast as the fp32 file." if ratio else ""),
        table(
            ["runtime", "device", *percentiles, "images", *(f"images/s at {batch}" for batch in batches), "MB", "ms to load"],
            [
                [row["runtime"], row["device"]]
                + [number(value) for value in (*row["latency_ms"].values(), row["repeats"], *row["images_per_s"].values())]
                + [number(row["peak_memory_mb"]), number(row["load_ms"])]
                for row in rows
            ],
        ),
        *(f"- {note}" for note in inference["notes"]),
        ", ".join(f"{key} {value}" for key, value in inference["machine"].items() if value is not None) + ".",
    ]
