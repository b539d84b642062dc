"""Is a result ever used that other code has made? Edits of the project, each followed by a run of the same release.

    python -m benchmarks.stale [--quick]

The peer is the release of the unedited code, which fills the cache. Then a copy of the project is edited, one edit at a time, and
the same command runs there. An edit of meaning must run the stage that depends on it (`stale`: those answered from the cache); an
edit of comments, docstrings or layout must run none (`needless_runs`). `uncovered` are functions of the core that a stage was seen
to call and that its digest does not cover.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

from benchmarks.common import ROOT, TINY, command_line, report
from tinycats_core.errors import TinycatsError

SPOKEN = re.compile(r"(\w+): (done in|from the cache|runs again)")
COPIED = ("tinycats_core", "tasks", "flows", "deployments", "pyproject.toml", "constraints.txt")


@dataclass(frozen=True)
class Edit:
    """A change of one file, and the stage that it must run: None for one without meaning."""

    file: str
    before: str
    after: str
    stage: str | None = None


def _edits(stage: str | None, *changes: tuple[str, str, str]) -> list[Edit]:
    return [Edit(f"tinycats_core/{file}.py", before, after, stage) for file, before, after in changes]


SEMANTIC = [
    *_edits(
        "prepare_data",
        ("data/toy_drawing", "OVERSAMPLING = 4", "OVERSAMPLING = 3"),
        ("data/toycats", "config.seed + 2**48", "config.seed + 2**47"),
        (
            "data/toycats",
            "for step, (split, per_class, seed) in enumerate(plan):",
            "for step, (split, per_class, seed) in enumerate(plan[::-1]):",
        ),
    ),
    *_edits("validate_data", ("data/validation", "MAX_IMBALANCE = ", "MAX_IMBALANCE = 2 * ")),
    *_edits(
        "train_classifier",
        ("evaluation/classifier", "weight_decay=config.weight_decay, fused", "weight_decay=2 * config.weight_decay, fused"),
        ("evaluation/classifier", "max(steps, 2)", "max(steps, 3)"),
    ),
    *_edits(
        "train_generator",
        ("generator/flow_matching", "target).square().mean()", "target).abs().mean()"),
        ("generator/flow_matching", "MIN_REMAINING = 0.05", "MIN_REMAINING = 0.1"),
        ("generator/flow_matching", "(1 - t) * x_0", "(1 - 0.99 * t) * x_0"),
        ("generator/flow_matching", "torch.sigmoid(mean + std *", "torch.sigmoid(mean - std *"),
        ("generator/model", "tokens.shape[-1:], eps=1e-6", "tokens.shape[-1:], eps=1e-5"),
        ("generator/model", 'nn.GELU(approximate="tanh")', "nn.SiLU()"),
        ("generator/model", "angles = 1000 * t", "angles = 500 * t"),
        ("generator/model", "std=0.02", "std=0.03"),
        ("generator/model", "[angles.sin(), angles.cos()], dim=1", "[angles.cos(), angles.sin()], dim=1"),
        ("generator/weights", "(1 + step) / (10 + step)", "(1 + step) / (20 + step)"),
        ("generator/weights", "targets, 1 - decay)", "targets, 1 - decay**2)"),
        ("training/recipe", "< config.label_dropout", "<= config.label_dropout"),
        ("training/recipe", "0xBF58476D1CE4E5B9", "0xBF58476D1CE4E5BB"),
        ("training/recipe", "(1 + math.cos(math.pi * progress)) / 2", "(1 - progress)"),
        ("training/recipe", "if p.dim() > 1]", "if p.dim() > 2]"),
        ("training/step", "weight = len(x_1) / share", "weight = 0.5 * len(x_1) / share"),
        ("training/step", "run.net.parameters(), config.clip)", "run.net.parameters(), 2 * config.clip)"),
        ("training/state", "torch.manual_seed(config.seed)", "torch.manual_seed(config.seed + 1)"),
    ),
    *_edits(
        "choose_sampling",
        ("evaluation/sweep", "best = min(range", "best = max(range"),
        ("generator/samplers", "step / (2 * plan", "step / (3 * plan"),
        ("generator/samplers", "u / (u + shift * (1 - u))", "u / (u + 2 * shift * (1 - u))"),
        ("generator/drawing", "key=[seed, index]", "key=[index, seed]"),
        ("generator/sampling", "without + guidance *", "with_class + guidance *"),
        ("generator/sampling", "127.5).round()", "127.5).floor()"),
        ("evaluation/distances", "within + within_real - 2 * across\n", "within + within_real - across\n"),
    ),
    *_edits(
        "measure",
        ("evaluation/memorization", "copies / len(images)", "copies / (len(images) + 1)"),
        ("evaluation/memorization", "return pixels - 127.5", "return pixels - 128"),
        ("evaluation/distances", "(nearest <= real_radii[k])", "(nearest < real_radii[k])"),
        ("evaluation/reference", "max(freedom, 1)", "max(freedom, 2)"),
        ("evaluation/fidelity", "deviation * torch.randn", "2 * deviation * torch.randn"),
    ),
    *_edits(
        "decide",
        ("evaluation/gate", "MIN_SPREAD = ", "MIN_SPREAD = 0.001 + "),
        ("evaluation/gate", "value <= bar", "value < bar"),
        ("evaluation/gate", "(share * other + 2) / (other + 4)", "(share * other + 1) / (other + 2)"),
    ),
    *_edits("export_onnx", ("release/export", '"convention": CONVENTION', '"convention": CONVENTION + "."')),
    *_edits("quantize", ("release/export", "nodes_to_exclude=products[-1:]", "nodes_to_exclude=products[-2:]")),
    *_edits("check_onnx", ("release/export", '"relative_error": errors[worst]', '"relative_error": 2 * errors[worst]')),
    *_edits("export_classifier", ("release/export", '"same_class": same', '"same_class": same / 2')),
    *_edits(
        "build_bundle",
        ("release/card", "## Limits", "## Its limits"),
        ("release/bundle", "GRID_PER_CLASS = 8", "GRID_PER_CLASS = 6"),
        ("pictures", "gap, name_width, head = 2,", "gap, name_width, head = 3,"),
        ("evaluation/memorization", "first_of_each_class(labels, 4)", "first_of_each_class(labels, 3)"),
    ),
]
MEANINGLESS = [
    edit
    for file, verb in (
        ("generator/flow_matching", "Return"),
        ("generator/model", "Return"),
        ("training/recipe", "Return"),
        ("training/step", "Take"),
        ("evaluation/gate", "Require"),
    )
    for edit in _edits(
        None,
        (file, f'"""{verb}', f'"""As was said: {verb}'),
        (file, "\n\n\ndef ", "\n\n\n# A comment.\n\n\ndef "),
    )
] + _edits(
    None,
    ("generator/flow_matching", "return t * x_1 + (1 - t) * x_0", "return (t * x_1 +\n            (1 - t) * x_0)  # straight"),
    ("generator/samplers", "first order: one evaluation", "the first order: one evaluation"),
    ("generator/samplers", "Plan = list[Evaluation]", "Plan = list[\n    Evaluation\n]"),
    ("generator/weights", "return min(decay, (1 + step)", "return min(decay, (1+step)"),
    ("evaluation/distances", "import numpy as np\n", "import numpy as np  # arrays\n"),
    ("evaluation/memorization", "copies / len(images)", "(copies / len(images))"),
    ("data/toycats", '"""The source `toycats`', '"""The data source `toycats`'),
    ("release/export", '"null_class": str(', "'null_class': str("),
    ("release/card", "## Limits", "## \\x4cimits"),
    ("release/bundle", "GRID_PER_CLASS = 8", "GRID_PER_CLASS = 0x8"),
)


class Project:
    """A copy of the project, whose release fills a cache that each edited run starts from."""

    def __init__(self, folder: Path):
        self.code, self.home, self.filled = folder / "project", folder / "home", folder / "filled"
        self.code.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.code / name)
        self.home.mkdir()

    def fill(self) -> None:
        """Make the release of the unedited code."""
        ran, _ = self.run(None)
        if "build_bundle" not in ran:
            raise TinycatsError(f"the release of the unedited code was not made; its stages: {ran}")
        shutil.copytree(self.home, self.filled, symlinks=True)

    def run(self, until: str | None) -> tuple[dict[str, str], str]:
        """Run the release. Returns what the log says of each stage, and the log; ends early once it says so of `until`."""
        environment = os.environ | {"TINYCATS_HOME": str(self.home / "tinycats"), "PREFECT_LOGGING_LEVEL": "INFO"}
        environment |= {"PYTHONPATH": str(self.code), "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(self.home / "results")}
        settings = TINY | {"publish": {"name": "stale", "page": "none", "folder": str(self.home / "releases")}}
        command = [sys.executable, "-m", "flows.release_model", "--overrides", json.dumps(settings)]
        said: dict[str, str] = {}
        lines: list[str] = []
        with subprocess.Popen(
            command, cwd=self.code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if found := SPOKEN.search(line):
                    said[found[1]] = found[2]
                if (found and found[1] == until) or (until == "decide" and "the candidate is" in line):
                    process.terminate()
                    break
        return said, "".join(lines)

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Edit a file, with the cache of the unedited release."""
        path = self.code / edit.file
        text = path.read_text()
        if edit.before not in text:
            raise TinycatsError(f"{edit.file} has no {edit.before!r}: bring the edits of this benchmark up to date")
        shutil.rmtree(self.home)
        shutil.copytree(self.filled, self.home, symlinks=True)
        path.write_text(text.replace(edit.before, edit.after))
        try:
            yield
        finally:
            path.write_text(text)


def answered_from_the_cache(project: Project, edit: Edit) -> bool:
    """Return whether the stage that an edit changes was not run."""
    with project.edited(edit):
        said, log = project.run(edit.stage)
    if edit.stage == "decide":
        return "the candidate is" not in log
    return said.get(str(edit.stage)) != "done in" and said.get(str(edit.stage)) != "runs again"


def stages_run(project: Project, edit: Edit) -> list[str]:
    """Return the stages that ran after an edit without meaning."""
    with project.edited(edit):
        said, log = project.run(None)
    if "no stage executed" not in log:
        raise TinycatsError(f"the release did not end after an edit of {edit.file}:\n{log[-2000:]}")
    return [stage for stage, what in said.items() if what != "from the cache"]


def uncovered(folder: Path) -> list[str]:
    """Return what the functions of a stage call of the core, in one release, that its digest does not cover."""
    os.environ["TINYCATS_HOME"] = str(folder / "traced")
    import flows.release_model  # whose stages read the home folder when they are made
    from tasks.cache import _POLICIES
    from tinycats_core import source_code

    called: dict[str, set[tuple[str, str]]] = {name: set() for name in _POLICIES}

    def traced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        entries, depth = {getattr(entry, "__code__", None) for entry in _POLICIES[name].runs}, 0

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal depth
            module = frame.f_globals.get("__name__", "")
            if frame.f_code in entries and event in ("call", "return"):
                depth += 1 if event == "call" else -1
            if depth and event == "call" and module.startswith("tinycats_core."):
                called[name].add((module, str(cast(Any, frame.f_code).co_qualname).partition(".")[0]))

        def run(*args: Any, **kwargs: Any) -> Any:
            threading.setprofile(profile)
            sys.setprofile(profile)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)  # pyright: ignore[reportArgumentType]

        return run

    for module in [module for name, module in sys.modules.items() if name.startswith("tasks.")]:
        for task in vars(module).values():
            if getattr(task, "cache_policy", None) in _POLICIES.values():
                task.fn = traced(task.cache_policy.name, task.fn)
    flows.release_model.release_model(
        "smoke", TINY | {"publish": {"name": "traced", "page": "none", "folder": str(folder / "releases")}}
    )
    missed = []
    for name, functions in called.items():
        policy = _POLICIES[name]
        missed += [
            f"{name}: {module}.{function}"
            for module, function in sorted(functions - source_code.covered(*policy.runs))
            if function != "__create_fn__"  # of a dataclass
        ]
    return missed


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Edit, run and count. Returns the exit status: 1 if a result of other code was used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four edits, and one without meaning")
    given = parser.parse_args(arguments)
    firsts = list({edit.stage: edit for edit in reversed(SEMANTIC)}.values())
    semantic, meaningless = (firsts[2:6], MEANINGLESS[:1]) if given.quick else (SEMANTIC, MEANINGLESS)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        project.fill()
        stale = [f"{edit.file}: {edit.after}" for edit in semantic if answered_from_the_cache(project, edit)]
        needless = {f"{edit.file}: {edit.after}": ran for edit in meaningless if (ran := stages_run(project, edit))}
        missed = [] if given.quick else uncovered(Path(folder))
    figures = {
        "semantic_edits": len(semantic),
        "stale": len(stale),
        "comment_edits": len(meaningless),
        "needless_runs": len(needless),
        "uncovered": missed,
        "stale_edits": stale,
        "needless": needless,
    }
    report("stale", figures, given)
    return 1 if stale or needless else 0


if __name__ == "__main__":
    sys.exit(main())
