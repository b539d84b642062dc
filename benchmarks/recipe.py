"""The recipe by measurement: networks trained for equal compute, one thing changed in each, judged on images not trained on.

    python -m benchmarks.recipe --photos FOLDER             # every row
    python -m benchmarks.recipe --photos FOLDER rope muon   # some
    python -m benchmarks.recipe --photos FOLDER --against ancestor

A row is trained with several seeds on one core each, for as many steps as fit into `--seconds` of processor time, and
judged on the validation split: KID with its interval, FID, recall, copy rate. Without --photos it is drawn toy cats. A row
that is measured again takes the old one's place in `benchmarks/results/recipe.json`, from which `docs/recipe.md` is made.

`--against ancestor` trains the standing recipe and the one that this project began with, each for an hour on a core of its
own, and judges both once on the test split.
"""

import argparse
import json
import logging
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.common import RESULTS, ROOT, cores, machine, report, versions

DOCUMENT = ROOT / "docs" / "recipe.md"
PICTURES = ROOT / "docs" / "recipe"
BASE = {  # where every row starts; one thing of it is changed
    "model": {"image_size": 32, "patch_size": 8, "width": 192, "depth": 4, "heads": 6, "prediction": "x"},
    "train": {
        "batch_size": 16,
        "lr": 2e-3,
        "ema_decays": [0.999],
        "timesteps": "logit_normal",
        "timestep_mean": -0.8,
        "timestep_std": 0.8,
    },
    "sample": {"guidance": 1.5},
}
WARM_UP = 0.02  # of the steps


@dataclass(frozen=True)
class Row:
    """One experiment: what it is called, what it changes, and how."""

    name: str
    what: str
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)
    network: str = "TinyDiT"  # of benchmarks.variants
    draw: str = "draw_batch"  # likewise
    optimizer: str = "make_optimizer"
    noise: float = 1.0  # standard deviation of x_0
    weights: str = "ema"  # what is sampled: ema | raw

    @property
    def training(self) -> str:
        """What decides the weights: rows that share it are trained once."""
        return json.dumps([self.model, self.train, self.network, self.draw, self.optimizer, self.noise], sort_keys=True)


ROWS = [
    Row("base", "x from patches of 8, AdamW at 2e-3, batches of 16, logit-normal t"),
    Row("guidance-1", "no guidance", sample={"guidance": 1.0}),
    Row("guidance-2", "guidance 2", sample={"guidance": 2.0}),
    Row("guidance-3", "guidance 3", sample={"guidance": 3.0}),
    Row("guidance-2-late", "guidance 2 for t in [0.3, 1]", sample={"guidance": 2.0, "guidance_interval": (0.3, 1.0)}),
    Row("guidance-2-middle", "guidance 2 for t in [0.2, 0.8]", sample={"guidance": 2.0, "guidance_interval": (0.2, 0.8)}),
    Row("raw", "the last weights, no average", weights="raw"),
    Row("ema-0.99", "EMA of 100 steps", train={"ema_decays": [0.99]}),
    Row("ema-0.9995", "EMA of 2,000 steps", train={"ema_decays": [0.9995]}),
    Row("v-patch8", "v from patches of 8 (192 numbers, as wide as the network)", model={"prediction": "v"}),
    Row("x-patch16", "x from patches of 16 (768 numbers, 4 × the width)", model={"patch_size": 16}),
    Row("v-patch16", "v from patches of 16 (768 numbers, 4 × the width)", model={"patch_size": 16, "prediction": "v"}),
    Row("x-patch4", "x from patches of 4", model={"patch_size": 4}),
    Row("uniform-t", "uniform t", train={"timesteps": "uniform"}),
    Row("t-mean-0", "logit of t with mean 0, deviation 1", train={"timestep_mean": 0.0, "timestep_std": 1.0}),
    Row("t-mean-1.2", "logit of t with mean -1.2, deviation 1.2", train={"timestep_mean": -1.2, "timestep_std": 1.2}),
    Row("noise-0.5", "noise of half the deviation", noise=0.5),
    Row("lr-1e-3", "learning rate 1e-3", train={"lr": 1e-3}),
    Row("lr-4e-3", "learning rate 4e-3", train={"lr": 4e-3}),
    Row("batch-32", "batches of 32", train={"batch_size": 32}),
    Row("muon", "Muon on the blocks' matrices, batches of 32", train={"batch_size": 32}, optimizer="MuonAndAdamW"),
    Row("bottleneck", "patches through 48 numbers", network="Bottleneck"),
    Row("learned", "learned positions", network="LearnedPositions"),
    Row("rope", "rotary positions", network="Rotary"),
    Row("rope-added", "rotary and added positions", network="RotaryAndAdded"),
    Row("class-tokens", "4 class tokens before the patches", network="ClassTokens"),
    Row("swiglu", "SwiGLU and RMS norms", network="Gated"),
    Row("wide", "width 256", model={"width": 256, "heads": 8}),
    Row("narrow", "width 128", model={"width": 128, "heads": 4}),
    Row("deep", "depth 8", model={"depth": 8}),
    Row("balanced", "classes drawn equally often", draw="balanced"),
    Row("crops", "random crops of 7/8 of the side and more", draw="cropped"),
    Row("full", "turns, zooms, shifts, light and contrast, told to the network", network="Augmented", draw="changed"),
    Row(
        "ancestor",
        "v from patches twice as wide as the network (8 and 96), uniform t, 1e-4",
        model={"width": 96, "depth": 12, "heads": 6, "prediction": "v"},
        train={"lr": 1e-4, "timesteps": "uniform"},
    ),
    Row(
        "ancestor-16",
        "the same with patches of 16 and width 384",
        model={"patch_size": 16, "width": 384, "depth": 12, "heads": 6, "prediction": "v"},
        train={"lr": 1e-4, "timesteps": "uniform"},
    ),
]


@dataclass(frozen=True)
class Task:
    """What one process does: train once, then draw and judge for each row that shares the training."""

    rows: tuple[Row, ...]
    seed: int
    seconds: float
    count: int
    data: dict[str, Any]  # of DataConfig
    split: str  # that judges
    scratch: Path
    classifier: Path | None  # a record, for toy cats


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--photos", type=Path, help="a folder of photos: cat/<Breed>/* and other/*, or one folder a class")
    parser.add_argument("--seconds", type=float, default=100, help="processor time of each training (default: 100)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each row (default: 2)")
    parser.add_argument("--count", type=int, default=416, help="images that are judged of each training (default: 416)")
    parser.add_argument("--against", choices=["ancestor"], help="compare the standing recipe with it, an hour each")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes, one thread each (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="a few steps of two rows on toy cats, under a minute")
    given = parser.parse_args(arguments)
    if unknown := sorted({*given.rows} - {*names}):
        parser.error(f"{', '.join(unknown)}: no such row; there are {', '.join(names)}")
    if given.photos and not given.photos.is_dir():
        parser.error(f"--photos {given.photos} is not a folder; give one with cat/<Breed>/* and other/*")
    logging.getLogger("tinycats").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        figures = against_ancestor(given, Path(scratch)) if given.against else table(given, Path(scratch))
    report("recipe_ancestor" if given.against else "recipe", figures, given)
    if not given.quick and not given.against:
        DOCUMENT.write_text(document(figures["rows"]))
    return 0


def table(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measure the rows that were asked for and return all that are known, those of other calls among them."""
    rows = [row for row in ROWS if row.name in given.rows] if given.rows else ROWS
    if given.quick:
        rows, given = (
            [ROWS[0], ROWS[2]],
            argparse.Namespace(**vars(given) | {"seconds": 2, "seeds": 1, "count": 104, "photos": None}),
        )
    job = prepare_job(given, scratch, "val")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.training, []).append(row)
    tasks = [replace(job, rows=tuple(group), seed=seed) for group in groups.values() for seed in range(given.seeds)]
    known = [] if given.quick else known_rows()
    runs: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for found in in_parallel(tasks, given.jobs):
        for run in found:
            name = run.pop("row")
            runs[name].append(run)
            if len(runs[name]) == given.seeds:
                row = next(row for row in rows if row.name == name)
                made = summary(row, runs[name], given)
                print(json.dumps(made), flush=True)
                known = [old for old in known if (old["row"], old["data"]) != (made["row"], made["data"])] + [made]
                if not given.quick:
                    write_rows(known)  # now, so that a run that is stopped loses no row
    return {"rows": in_order(known)}


def prepare_job(given: argparse.Namespace, scratch: Path, split: str) -> Task:
    """Prepare what all tasks share: the data set, the judge's eyes, and the features of the images that judge."""
    from tinycats_core.classifier import train_classifier
    from tinycats_core.config import DataConfig, resolve
    from tinycats_core.data import prepare

    size = BASE["model"]["image_size"]
    source = {"source": "folder", "folder": given.photos, "val_fraction": 0.2} if given.photos else {"source": "toycats"}
    data = DataConfig(image_size=size, corrupt_files="skip", **source)
    dataset = prepare(data, scratch / "data")
    classifier = None
    if not given.photos:
        trained = train_classifier(dataset, resolve("smoke").classifier, scratch / "classifier", "cpu")
        classifier = scratch / "classifier.json"
        classifier.write_text(trained.model_dump_json())
    return Task((), 0, given.seconds, given.count, data.model_dump(), split, scratch, classifier)


def in_parallel(tasks: list[Task], jobs: int) -> Any:
    """Yield what each task finds, in their order, from processes of one thread each."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread) as pool:
        yield from pool.map(work, tasks)


def one_thread() -> None:
    """Keep a process to one core."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("tinycats").setLevel(logging.WARNING)


def work(task: Task) -> list[dict[str, Any]]:
    """Train once, and judge for each row."""
    judge = Judge.of(task)
    run, seconds = train_row(task.rows[0], task.seed, task.seconds, judge)
    trained = {
        "seed": task.seed,
        "steps": run.step,
        "images": run.step * run.config.batch_size,
        "seconds": round(seconds, 1),
        "parameters": sum(weight.numel() for weight in run.net.parameters()),
        "dataset": judge.dataset.content[:12],
    }
    return [{"row": row.name, **trained, **judge.look(row, run, "val")[1]} for row in task.rows]


@dataclass
class Judge:
    """A data set, the eyes that look at it, and what they have seen of its real images."""

    task: Task
    dataset: Any
    classifier: Any
    evaluate: Any
    eyes: Any

    @classmethod
    def of(cls, task: Task) -> "Judge":
        import torch

        from tinycats_core import fidelity
        from tinycats_core.config import DataConfig, EvaluateConfig
        from tinycats_core.data import prepare
        from tinycats_core.records import Checkpoint

        dataset = prepare(DataConfig.model_validate(task.data), task.scratch / "data")
        classifier = Checkpoint.model_validate_json(task.classifier.read_text()) if task.classifier else None
        evaluate = EvaluateConfig(extractor="breed" if classifier else "inception")
        return cls(task, dataset, classifier, evaluate, fidelity.look_with(evaluate, classifier, torch.device("cpu")))

    def look(self, row: Row, run: Any, split: str) -> tuple[Any, dict[str, Any]]:
        """Return images that a row draws, and what is measured of them against a split."""
        from tinycats_core import fidelity, sampling
        from tinycats_core.data import load_split
        from tinycats_core.memorization import copy_rate

        train = load_split(self.dataset, "train")[0]
        real, real_labels = load_split(self.dataset, split)  # pyright: ignore[reportArgumentType]
        labels = sampling.labels_like(real_labels, self.task.count, len(self.dataset.classes))
        made = draw_row(row, run, labels, self.dataset.classes)
        subset = min(fidelity.KID_SUBSET, min(len(made), len(real)) // 2)
        metrics = fidelity.compare(self.features(made), self.features(real, split), self.eyes, self.evaluate, subset)
        named = {name.replace("_inception", "").replace("_breed", "").replace("fd", "fid"): v for name, v in metrics.items()}
        if self.task.seed == 0:
            picture(row, made, labels, self.dataset.classes, bool(self.classifier))
        counts = {"train": len(train), split: len(real), "generated": len(made)}
        return made, named | {"copy_rate": copy_rate(made, train), "copy_rate_real": copy_rate(real, train), "counts": counts}

    def features(self, images: Any, name: str | None = None) -> Any:
        """Return the features of images; those of real ones are kept in a file."""
        from tinycats_core.checkpoint import read_safetensors, write_safetensors
        from tinycats_core.device import fast_arithmetic
        from tinycats_core.fidelity import extract
        import torch

        path = self.task.scratch / f"{name}.safetensors" if name else None
        with fast_arithmetic(torch.device("cpu")):
            if path and path.is_file():
                return read_safetensors(path, "features")[0]
            found = extract(self.eyes, images, 32)
        if path:
            write_safetensors(path, found, {"kind": "features"})
        return found


def train_row(row: Row, seed: int, seconds: float, judge: Judge) -> tuple[Any, float]:
    """Train for so many seconds of processor time, of which the number of steps is found first. Returns run and seconds."""
    import torch

    from tinycats_core.config import ModelConfig, TrainConfig
    from tinycats_core.data import load_split
    from tinycats_core.device import fast_arithmetic
    from tinycats_core.training import Run, training_step

    classes = judge.dataset.classes
    images, labels = load_split(judge.dataset, "train")
    model = ModelConfig.model_validate(BASE["model"] | row.model | {"num_classes": len(classes)})

    def start(steps: int) -> Run:
        settings = {"steps": steps, "warmup_steps": round(WARM_UP * steps), "seed": seed, "precision": "fp32"}
        config = TrainConfig.model_validate(BASE["train"] | row.train | settings)
        return Run.from_images(images, labels, classes, model, config, torch.device("cpu"))

    with changed_as(row), fast_arithmetic(torch.device("cpu")):
        trial = start(10_000)
        for _ in range(5):
            training_step(trial)
        since, taken = time.process_time(), 0
        while time.process_time() - since < min(5, seconds / 4):
            training_step(trial)
            taken += 1
        run = start(max(10, round(seconds * taken / (time.process_time() - since))))
        since = time.process_time()
        while run.step < run.config.steps:
            loss, _ = training_step(run)
        if not math.isfinite(float(loss)):
            raise SystemExit(f"{row.name}, seed {seed}: the loss is {float(loss)}; this row cannot be trained")
    return run, time.process_time() - since


def draw_row(row: Row, run: Any, labels: Any, classes: tuple[str, ...]) -> Any:
    """Draw an image for each label from what a row samples with."""
    from benchmarks import variants
    from tinycats_core import sampling
    from tinycats_core.config import SampleConfig
    from tinycats_core.sampling import initial_noise

    network = getattr(variants, row.network)(run.net.config)
    network.load_state_dict(run.weights if row.weights == "raw" else next(iter(run.emas.values())))
    config = SampleConfig.model_validate(BASE["sample"] | row.sample)
    with patch.object(sampling, "initial_noise", lambda *given: row.noise * initial_noise(*given)):
        return sampling.sample(network.eval(), labels, run.net.config.image_size, len(classes), config)


def changed_as(row: Row) -> ExitStack:
    """Put a row's network, optimizer and batches in the place of the product's."""
    from benchmarks import variants
    from tinycats_core import training

    draw = getattr(variants, row.draw)

    def drawn(*given: Any) -> Any:
        x_1, x_0, t, labels = draw(*given)
        return x_1, row.noise * x_0, t, labels

    stack = ExitStack()
    stack.enter_context(patch.object(training, "TinyDiT", getattr(variants, row.network)))
    stack.enter_context(patch.object(training, "draw_batch", drawn))
    if row.optimizer != "make_optimizer":
        stack.enter_context(patch.object(training, "make_optimizer", getattr(variants, row.optimizer)))
    return stack


def picture(row: Row, images: Any, labels: Any, classes: tuple[str, ...], drawn: bool) -> None:
    """Keep a grid for people to look at."""
    from tinycats_core.grids import contact_sheet

    folder = RESULTS / "pictures"  # not in git
    folder.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(images, labels, classes, per_class=6, scale=2)
    sheet.save(folder / f"{'toycats' if drawn else 'photos'}-{row.name}.png")


def summary(row: Row, runs: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Return a row of the table: means over the seeds, and of KID the 95 % interval of both its sources of error."""
    data = "photos" if given.photos else "toycats"
    where = "--photos PHOTOS " if given.photos else ""
    mean = {name: statistics.fmean(run[name] for run in runs) for name in ("kid", "fid", "precision", "recall", "copy_rate")}
    own = statistics.fmean(run["kid_std"] ** 2 for run in runs)
    between = statistics.variance(run["kid"] for run in runs) if len(runs) > 1 else 0.0
    return {
        "row": row.name,
        "what": row.what,
        "data": data,
        **mean,
        "kid_interval": 1.96 * math.sqrt((own + between) / len(runs)),
        "copy_rate_real": runs[0]["copy_rate_real"],
        "command": f"python -m benchmarks.recipe {where}--seconds {given.seconds:g} --seeds {given.seeds} {row.name}",
        "machine": machine(),
        "versions": versions(),
        "runs": runs,
    }


def known_rows() -> list[dict[str, Any]]:
    """Return the rows that were measured before."""
    path = RESULTS / "recipe.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Keep the rows."""
    from tinycats_core.files import write_json

    write_json(RESULTS / "recipe.json", {"rows": in_order(rows)})


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows as they stand in ROWS, those of photos first."""
    places = {row.name: place for place, row in enumerate(ROWS)}
    return sorted((row for row in rows if row["row"] in places), key=lambda row: (row["data"], places[row["row"]]))


if __name__ == "__main__":
    sys.exit(main())
