"""The documentation holds: figures come from files, commands and settings exist, links lead somewhere, commands are tested."""

import ast
import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import yaml

from benchmarks.recipe import __main__ as recipe
from flows import cli
from tinycats_core.config import ReleaseConfig
from tinycats_core.files import HOME, HomeFolder
from tinycats_core.presets import PRESETS, merge, parse_settings, resolve
from tinycats_core.release import hub_access, inference

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"# (needs|takes) ")  # of a command that no test executes: an account, or a long time
EXECUTED = {  # the file that executes a command, and what stands there
    "make release": ("tests/flows/test_release_model.py", "def test_a_release_is_published_and_intact("),
    "make test": (".ci/run", "make test"),
    "make lint": (".ci/run", "make lint"),
    "make serve": ("tests/flows/test_serve.py", "def test_a_deployment_runs_in_the_worker_and_everything_stops("),
    "python -m pytest": ("Makefile", "-m pytest"),
    "python -m flows.nightly_eval": ("tests/flows/test_released.py", "def test_the_nightly_evaluation_measures_anew_but_once("),
    "python -m flows.evaluate_model": (
        "tests/flows/test_released.py",
        "def test_a_release_is_evaluated_alone_and_gives_its_own_numbers(",
    ),
    "tinycats release": ("tests/flows/test_cli_flows.py", "def test_release_runs_the_flow("),
    "tinycats evaluate": ("tests/flows/test_cli_flows.py", "def test_each_command_calls_its_flow_with_the_settings("),
    "tinycats classifier": ("tests/flows/test_cli_flows.py", "def test_each_command_calls_its_flow_with_the_settings("),
    "tinycats sample": ("tests/core/release/test_cli_draw.py", "def test_sample_draws_what_the_python_object_draws("),
    "tinycats compare": ("tests/core/release/test_cli_draw.py", "def test_compare_says_which_is_better_in_what("),
    "tinycats doctor": ("tests/flows/test_cli_flows.py", "def test_doctor_finds_what_a_release_needs("),
    "tinycats runs": ("tests/flows/test_cli_flows.py", "def test_runs_says_in_which_state_each_is("),
    "tinycats where": ("tests/flows/test_cli_flows.py", "def test_where_adds_up_what_lies_there("),
    "tinycats up": ("tests/flows/test_cli_flows.py", "def test_up_serves_as_make_does("),
    "tinycats verify": ("tests/core/release/test_cli.py", "def test_the_console_script_exits_as_the_check_says("),
    "tinycats demo": ("tests/core/release/test_demo.py", "def test_the_command_serves_until_it_is_stopped("),
    "tinycats bench": ("tests/core/release/test_cli.py", "def test_bench_prints_its_figures_as_json("),
    "tinycats costs": ("tests/core/release/test_cli.py", "def test_costs_prints_a_row_for_each_preset("),
    "tinycats promote": ("tests/core/release/test_cli.py", "def test_promote_rollback_and_history_say_what_they_did("),
    "tinycats rollback": ("tests/core/release/test_cli.py", "def test_promote_rollback_and_history_say_what_they_did("),
    "tinycats history": ("tests/core/release/test_cli.py", "def test_promote_rollback_and_history_say_what_they_did("),
    "prefect deployment": ("tests/flows/test_serve.py", "def test_a_deployment_runs_in_the_worker_and_everything_stops("),
}
PURGED = ("where there is none", "goes on", "to be had", "of Modal's", "without a word")


class Command(NamedTuple):
    """A command of a code block."""

    page: str
    words: list[str]
    marked: bool

    @property
    def name(self) -> str:
        """What is run: a make target, a module, or a program and its first argument."""
        program, *rest = self.words
        program = program.removeprefix(".venv/bin/")
        return f"{program} {' '.join(rest[:2])}" if program == "python" else f"{program} {rest[0]}"


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands() -> Iterator[Command]:
    """Yield every command of the shell blocks, without its assignments; one that quotes or backslashes continue is whole."""
    for page, text in TEXTS.items():
        for block in blocks(text, "sh"):
            whole, held = bool(MARK.match(block)), ""
            for line in block.splitlines():
                held += line
                try:
                    if held.endswith("\\"):
                        raise ValueError
                    words = shlex.split(held, comments=True)
                except ValueError:
                    held = held.removesuffix("\\") + "\n"
                    continue
                if words and words[0] != "export":
                    yield Command(page, words, whole or bool(MARK.search(held)))
                held = ""
            assert not held, f"{page}: unfinished command {held}"


COMMANDS = list(commands())


def load(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


def rows(text: str) -> list[list[str]]:
    """Return the cells of every table row in a text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_metrics_are_those_of_the_release_whose_grid_is_shown():
    block = README.split("<!-- metrics:begin -->")[1].split("<!-- metrics:end -->")[0]
    with open(ROOT / "docs" / "smoke" / "metrics.csv", newline="") as file:
        measured = {row["metric"]: row for row in csv.DictReader(file)}
    shown = [row for row in rows(block) if row[0].startswith("`")]
    assert len(shown) >= 4
    for name, candidate, int8, floor, *_ in shown:
        found = measured[name.strip("`")]
        for text, column in ((candidate, "candidate"), (int8, "onnx-int8"), (floor, "floor")):
            assert float(text) == pytest.approx(float(found[column]), abs=0.5 * 10 ** -len(text.partition(".")[2])), name


def test_how_fast_an_image_is_drawn_is_what_that_release_measured():
    found = load("docs/smoke/benchmark.json")["inference"]
    pattern = (
        r"([\d.]+) ms in PyTorch, ([\d.]+) ms with the fp32 file, ([\d.]+) ms with the\sint8 file and ([\d.]+) ms with the rec"
    )
    said = re.search(pattern, README)
    assert said
    times = {row["runtime"]: f"{row['latency_ms']['p50']:.1f}" for row in found["rows"]}
    assert list(said.groups()) == [times[name] for name in ("pytorch", "onnx-fp32", "onnx-int8", "onnx-int8-table")]
    guided = "with" if found["sample"]["guidance"] > 1 else "without"
    assert f"in {found['sample']['steps']} steps {guided} guidance" in README
    assert found["machine"]["cpu"] in README
    assert {row["repeats"] <= inference.MOST for row in found["rows"]} == {True}  # measured as it is now


def test_how_often_the_gate_errs_is_what_its_benchmark_measured():
    found = load("benchmarks/results/judge.json")
    said = " ".join(TEXTS["docs/judging.md"].split()).replace(" %", "%")
    assert f"Of {found['resamples']} releases of the same model, the gate refused {found['false_rejections']:.1%}" in said
    assert f"Of {found['resamples']} releases of a model trained for an eighth of the steps" in said
    assert f"the gate let {found['missed_worse']:.1%} pass" in said
    assert f"{found['canaries_refused']} of {found['canaries']} canaries" in said
    assert found["worse_steps"] * 8 == found["steps"]
    cost = load("benchmarks/results/judge-photos.json")
    assert f"a full evaluation takes {cost['cost_ratio']:.2f} times as long as the feature extraction alone" in said
    assert f"the extraction is {cost['extract_speedup']:.1f} times as fast as that of torch-fidelity" in said
    assert f"a full evaluation takes {found['cost_ratio']:.2f} times as long as the extraction alone" in said
    assert found["cost_ratio"] > 1.15


def test_what_modal_does_not_break_is_what_its_benchmark_measured():
    found = load("benchmarks/results/modal_faults.json")
    assert (found["preemptions"], found["calls_made"], found["bit_identical"]) == (10, 1, True)
    said = " ".join(TEXTS["docs/modal.md"].split())
    assert "[Ten preemptions](../benchmarks/results/modal_faults.json)" in said
    assert f"one call and bit-identical weights, with {found['steps_run']} steps run for {found['steps']}." in said
    assert f"A cancelled call ended after {found['cancel_seconds']:.2f} s." in said


def test_what_a_publication_survives_is_what_its_benchmark_measured():
    found = load("benchmarks/results/publish_faults.json")
    block = " ".join(TEXTS["docs/releasing.md"].split("<!-- faults:begin -->")[1].split("<!-- faults:end -->")[0].split())
    assert [int(number) for number in re.findall(r"\d+", block)] == [
        found[name] for name in ("cases", "mixed", "not_recovered", "double_commits", "foreign_lost", "kills")
    ]
    assert (found["kills_mixed"], found["kills_not_recovered"]) == (0, 0)
    assert found["cases"] >= 200
    said = " ".join(TEXTS["docs/releasing.md"].split())
    assert (
        f"after {hub_access.XET_SECONDS / 60:.0f} minutes plus {1e6 / hub_access.XET_BYTES_PER_S:.0f} seconds for each MB" in said
    )
    assert f"no byte for {hub_access.TIMEOUT_S:.0f} seconds" in said


def test_what_the_classifier_gets_right_is_what_its_benchmark_measured():
    block = TEXTS["docs/training.md"].split("<!-- classifier:begin -->")[1].split("<!-- classifier:end -->")[0]
    drawn = load("benchmarks/results/classifier.json")
    found = load("benchmarks/results/classifier-photos.json") | drawn
    images = found["runs"][0]["images"]
    assert f"on {images['train']} of them" in block
    assert f"of {images['test']} unseen ones" in block
    assert {run["settings"]["image_size"] for run in found["runs"]} == {32}
    assert f"{drawn['resnet18_onnx']['bytes'] / drawn['toy_onnx']['bytes']:.0f} times as large" in block
    assert drawn["toy_backbone"] == resolve("smoke").classifier.backbone
    names = (
        "toy_accuracy",
        "resnet18_accuracy",
        "breed_accuracy",
        "breed_interval",
        "breed_majority",
        "cat_accuracy",
        "cat_interval",
        "cat_majority",
    )
    names += ("breed_accuracy_balance_1", "macro_recall_balance_1", "macro_recall_balance_0", "macro_recall_chance")
    values = [value for name in names for value in (found[name] if isinstance(found[name], list) else [found[name]])]
    assert re.findall(r"\d+\.\d(?=[ –])", block) == [f"{value:.1%}".rstrip("%") for value in values]
    assert found["balance"] == 0


def test_the_deployments_are_the_presets():
    shown = {row[0].removeprefix("`release-model/").strip("`"): row for row in rows(README) if "release-model/" in row[0]}
    assert shown.keys() == PRESETS.keys()
    for name, row in shown.items():
        config = resolve(name)
        assert int(row[1].replace(",", "")) == config.train.steps
        assert float(row[2]) == config.train.lr
        assert row[3] == f"{config.model.image_size} px"


def test_the_results_of_the_benchmarks_are_those_of_their_files():
    block = TEXTS["docs/benchmarks.md"].split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    found: dict[str, Any] = {}
    checked = 0
    for file, figure, shown, _ in rows(block)[2:]:
        if file:
            found = load(f"benchmarks/results/{file.split('`')[1]}")
            assert (found["machine"]["cpu"], found["machine"]["cores"], found["machine"]["gpu"]) == ("AMD EPYC", 2, None)
        value, checked = found[figure.strip("`")], checked + 1
        if isinstance(value, float):
            digits, _, exponent = shown.partition("e")
            half = 0.5 * 10 ** (int(exponent or 0) - len(digits.partition(".")[2]))
            assert float(shown) == pytest.approx(value, abs=half), figure
        else:
            assert json.loads(shown) == value, figure
    assert checked >= 10
    assert load("benchmarks/results/resume.json")["checkpoint_every"] == 20
    assert load("benchmarks/results/ranks.json")["steps"] == 100


def test_the_tables_of_128_px_are_those_of_their_file():
    found, page = load("benchmarks/results/cats128.json"), TEXTS["docs/recipe.md"]
    speed, quality = (rows(part.split("<!-- end -->")[0])[2:] for part in page.split("benchmarks/results/cats128.json -->")[1:])
    ways = [way for name, way in found["speed"]["ways"].items() if name.startswith("base ")]
    assert [[one[1], one[3]] for one in speed] == [
        [f"{way['images_per_s']:,.0f}", f"{100 * way['share_of_matmul_peak']:.1f} %"] for way in ways
    ]
    assert len({way["loss"] for way in ways}) == 1
    best = [(one["row"], one["best"]) for one in (*found["rows"], *found["long"])]
    assert [[one[0], *one[2:]] for one in quality] == [
        [
            name,
            f"{of['kid']:.3f} ({of['kid_low']:.3f} to {of['kid_high']:.3f})",
            f"{of['fid']:.0f}",
            f"{of['step']:,}",
            f"{of['passes']:.0f}",
        ]
        for name, of in best
    ]
    assert {of["copy_rate"] for _, of in best} == {of["precision"] for _, of in best} == {0}
    assert found["machine"]["gpu"] in page


def test_the_table_of_the_recipe_is_made_from_its_results():
    made = recipe.document(recipe.known_rows())
    assert sorted(rows(TEXTS["docs/recipe.md"])) == sorted(rows(made))
    (retired,) = re.findall(r"^Ten rows need code .*?: (.*?)\. ", TEXTS["docs/recipe.md"], re.M | re.S)
    named = re.findall(r"`([^`]+)`", retired)
    assert len(named) == 10
    assert {*named} == {row["row"] for row in recipe.known_rows()} - {row.name for row in recipe.ROWS}


def test_the_figures_against_the_ancestor_are_those_of_their_file():
    page, found = TEXTS["docs/recipe.md"], load("benchmarks/results/recipe_ancestor.json")
    for name in ("recipe", "ancestor"):
        one = found[name]
        kid = f"{one['kid']:.4f} ± {1.96 * one['kid_std']:.4f}"
        cells = [name, kid, f"{one['fid']:.1f}", *(f"{one[key]:.3f}" for key in ("precision", "recall", "copy_rate"))]
        assert cells in rows(page)
    said = " ".join(page.split())
    assert f"({found['recipe']['images']:,} images in {found['recipe']['steps']:,} steps)" in said
    assert f"({found['recipe']['seconds'] / 60:.0f} and {found['ancestor']['seconds'] / 60:.0f} minutes of processor time)" in said
    assert f"is {found['copy_rate_real']:.3f} (upper end of its interval: {found['copy_rate_bound']:.3f})" in said
    assert f"on the {found['recipe']['counts']['test']} photos of the test split" in said


def test_every_benchmark_deployment_and_term_of_the_gate_is_listed():
    folder = ROOT / "benchmarks"
    scripts = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    scripts |= {path.parent.name for path in folder.glob("*/__main__.py")}
    table = TEXTS["docs/benchmarks.md"].split("## Running them")[0]
    assert {row[0].strip("`") for row in rows(table)[2:]} == scripts

    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = {f"{item['entrypoint'].rpartition('.')[2].replace('_', '-')}/{item['name']}" for item in deployments}
    shown = {row[0].strip("`") for row in rows(TEXTS["docs/operating.md"]) if re.match(r"`[a-z-]+/[^/]+`$", row[0])}
    assert shown - {"release-model/<preset>"} == {name for name in flows if not name.startswith("release-model/")}

    terms = {name for row in rows(TEXTS["docs/judging.md"])[2:] for name in re.findall(r"`([a-z_]+)`", row[0])}
    known = (ROOT / "tinycats_core" / "evaluation" / "gate.py").read_text()
    assert {name for name in terms if f'"{name}"' not in known} == set()
    measured = load("benchmarks/results/judge.json")
    failed = {term for found in measured["canaries_failed"].values() for term in found} | measured["rejected_by"].keys()
    assert failed <= terms


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_anchors_lead_somewhere(page: str):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_what_code_in_a_line_names_exists(page: str):
    text = TEXTS[page]
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M):
        assert re.search(rf"^{name}:", makefile, re.M), name
    for name in re.findall(r"`(?:python -m )?((?:tinycats_core|tasks|flows|benchmarks)(?:\.[a-z_]+)+)`", text):
        assert find_spec(name), name
    for part, field in re.findall(r"`([a-z]+)\.([a-z_]+)`", text):
        if part in ReleaseConfig.model_fields and field not in ("json", "py", "safetensors", "onnx", "sig"):
            assert field in resolve("smoke").model_dump()[part], f"{part}.{field}"
    for overrides in re.findall(r"`(\{\"[^`]*\})`", text):
        resolve("standard", json.loads(overrides))


@pytest.mark.parametrize("page", TEXTS)
def test_python_in_the_pages_imports(page: str):
    code = blocks(TEXTS[page], "python") + re.findall(r"`(from [\w.]+ import \w+)`", TEXTS[page])
    for node in [node for text in code for node in ast.walk(ast.parse(text))]:
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module or "")
            missing = {name.name for name in node.names} - vars(module).keys()
            assert all(find_spec(f"{node.module}.{name}") for name in missing), node.module  # or modules of a package


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {' '.join(command.words)[:60]}")
def test_a_command_exists_and_knows_its_options(command: Command, capsys: pytest.CaptureFixture[str]):
    program, *rest = command.words
    match program.removeprefix(".venv/bin/"):
        case "make":
            assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
            assigned = dict(word.split("=", 1) for word in rest[1:])
            assert assigned.keys() <= {"PRESET", "OVERRIDES", "KEEP_RESULTS"}
            resolve(assigned.get("PRESET", "smoke"), json.loads(assigned.get("OVERRIDES", "{}")))
        case "python":
            assert rest[0] == "-m"
            spec = find_spec(rest[1])
            assert spec
            if not rest[1].startswith("pytest"):
                module = import_module(f"{rest[1]}.__main__" if spec.submodule_search_locations else rest[1])
                with pytest.raises(SystemExit) as ended:
                    module.main(["--help"])
                assert ended.value.code == 0
                assert_known(rest[2:], capsys.readouterr().out)
        case "tinycats":
            assert cli.main([rest[0], "--help"]) == 0
            assert_known(rest[1:], capsys.readouterr().out)
        case "prefect" if rest[0] == "server":
            assert rest == ["server", "start"]
            assert command.marked
        case "cp":
            assert command.marked
            assert (ROOT / rest[0]).is_file()
        case "docker":
            assert command.marked
            assert (ROOT / rest[rest.index("--file") + 1]).is_file()
        case "prefect":
            assert rest[:2] == ["deployment", "run"]
            deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
            assert rest[2].split("/")[1] in {item["name"] for item in deployments}
        case "modal":
            app = (ROOT / "deployments" / "modal_app.py").read_text()
            called = [word.partition("::")[2] for word in rest if "::" in word]
            assert all(re.search(rf"^@app.local_entrypoint\(\)\ndef {name}\(", app, re.M) for name in called)
            assert command.marked
        case "openssl":
            assert command.marked
        case "model_signing":  # as tests/core/release/test_signature.py runs it
            assert command.marked
            assert_known(
                rest[1:],
                subprocess.run(
                    [Path(sys.executable).with_name(program), *rest[:2], "--help"], capture_output=True, text=True
                ).stdout,
            )
        case _:
            pytest.fail(f"{program} is a program that this test does not know")


def assert_known(words: list[str], explained: str) -> None:
    """Check the options of a command against what `--help` prints, and its overrides against the configuration."""
    options = [word for word in words if word.startswith("--")]
    assert {option for option in options if option not in explained} == set()
    given, sets = dict(pairwise(words)), [value for option, value in pairwise(words) if option == "--set"]
    resolve(given.get("--preset", "smoke"), merge(json.loads(given.get("--overrides", "{}")), parse_settings(sets)))


def test_every_command_is_executed_by_a_test_or_marked():
    plain = {command.name for command in COMMANDS if not command.marked}
    assert plain <= EXECUTED.keys()
    for file, line in EXECUTED.values():
        assert line in (ROOT / file).read_text(), f"{file}: {line}"


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CONTRIBUTING.md"])  # which quotes them
def test_phrases_that_contributing_rules_out_do_not_come_back(page: str):
    said = " ".join(TEXTS[page].split())
    assert [phrase for phrase in PURGED if phrase in said] == []


def test_the_map_of_the_home_is_the_one_that_the_code_goes_by():
    section = TEXTS["docs/operating.md"].split("## Where files are stored")[1].split("\n## ")[0]
    first_cells = " ".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)/`", first_cells)) == set(HOME) == set(get_args(HomeFolder))
