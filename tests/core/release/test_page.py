"""The page of a release: what is written, and what is not."""

import base64
import gzip
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from page_parts import small_runtime

from tinycats_core.errors import ConfigError, RegistryError
from tinycats_core.files import read_json, sha256_of, write_json
from tinycats_core.presets import load
from tinycats_core.records import ReleaseParts, WebRuntime
from tinycats_core.release import bundle, lineage, page, web, web_runtime


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WebRuntime:
    return small_runtime(tmp_path, monkeypatch)


def about(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="about">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_names_the_files_of_the_release_by_size_and_digest(release: Path, runtime: WebRuntime):
    page.write(release, runtime, "tinycats-tiny", "0123456789ab")
    text = (release / "demo" / "index.html").read_text()
    known = about(text)
    assert "{{" not in text
    for asset in known["assets"].values():
        path = (release / "demo" / asset["address"]).resolve()
        assert (path.stat().st_size, sha256_of(path)) == (asset["bytes"], asset["sha256"])
    assert known["assets"]["graph"]["address"] == "../cats-int8.onnx"  # the recommended one
    assert (known["image_size"], known["seed"], known["guidance"]) == (16, 1, 1.5)
    assert {path.name for path in (release / "demo" / "runtime").iterdir()} == {*web_runtime.SHA256, *web_runtime.LICENCES}


def test_the_page_may_ask_no_other_server(release: Path, runtime: WebRuntime):
    page.write(release, runtime, "tinycats-tiny", "0123456789ab")
    for file in (release / "demo" / "index.html", release / "cats.html"):
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', file.read_text())
        assert policy
        assert "default-src &#x27;none&#x27;" in policy[1]
        assert "https:" not in policy[1]
    for file in ("index.html", "page.css", "page.js", "worker.js"):
        assert "https:" not in (release / "demo" / file).read_text(), file


def test_the_single_file_holds_what_the_page_would_fetch(release: Path, runtime: WebRuntime):
    page.write(release, runtime, "tinycats-tiny", "0123456789ab")
    text = (release / "cats.html").read_text()
    packed = dict(re.findall(r'<script type="text/plain" id="asset-(\w+)">([^<]*)</script>', text))
    assert packed.keys() == about(text)["assets"].keys()
    assert gzip.decompress(base64.b64decode(packed["graph"])) == (release / "cats-int8.onnx").read_bytes()
    assert re.search(r'(src|href)="(?!data:)', text) is None
    assert web.read("noise.js") in text


def test_names_of_strangers_end_no_element(release: Path, runtime: WebRuntime):
    names = ["</script><script>alert(1)</script>", "<b>"]
    write_json(release / "data.json", read_json(release / "data.json") | {"classes": names})
    page.write(release, runtime, "tinycats-tiny", "0123456789ab")
    for file in ("demo/index.html", "cats.html"):
        text = (release / file).read_text()
        assert "alert(1)</script>" not in text
        assert about(text)["classes"] == names


@pytest.mark.parametrize("chosen", ["int9", "../../x"])
def test_a_release_without_the_graph_gets_no_page(release: Path, runtime: WebRuntime, chosen: str):
    write_json(release / "precision.json", read_json(release / "precision.json") | {"chosen": chosen})
    with pytest.raises(RegistryError, match=r"holds no .* for a page to draw with"):
        page.write(release, runtime, "tinycats-tiny", "0123456789ab")


def test_a_linked_runtime_is_the_only_other_server(release: Path):
    linked = WebRuntime(version="1", address="https://cats.example/ort/")
    page.write(release, linked, "tinycats-tiny", "0123456789ab")
    text = (release / "demo" / "index.html").read_text()
    assert about(text)["assets"]["wasm"]["address"] == f"https://cats.example/ort/{web_runtime.WASM}"
    assert "connect-src &#x27;self&#x27; https://cats.example" in text
    assert not (release / "cats.html").exists()
    assert not (release / "demo" / "runtime").exists()


def test_the_page_is_part_of_the_release_and_of_its_lineage(parts: dict[str, Any], runtime: WebRuntime, tmp_path: Path):
    plain = bundle.build(tmp_path / "registry", ReleaseParts(**parts))
    made = bundle.build(tmp_path / "registry", ReleaseParts(**parts, web_runtime=runtime))
    assert made.version != plain.version
    assert lineage.inspect(made.folder)["wrong"] == []
    assert "`cats.html`" in (made.folder / "README.md").read_text()
    assert "`cats.html`" not in (plain.folder / "README.md").read_text()
    (made.folder / "demo" / "runtime" / web_runtime.WASM).write_text("another program")
    assert lineage.inspect(made.folder)["wrong"][0].startswith(f"demo/runtime/{web_runtime.WASM} has changed")


# The runtime.


def config(**publish: Any):
    return load({"publish": {"name": "x", **publish}}).publish


def test_the_runtime_is_taken_from_the_archive_of_npm(runtime: WebRuntime, tmp_path: Path):
    with tarfile.open(tmp_path / "runtime.tgz", "w:gz") as archive:
        for name in web_runtime.SHA256:
            archive.add(tmp_path / "given" / name, f"package/dist/{name}")
        archive.add(tmp_path / "given", "package/../../evil")
    found = web_runtime.find(config(page_runtime=str(tmp_path / "runtime.tgz")), tmp_path / "other")
    assert found is not None
    assert found.content == runtime.content
    assert found.is_intact()
    assert not (tmp_path / "evil").exists()
    assert len([*(tmp_path / "other" / f"onnxruntime-web-{web_runtime.VERSION}").iterdir()]) == 4


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_without_a_network_a_release_gets_no_page_unless_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fake_npm(tmp_path / "bin", monkeypatch, "echo 'npm error network refused' >&2; exit 1")
    assert web_runtime.find(config(), tmp_path / "cache") is None
    assert "will have no page that draws: npm cannot fetch onnxruntime-web" in caplog.text
    with pytest.raises(RegistryError, match=r"it said: npm error network refused.*publish.page to 'none'"):
        web_runtime.find(config(page="bundled"), tmp_path / "cache")
    assert web_runtime.find(config(page="none"), tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists() or not [*(tmp_path / "cache").iterdir()]


def test_another_program_than_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "given").mkdir()
    for name in web_runtime.SHA256:
        (tmp_path / "given" / name).write_text("another program")
    for wrong, why in (
        (tmp_path / "given", "is not that of"),
        (tmp_path / "none", "does not exist"),
        (Path(__file__), "archive of"),
    ):
        with pytest.raises(RegistryError, match=why):
            web_runtime.find(config(page_runtime=str(wrong)), tmp_path / "cache")
    fake_npm(tmp_path / "bin", monkeypatch, 'echo junk > "$7/x.tgz"; for a in "$@"; do last=$a; done; echo junk > "$last/x.tgz"')
    with pytest.raises(RegistryError, match="is not the archive of"):
        web_runtime.find(config(page="bundled"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"page": "linked"}, "it is the https:// address"),
        ({"page": "linked", "page_runtime": "http://x.example"}, "it is the https:// address"),
        ({"page_runtime": "https://x.example"}, "a folder or an archive"),
        ({"space": True}, "a Space is the page on the Hub"),
        ({"space": True, "to": "hub", "page": "none"}, "a Space is the page on the Hub"),
        ({"page": "maybe"}, "publish.page is 'maybe'"),
    ],
)
def test_settings_of_the_page_that_do_not_fit_are_refused(given: dict[str, Any], why: str):
    with pytest.raises(ConfigError, match=why):
        config(**given)
