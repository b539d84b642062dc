"""The page that draws in a browser: `demo/` in a release, and `cats.html`, which holds everything in one file.

Both are made of the files in `web/`, as they stand, and of the files of the release. Nothing on the page asks another server
for anything, which its content security policy enforces; only a linked runtime is an exception, for that one address.
"""

import base64
import gzip
import html
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinycats_core.data import sources
from tinycats_core.errors import RegistryError, printable
from tinycats_core.files import sha256_of, write_text
from tinycats_core.generator import drawing
from tinycats_core.records import WebRuntime
from tinycats_core.release import contents, web, web_runtime
from tinycats_core.release.contents import read

DEMO, SINGLE = "demo", "cats.html"
RUNTIME = "runtime"  # the folder of the runtime in the page's
CLASSIFIER = "classifier.onnx"


def write(folder: Path, runtime: WebRuntime, name: str, version: str) -> None:
    """Write `demo/` into a release folder whose other files are there, and `cats.html` if the runtime lies on this machine."""
    write_demo(folder, folder / DEMO, runtime, name, version)
    if runtime.address is None:
        write_text(folder / SINGLE, _single(folder, runtime, name, version))


def write_demo(
    folder: Path, target: Path, runtime: WebRuntime, name: str, version: str, models: str = "../", card: str = ""
) -> None:
    """Write the page of a release as files to be served.

    Args:
        folder: of the release.
        models: the way from the page to the ONNX files of the release.
        card: the address of the model card; "": that in the release.
    """
    target.mkdir(parents=True, exist_ok=True)
    base = f"{runtime.address.rstrip('/')}/" if runtime.address else f"{RUNTIME}/"
    about = _about(folder, name, version, models, base)
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(runtime.address)) if runtime.address else ""
    policy = (
        "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
        f"img-src 'self' blob: data:; connect-src 'self' {origin}".rstrip()
    )
    scripts = f'{_data("about", about)}\n<script src="page.js"></script>'
    link = f'<a href="{html.escape(card or "../README.md")}">Model card</a>. '
    text = _html(folder, about, policy, '<link rel="stylesheet" href="page.css">', scripts, link)
    (target / "index.html").write_text(text, encoding="utf-8")
    (target / "page.css").write_text(web.read("page.css"), encoding="utf-8")
    (target / "page.js").write_text(web.read("page.js"), encoding="utf-8")
    (target / "worker.js").write_text(_worker(), encoding="utf-8")
    if runtime.address is None:
        (target / RUNTIME).mkdir(exist_ok=True)
        for part in runtime.parts:
            shutil.copyfile(part.path, target / RUNTIME / part.path.name)
        for licence in web_runtime.LICENCES:
            shutil.copyfile(runtime.parts[0].path.with_name(licence), target / RUNTIME / licence)


def files_of(folder: Path) -> list[Path]:
    """Return the ONNX files of a release that its page draws with: the recommended graph, and the classifier if there is one."""
    return [path for path in (_graph(folder), folder / CLASSIFIER) if path.is_file()]


def _graph(folder: Path) -> Path:
    """Return the recommended graph. Raises RegistryError if the release holds none: it was made before there were any."""
    path = folder / drawing.recommended(folder)
    if path.parent != folder or not path.is_file():
        raise RegistryError(f"{folder} holds no {printable(path.name)} for a page to draw with. Make the release again.")
    return path


def _single(folder: Path, runtime: WebRuntime, name: str, version: str) -> str:
    about = _about(folder, name, version, "", "")
    policy = (
        "default-src 'none'; script-src 'unsafe-inline' blob: 'wasm-unsafe-eval'; worker-src blob:; style-src 'unsafe-inline'; "
        "img-src blob: data:; connect-src blob: data:"
    )
    paths = {part.path.name: part.path for part in runtime.parts} | {path.name: path for path in files_of(folder)}
    packed = {asset: _packed(paths[Path(about["assets"][asset]["address"]).name]) for asset in about["assets"]}
    embedded = [f'<script type="text/plain" id="asset-{asset}">{text}</script>' for asset, text in packed.items()]
    licence = runtime.parts[0].path.with_name(web_runtime.LICENCES[0]).read_text(encoding="utf-8").replace("--", "- -")
    scripts = "\n".join(
        [
            f"<!-- ONNX Runtime, which this file holds:\n{licence}-->",
            *embedded,
            f'<script type="text/plain" id="worker">\n{_worker()}</script>',
            _data("about", about),
            f"<script>\n{web.read('page.js')}</script>",
        ]
    )
    return _html(folder, about, policy, f"<style>\n{web.read('page.css')}</style>", scripts, "")


def _worker() -> str:
    return web.read("noise.js") + "\n" + web.read("worker.js")


def _packed(path: Path) -> str:
    return base64.b64encode(gzip.compress(path.read_bytes(), 9, mtime=0)).decode()


def _data(name: str, value: Any) -> str:
    """Return a JSON value as an element of the page. A class may be called </script>."""
    text = json.dumps(value, ensure_ascii=True).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _about(folder: Path, name: str, version: str, models: str, runtime: str) -> dict[str, Any]:
    """Return what the scripts know of a release."""
    data, sample = read(folder, "data.json", contents.Data), read(folder, "sweep.json", contents.Sweep).sample
    graph, classifier = _graph(folder), folder / CLASSIFIER
    assets = {
        "script": {"address": runtime + web_runtime.SCRIPT, **_known(web_runtime.SCRIPT)},
        "wasm": {"address": runtime + web_runtime.WASM, **_known(web_runtime.WASM)},
        "graph": _asset(graph, models),
        **({"classifier": _asset(classifier, models)} if classifier.is_file() else {}),
    }
    return {
        "name": name,
        "version": version,
        "classes": data.classes,
        "image_size": data.image_size,
        "seed": sample.seed,
        "guidance": sample.guidance,
        "assets": assets,
    }


def _known(name: str) -> dict[str, Any]:
    return {"bytes": web_runtime.BYTES[name], "sha256": web_runtime.SHA256[name]}


def _asset(path: Path, models: str) -> dict[str, Any]:
    return {"address": models + path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _html(folder: Path, about: Mapping[str, Any], policy: str, style: str, scripts: str, card: str) -> str:
    licence = sources.find(read(folder, "data.json", contents.Data).source).licence
    fields = {
        "policy": html.escape(policy),
        "title": html.escape(f"{about['name']}: drawn cats"),
        "name": html.escape(about["name"]),
        "version": html.escape(about["version"]),
        "licence": html.escape(licence),
        "style": style,
        "figures": _figures(folder, about),
        "card": card,
        "scripts": scripts,
    }
    text = web.read("index.html")
    for field, value in fields.items():
        text = text.replace("{{" + field + "}}", value)
    return text


def _figures(folder: Path, about: Mapping[str, Any]) -> str:
    """Return what was measured of the release, for people who own cats and no statistics."""
    candidate = read(folder, "metrics.json", contents.Metrics).candidate
    metrics, floor, count = candidate.metrics, candidate.floor, candidate.conditions.get("count")
    lines = {
        "The right breed": _share(metrics, floor, "breed_accuracy", "of the {count} drawn cats in the test were recognised by the "
                                  "judge, a classifier that was trained on real images; of real images {floor}"),
        "Copies": _share(metrics, floor, "copy_rate", "of them are copies of a training image; of real images that were not "
                         "trained on {floor} are"),
        "Variety": _share(metrics, floor, "recall", "of the real images lie within the range of the drawn ones; for other real "
                          "images it is {floor}"),
    }  # fmt: skip
    told = {head: text.replace("{count}", f"{count:,}" if count else "") for head, text in lines.items() if text}
    size = about["image_size"]
    told["Size"] = f"{size} × {size} pixels; the network has {about['assets']['graph']['bytes'] / 1e6:.1f} MB."
    return "".join(f"<dt>{head}</dt><dd>{html.escape(text)}</dd>" for head, text in told.items())


def _share(metrics: Mapping[str, Any], floor: Mapping[str, Any], name: str, text: str) -> str | None:
    """Return a sentence on a metric that is a share, None if it was not measured."""
    if metrics.get(name) is None or floor.get(name) is None:
        return None
    return f"{100 * metrics[name]:.1f} % {text.replace('{floor}', f'{100 * floor[name]:.1f} %')}."
