"""Which of the project's sources decide a result, as a digest that an edit of meaning changes and a comment does not."""

import ast
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from tinycats_core.files import digest_of, sha256_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tinycats_core",)
TELLS = ("tinycats_core.progress",)  # modules that only tell how far work is, and are no part of any result
PARSE_TRIES = 20
# Read at the start: a file that is edited while the program runs is not the code that runs.
BESIDE = (".html", ".css", ".js")  # sources in a package that are no Python: they belong to its __init__.py
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for name in PACKAGES
    for path in sorted((ROOT / name).rglob("*"))
    if path.suffix in (".py", *BESIDE)
}
Entry = Callable[..., Any] | ModuleType
Definition = tuple[str, str]  # of a module and a name in it


class Code(NamedTuple):
    """The sources that something runs."""

    digest: str
    files: Mapping[str, str]  # the digest of what is used of each file, by its path below the project's root


def code_of(*entries: Entry, apart_from: tuple[Entry, ...] = ()) -> Code:
    """Return the code that functions, classes or whole modules of the project run, without what is `apart_from` it.

    It is made of the top-level definitions that they reach by name: functions, classes with all their methods, constants
    and tables, and what statements at the top of a module do to these. Comments, docstrings and formatting are no part of it.
    A name in a type annotation counts: it leads to the methods of an argument.
    """
    return _code(*(tuple(definition for entry in given for definition in _start(entry)) for given in (entries, apart_from)))


def covered(*entries: Entry) -> set[Definition]:
    """Return the definitions that `code_of` the same entries is made of."""
    return _reached(tuple(definition for entry in entries for definition in _start(entry)), ())


@cache
def _code(start: tuple[Definition, ...], left_out: tuple[Definition, ...]) -> Code:
    reached = _reached(start, left_out)
    by_file: dict[str, dict[str, Any]] = defaultdict(dict)
    for module, name in sorted(reached):
        by_file[_read(module).file][name] = [plain(statement) for statement in _read(module).definitions[name]]
        for beside in _beside(_read(module).file):
            by_file[beside]["text"] = [TEXTS[ROOT / beside]]
    files = {file: digest_of(definitions) for file, definitions in sorted(by_file.items())}
    return Code(digest_of(files), MappingProxyType(files))


def _beside(file: str) -> list[str]:
    """Return the sources that are no Python and belong to a module, by their paths below the project's root."""
    folder = Path(file).parent
    if Path(file).name != "__init__.py":
        return []
    return [str(path.relative_to(ROOT)) for path in TEXTS if path.parent == ROOT / folder and path.suffix in BESIDE]


def _reached(start: tuple[Definition, ...], left_out: tuple[Definition, ...]) -> set[Definition]:
    wanted, reached = list(start), set(left_out)
    while wanted:
        definition = wanted.pop()
        if definition not in reached:
            reached.add(definition)
            wanted.extend(_references(definition))
    return reached.difference(left_out)


def edited() -> list[str]:
    """Return the sources on disk that are no longer those that this program has loaded."""
    gone = [path for path in TEXTS if not path.is_file()]
    changed = [path for path, text in TEXTS.items() if path.is_file() and path.read_text(encoding="utf-8") != text]
    return sorted(str(path.relative_to(ROOT)) for path in (*gone, *changed))


def foreign(value: Any) -> str | None:
    """Return the sha256 of the file that defines a function or the class of an object; None for one of the project's own."""
    name = getattr(value, "__module__", None) or type(value).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return sha256_of(Path(file)) if file and name.partition(".")[0] not in PACKAGES and Path(file).is_file() else None


def commit() -> tuple[str | None, bool | None]:
    """Return the commit that is checked out and whether the tree is clean; None for both outside a repository."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    with suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:  # not of a repository that an environment lies in
            return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--untracked-files=no")
    return None, None


def parse(text: str) -> ast.Module:
    """Return the syntax tree of Python text.

    CPython 3.11 counts the depth of all trees that are made at a time with one counter (gh-106905): a second thread that
    makes one, such as Prefect's, ends in a SystemError, although nothing is wrong. So it is tried again.
    """
    for _ in range(PARSE_TRIES):
        with suppress(SystemError):
            return ast.parse(text)
        time.sleep(0.01)
    return ast.parse(text)


class _Module(NamedTuple):
    file: str
    definitions: dict[str, list[ast.stmt]]  # the statements that define or change each top-level name
    imports: dict[str, str]  # what an imported name stands for, in full


@cache
def _read(name: str) -> _Module:
    """Return a module of the project, parsed. Its name must be one of `_path`'s."""
    path = _path(name)
    assert path is not None, name
    body = parse(TEXTS[path]).body
    imports, definitions, other = dict(_imports(body, name)), defaultdict(list), []
    for statement in body:
        for defined in _defined(statement):
            definitions[defined].append(statement)
        if isinstance(statement, ast.Expr) or getattr(statement, "decorator_list", None):
            other.append(statement)
    always = []
    for statement in other:
        changes = _reach(_run_at_import(statement), definitions)
        for changed in changes:
            if statement not in definitions[changed]:
                definitions[changed].append(statement)
        if isinstance(statement, ast.Expr) and not changes and not _is_text(statement):
            always.append(statement)
    for statements in definitions.values():
        statements.extend(always)
    return _Module(str(path.relative_to(ROOT)), dict(definitions), imports)


def _path(name: str) -> Path | None:
    """Return the file of a module of the project; None if there is no such module."""
    folder = ROOT.joinpath(*name.split("."))
    return next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path in TEXTS), None)


def _start(entry: Entry) -> list[Definition]:
    """Return the definitions of an entry. Raises ValueError for one that is not of the project."""
    name = entry.__name__ if isinstance(entry, ModuleType) else f"{entry.__module__}.{entry.__qualname__}"
    if not (found := list(_resolve(name))):
        raise ValueError(f"{name} is no part of {', '.join(PACKAGES)}: its code is not known")
    return found


def _all_of(module: str) -> Iterator[Definition]:
    return ((module, name) for name in _read(module).definitions)


def _resolve(dotted: str) -> Iterator[Definition]:
    """Return the definitions that a full name leads to: all of a module if it names no more than that."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return
    size = next((size for size in range(len(parts), 0, -1) if _path(".".join(parts[:size]))), 0)
    if not size:
        return
    module, rest = ".".join(parts[:size]), parts[size:]
    if module in TELLS:
        return
    read = _read(module)
    if rest and rest[0] in read.definitions:
        yield module, rest[0]
    elif rest and rest[0] in read.imports:
        yield from _resolve(".".join([read.imports[rest[0]], *rest[1:]]))
    else:
        yield from _all_of(module)  # named as a whole, as for its __file__


def _references(definition: Definition) -> Iterator[Definition]:
    module, name = definition
    read = _read(module)
    for statement in read.definitions[name]:
        names = read.imports | dict(_imports([statement], module))
        for used in _names(statement):
            root, dot, rest = used.partition(".")
            if root in names:
                yield from _resolve(names[root] + dot + rest)
            elif root in read.definitions:
                yield module, root
            else:
                yield from _resolve(used) if root in PACKAGES and rest else ()


def _names(tree: ast.AST) -> Iterator[str]:
    """Return each name that is used below a node, with the attributes that follow it, also within text that is code."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        chain, attributes = node, []
        while isinstance(chain, ast.Attribute):
            attributes.append(chain.attr)
            chain = chain.value
        if isinstance(chain, ast.Name):
            yield ".".join([chain.id, *reversed(attributes)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and any(name in node.value for name in PACKAGES):
            yield from _names_in_text(node.value)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def _names_in_text(text: str) -> Iterator[str]:
    """Return the names of the project in a text that a Python process is given to run; none if it is no Python."""
    try:
        body = parse(text).body
    except (SyntaxError, ValueError):
        return
    names = dict(_imports(body, ""))
    for statement in body:
        for used in _names(statement):
            root, dot, rest = used.partition(".")
            yield names.get(root, root) + dot + rest


def _imports(body: list[ast.stmt], module: str) -> Iterator[tuple[str, str]]:
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (root, root)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import, whose names are not followed"
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _defined(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module defines."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {statement.name}
        case ast.Import() | ast.ImportFrom() | ast.Expr():
            return set()
    stored = (node for node in ast.walk(statement) if isinstance(getattr(node, "ctx", None), ast.Store))
    return {_root(node) for node in (*stored, *_targets(statement))} - {""}


def _targets(statement: ast.stmt) -> list[ast.expr]:
    """Return what a statement writes to: of `TABLE["key"] = value`, the table."""
    return statement.targets if isinstance(statement, ast.Assign) else []


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _reach(nodes: list[ast.expr], definitions: Mapping[str, list[ast.stmt]]) -> set[str]:
    """Return the top-level names of a module that code at its top may change: a call of `register` may change its table."""
    waiting: list[ast.AST] = [*nodes]
    reached: set[str] = set()
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in reached:
                reached.add(node.id)
                waiting.extend(definitions[node.id])
    return reached


def _run_at_import(statement: ast.stmt) -> list[ast.expr]:
    return [statement.value] if isinstance(statement, ast.Expr) else list(getattr(statement, "decorator_list", []))


def _is_text(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


def plain(node: Any) -> Any:
    """Return a syntax tree as a JSON value: no docstrings, no positions, and the same in each version of Python."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.Constant):
        return ["Constant", repr(node.value)]  # 1, 1.0 and True are three things, and JSON has no bytes
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and _is_text(node.body[0]):
        fields["body"] = node.body[1:]
    return [type(node).__name__, {name: plain(value) for name, value in fields.items() if value not in (None, [])}]
