"""The core runs on a bare GPU machine, and each service has one module. The directions of imports are held by import-linter."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "tinycats_core"
FILES = sorted(CORE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
ALWAYS_THERE = {"torch", "filelock", "numpy", "PIL", "pydantic", "safetensors", "tqdm"}
AT_HOME_IN = {
    "torchvision": {"evaluation.backbones"},
    "torch_fidelity": {"evaluation.extractors", "evaluation.metrics"},
    "timm": {"evaluation.dinov2"},
    "onnx": {"generator.onnx_file", "release.export", "release.graph", "release.forms", "release.tables"},
    "google": {"generator.onnx_file"},  # protobuf, what onnx reads with
    "onnxruntime": {
        *("generator.onnx_file", "generator.drawing", "release.export", "release.graph_check", "release.stranger"),
        *("release.tables", "release.inference", "release.cats"),  # the last two name the type alone
    },
    "huggingface_hub": {
        "release.hub",
        "release.hub_access",
        "release.space",
        "release.card",
        "release.pretrained",
        "data.parquet_mirror",
    },
    "httpx2": {"release.hub_access", "data.parquet_mirror"},  # what huggingface_hub talks through
    "model_signing": {"release.signature"},
    "modal": {"compute.modal_client", "compute.modal_auth"},
    "grpclib": {"compute.modal_client"},  # what modal talks through
    "aiohttp": {"compute.modal_client"},
    "pyarrow": {"data.parquet_mirror"},
    "pandas": {"release.bundle"},
    "matplotlib": {"pictures"},
    "text_unidecode": {"pictures"},
    "pillow_heif": {"data.decode"},
}


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_every_room_is_looked_at():
    rooms = {path.name for path in CORE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {"config", "data", "generator", "training", "evaluation", "release", "compute"}
    assert {name.split(".")[1] for name in MODULES if name.count(".") == 2} == rooms
    assert {home for homes in AT_HOME_IN.values() for home in homes} <= {name.partition(".")[2] for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_each_service_has_one_module(name: str):
    allowed = {package for package, homes in AT_HOME_IN.items() if name.partition(".")[2] in homes}
    known = ALWAYS_THERE | allowed | set(sys.stdlib_module_names) | {"tinycats_core"}
    assert set(imports(MODULES[name])) <= known
    assert not set(imports(MODULES[name], top_level_only=True)) & AT_HOME_IN.keys()


def test_the_core_imports_with_the_bare_packages_only():
    absent = [*AT_HOME_IN, "prefect", "fastapi"]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None: importing it fails as if it were not installed
        f"for name in {sorted(MODULES)!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_file_of_the_core_is_long():
    assert {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) >= 360} == {}


def test_modules_that_strings_name_exist():
    """Commands of child processes and addresses in released model cards are strings: nothing else would notice a move."""
    named = set()
    for path in [*FILES, *(ROOT / "flows").rglob("*.py"), *(ROOT / "deployments").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = node.value.replace("`", " ").replace('"', " ").split()
                named |= {word.strip(".,;:()") for word in words if word.startswith("tinycats_core.")}
    assert named
    missing = {name for name in named if name not in MODULES and name.rpartition(".")[0] not in MODULES}
    assert missing == set()
