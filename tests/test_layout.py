"""The house's rules of import: one direction, and a core that a bare GPU machine can run."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOWER = {
    "tinycats_core": set(),
    "tasks": {"tinycats_core"},
    "flows": {"tinycats_core", "tasks"},
    "deployments": {"tinycats_core", "tasks", "flows"},
}
ALWAYS_THERE = {"torch", "numpy", "PIL", "pydantic", "safetensors", "tqdm"}
AT_HOME_IN = {
    "torchvision": {"classifier"},
    "torch_fidelity": {"fidelity"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "huggingface_hub": {"hub", "card"},
    "httpx2": {"hub"},  # what huggingface_hub talks through
    "modal": {"modal_client", "modal_auth"},
    "grpclib": {"modal_client"},  # what modal talks through
    "aiohttp": {"modal_client"},
    "pandas": {"bundle"},
    "matplotlib": {"grids"},
}


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", LOWER)
def test_imports_go_one_way(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if name in LOWER and name != package and name not in LOWER[package]
    }
    assert not wrong


def test_the_core_knows_nothing_of_prefect_and_each_service_has_one_module():
    for path in sorted((ROOT / "tinycats_core").glob("*.py")):
        allowed = {name for name, homes in AT_HOME_IN.items() if path.stem in homes}
        known = ALWAYS_THERE | allowed | set(sys.stdlib_module_names) | {"tinycats_core"}
        assert set(imports(path)) <= known, path.name
        assert not set(imports(path, top_level_only=True)) & AT_HOME_IN.keys(), path.name


def test_the_core_imports_with_the_bare_packages_only():
    modules = [f"tinycats_core.{path.stem}" for path in (ROOT / "tinycats_core").glob("*.py") if path.stem != "__init__"]
    absent = [*AT_HOME_IN, "prefect", "fastapi"]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({absent!r}))\n"  # None: importing it fails as if it were not installed
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
