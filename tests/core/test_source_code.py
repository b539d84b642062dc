"""Which code a function runs, and which edits of it count."""

import ast
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tinycats_core import source_code
from tinycats_core.data import toy_drawing
from tinycats_core.evaluation import classifier, fidelity, gate
from tinycats_core.evaluation.reference import Judge
from tinycats_core.evaluation.samples import draw_samples
from tinycats_core.generator import drawing, samplers
from tinycats_core.release import bundle, inference
from tinycats_core.source_code import code_of, edited, foreign, plain
from tinycats_core.training import start

Project = Callable[..., source_code.Code]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A function that takes sources of a package `tinycats_core`, and returns the code of `main.run` there."""

    def write(**modules: str) -> source_code.Code:
        texts = {tmp_path / "tinycats_core" / f"{name}.py": textwrap.dedent(text) for name, text in modules.items()}
        monkeypatch.setattr(source_code, "ROOT", tmp_path)
        monkeypatch.setattr(source_code, "TEXTS", texts)
        source_code._read.cache_clear()
        source_code._code.cache_clear()
        return source_code._code((("tinycats_core.main", "run"),), ())

    yield write
    source_code._read.cache_clear()
    source_code._code.cache_clear()


MAIN = """
    from tinycats_core import table
    from tinycats_core.helper import double as twice

    LIMIT = 3

    def run(x):
        return twice(x) + LIMIT + table.TABLE["a"](x)

    def other(x):
        return x
"""
HELPER = """
    def double(x):
        return 2 * x

    def unused(x):
        return x
"""
TABLE = """
    TABLE = {}

    def register(function):
        TABLE[function.__name__] = function
        return function

    @register
    def a(x):
        return x

    def lonely(x):
        return x
"""


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("main", "twice(x) +", "twice(x) -"),
        ("main", "LIMIT = 3", "LIMIT = 4"),
        ("main", "import double as twice", "import unused as twice"),
        ("helper", "2 * x", "3 * x"),
        ("table", "TABLE = {}", "TABLE = {'b': 1}"),
    ],
)
def test_an_edit_of_what_is_run_changes_the_digest_and_is_named(project: Project, module: str, before: str, after: str) -> None:
    sources = {"main": MAIN, "helper": HELPER, "table": TABLE}
    old = project(**sources)
    assert before in sources[module]
    new = project(**sources | {module: sources[module].replace(before, after)})
    assert old.digest != new.digest
    changed = {file for file in old.files.keys() | new.files.keys() if old.files.get(file) != new.files.get(file)}
    assert changed == {f"tinycats_core/{'helper' if 'import' in before else module}.py"}


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("main", "return x\n", "return 2 * x\n"),
        ("helper", "def unused(x):\n        return x", "def unused(x):\n        return 2 * x"),
        ("table", "def lonely(x):\n        return x", "def lonely(x):\n        return 2 * x"),
        ("main", "def run(x):", 'def run(x):\n        """Run."""  # it does'),
        ("helper", "2 * x", "(2\n        * x)"),
        ("table", "TABLE = {}", "# the table\n    TABLE = {\n    }"),
    ],
)
def test_an_edit_of_anything_else_changes_nothing(project: Project, module: str, before: str, after: str) -> None:
    sources = {"main": MAIN, "helper": HELPER, "table": TABLE}
    old = project(**sources)
    assert before in sources[module]
    assert project(**sources | {module: sources[module].replace(before, after)}) == old


def test_tables_modules_and_code_in_text_are_followed(project: Project) -> None:
    helper = "def f():\n    return 1\n"
    for main in (
        "from tinycats_core import helper\ndef run():\n    return vars(helper)\n",
        "CHILD = 'from tinycats_core import helper; helper.f()'\ndef run():\n    return CHILD\n",
        "def run():\n    from tinycats_core.helper import f\n    return f()\n",
        "import tinycats_core.helper\ndef run():\n    return tinycats_core.helper.f()\n",
        "class Base:\n    def m(self):\n        from tinycats_core import helper as h\n        return h.f()\n"
        "class Made(Base): ...\ndef run(x: Made):\n    return x.m()\n",
        "from tinycats_core.helper import f\nTABLE = {}\nTABLE['f'] = f\ndef run():\n    return TABLE\n",
        "from tinycats_core.helper import f\nTABLE = {}\nTABLE.update(f=f)\ndef run():\n    return TABLE\n",
    ):
        old = project(main=main, helper=helper)
        assert project(main=main, helper=helper.replace("1", "2")) != old, main


def test_registered_functions_count(project: Project) -> None:
    old = project(main=MAIN, helper=HELPER, table=TABLE)
    changed = TABLE.replace("def a(x):\n        return x", "def a(x):\n        return 2 * x")
    assert changed != TABLE
    assert project(main=MAIN, helper=HELPER, table=changed) != old


def test_what_the_stages_run() -> None:
    def rooms(*entries: source_code.Entry, **options: tuple[source_code.Entry, ...]) -> set[str]:
        return {file.split("/")[1].removesuffix(".py") for file in code_of(*entries, **options).files}

    training = code_of(start.train, apart_from=start.SHOWN).files
    assert {f"tinycats_core/training/{name}.py" for name in ("loop", "recipe", "state", "step")} <= training.keys()
    assert {"tinycats_core/generator/flow_matching.py", "tinycats_core/generator/model.py"} <= training.keys()
    assert "tinycats_core/generator/samplers.py" not in training
    assert not {"evaluation", "release", "compute"} & rooms(start.train)
    assert "tinycats_core/evaluation/distances.py" in code_of(fidelity.evaluate).files
    assert "tinycats_core/generator/samplers.py" in code_of(draw_samples).files
    assert "tinycats_core/generator/drawing.py" in code_of(bundle.build).files  # shipped as sample.py
    assert "tinycats_core/release/card.py" in code_of(bundle.build).files
    assert "tinycats_core/generator/sampling.py" in code_of(inference.benchmark).files
    assert "tinycats_core/evaluation/gate.py" in code_of(gate.decide).files
    assert "generator" not in rooms(classifier.train_classifier)
    assert code_of(Judge.features) == code_of(Judge)  # a method stands for its class
    assert code_of(drawing).files.keys() == {"tinycats_core/generator/drawing.py"}
    assert code_of(toy_drawing.generate) != code_of(toy_drawing.generate, apart_from=(toy_drawing,))


def test_a_digest_is_of_the_tree_alone() -> None:
    texts = ["def f(x):\n    'doc'\n    return x + 1 # one\n", "def f(x): return x+1\n", "def f( x ):\n\n    return (x + 1)\n"]
    assert len({str(plain(ast.parse(text))) for text in texts}) == 1
    assert plain(ast.parse("x = 1")) != plain(ast.parse("x = True")) != plain(ast.parse("x = 1.0"))


def test_threads_that_parse_at_the_same_time_do_not_disturb_each_other() -> None:
    texts = [text for path, text in source_code.TEXTS.items() if len(text) < 8_000][:40]
    with ThreadPoolExecutor(8) as pool:
        trees = list(pool.map(source_code.parse, texts * 4))
    assert all(tree.body or not text.strip() for tree, text in zip(trees, texts * 4, strict=True))


def test_a_disturbed_parse_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ast.parse, []

    def disturbed(text: str) -> ast.Module:
        calls.append(text)
        if len(calls) < 4:
            raise SystemError("AST constructor recursion depth mismatch (before=57, after=60)")
        return real(text)

    monkeypatch.setattr(source_code.ast, "parse", disturbed)
    assert len(source_code.parse("a = 1").body) == 1
    assert len(calls) == 4


def test_code_from_outside_has_no_digest_by_mistake() -> None:
    with pytest.raises(ValueError, match="is no part of tinycats_core"):
        code_of(test_code_from_outside_has_no_digest_by_mistake)


def test_code_from_outside_is_known_by_its_file() -> None:
    assert foreign(samplers.SAMPLERS["ab2"]) is None
    assert foreign(test_code_from_outside_is_known_by_its_file) is not None


def test_an_edit_on_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    texts = {tmp_path / "a.py": "a = 1\n", tmp_path / "gone.py": ""}
    monkeypatch.setattr(source_code, "ROOT", tmp_path)
    monkeypatch.setattr(source_code, "TEXTS", texts)
    assert edited() == ["gone.py"]
    (tmp_path / "a.py").write_text("a = 2\n")
    assert edited() == ["a.py", "gone.py"]
