"""The page in a real browser: it draws, draws what Python draws, and says what is wrong if it cannot."""

import base64
import io
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from page_parts import browser, real_runtime
from PIL import Image

from tinycats_core.files import read_json, write_json
from tinycats_core.generator import drawing
from tinycats_core.records import OnnxModel, Release, ReleaseParts, WebRuntime, Weights
from tinycats_core.release import bundle, demo, page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

DONE = "#save:not([disabled]), #problem:not([hidden])"
PIXELS = """images => images.map(image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
})"""


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def runtime(pytestconfig: pytest.Config) -> WebRuntime:
    return real_runtime(pytestconfig)


@pytest.fixture(scope="module")
def drawn_release(
    parts: dict[str, Any],
    classifier: Weights,
    classifier_onnx: OnnxModel,
    runtime: WebRuntime,
    tmp_path_factory: pytest.TempPathFactory,
) -> Release:
    """A release whose page draws with fp32, which is the same everywhere but for rounding."""
    judged = {**parts, "classifier": classifier, "classifier_onnx": classifier_onnx}
    made = bundle.build(tmp_path_factory.mktemp("registry"), ReleaseParts(**judged))
    write_json(made.folder / "precision.json", read_json(made.folder / "precision.json") | {"chosen": "fp32"})
    page.write(made.folder, runtime, made.name, made.version)
    return made


@contextmanager
def served(release: Release) -> Iterator[str]:
    with demo.serve(release, 0) as (server, address):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield address
        server.shutdown()
        thread.join()


@contextmanager
def opened(chromium: "Browser", **options: Any) -> Iterator[tuple["Page", list[str], list[str]]]:
    """Open an empty page; yield it, what its console says, and what it requests."""
    context = chromium.new_context(**options)
    new, said, asked = context.new_page(), [], []
    new.on("console", lambda message: said.append(message.text))
    new.on("pageerror", lambda error: said.append(str(error)))
    new.on("request", lambda request: asked.append(request.url))
    new.set_default_timeout(60_000)
    yield new, said, asked
    context.close()


def images(of: "Page") -> np.ndarray:
    """Return the pixels of the cats on a page, uint8 (N, S, S, 3)."""
    encoded = of.eval_on_selector_all("#cats img", PIXELS)
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in encoded])


def expected(release: Release, labels: list[int], seed: int, guidance: float) -> np.ndarray:
    session = drawing.load(release.folder / "cats-fp32.onnx", threads=1)
    return drawing.draw(session, labels, seed, guidance)


def test_the_page_draws_what_python_draws(drawn_release: Release, chromium: "Browser"):
    with served(drawn_release) as address, opened(chromium) as (it, said, asked):
        it.goto(f"{address}#breed=Siamese&n=3&seed=7&guidance=1.5")
        it.wait_for_selector(DONE)
        siamese = it.eval_on_selector("#breed", "field => field.selectedIndex") - 1
        assert it.inner_text("#status").startswith("3 cats drawn in ")
        assert np.abs(images(it).astype(int) - expected(drawn_release, [siamese] * 3, 7, 1.5)).max() <= 1
        it.select_option("#breed", label="Every breed")
        it.fill("#guidance", "1")
        it.fill("#n", "1")
        it.press("#n", "Enter")
        it.wait_for_selector(DONE)
        assert np.abs(images(it).astype(int) - expected(drawn_release, [*range(13)], 7, 1.0)).max() <= 1
        assert it.locator("#cats .seen").first.inner_text().startswith("judge sees: ")
        assert it.locator("#cats img").nth(siamese).get_attribute("alt", timeout=1_000).startswith("A drawn cat, Siamese; judge")  # pyright: ignore
        assert said == []
        assert [url for url in asked if not url.startswith((address.split("/demo")[0], "blob:", "data:"))] == []


def test_the_single_file_draws_the_same_cats_from_disk(drawn_release: Release, chromium: "Browser", tmp_path: Path):
    alone = shutil.copyfile(drawn_release.folder / "cats.html", tmp_path / "sent to a friend.html")
    with opened(chromium, offline=True, viewport={"width": 390, "height": 800}) as (it, said, asked):
        it.goto(f"{alone.as_uri()}#breed=Bengal&n=2&seed=3&guidance=1.5")
        it.wait_for_selector(DONE)
        bengal = it.eval_on_selector("#breed", "field => field.selectedIndex") - 1
        drawn = it.eval_on_selector_all("#cats img", "images => images.map(image => image.naturalWidth)")
        assert drawn == [16, 16]
        with it.expect_download() as saved:
            it.click("#save")
        sheet = np.asarray(Image.open(saved.value.path()).convert("RGB")).astype(int)
        wanted = expected(drawn_release, [bengal] * 2, 3, 1.5).repeat(8, axis=1).repeat(8, axis=2)
        assert np.abs(sheet[8:136, 8:136] - wanted[0]).max() <= 1
        assert it.evaluate("document.documentElement.scrollWidth") <= 390
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "blob:", "data:"))] == []


def test_a_link_that_asks_for_nonsense_is_answered_with_a_cat(drawn_release: Release, chromium: "Browser"):
    with served(drawn_release) as address, opened(chromium) as (it, said, _):
        it.goto(f"{address}#breed=Dragon&n=9999&seed=-1&guidance=999")
        it.wait_for_selector("#cats img[src]")
        assert it.input_value("#n") == "1"
        it.wait_for_selector(DONE)
        it.fill("#n", "65")
        it.click("#draw")
        assert not it.eval_on_selector("#n", "field => field.checkValidity()")
        assert said == []


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: damage(folder / "cats-fp32.onnx"), "graph is damaged"),
        (lambda folder: (folder / "cats-fp32.onnx").write_bytes(b""), "graph is damaged"),
        (lambda folder: (folder / "cats-fp32.onnx").unlink(), "cats-fp32.onnx cannot be loaded: the server answers 404"),
        (lambda folder: damage(folder / "demo" / "runtime" / "ort-wasm-simd-threaded.wasm"), "wasm is damaged"),
        (lambda folder: (folder / "demo" / "worker.js").unlink(), "The cats cannot be drawn: the script of the worker"),
    ],
)
def test_what_is_missing_or_damaged_is_named(drawn_release: Release, chromium: "Browser", tmp_path: Path, spoil: Any, why: str):
    folder = Path(shutil.copytree(drawn_release.folder, tmp_path / "copy"))
    spoil(folder)
    copy = drawn_release.model_copy(update={"path": folder / "release.json"})
    with served(copy) as address, opened(chromium) as (it, _, _):
        it.goto(address)
        it.wait_for_selector("#problem:not([hidden])")
        assert why in it.inner_text("#problem")
        assert it.inner_text("#status") == ""


def test_a_browser_or_a_way_to_open_it_that_cannot_work_is_told(drawn_release: Release, chromium: "Browser"):
    with opened(chromium) as (it, _, _):
        it.goto((drawn_release.folder / "demo" / "index.html").as_uri())
        it.wait_for_selector("#problem:not([hidden])")
        assert "Open cats.html instead" in it.inner_text("#problem")
    with opened(chromium) as (it, _, _):
        it.add_init_script("delete globalThis.WebAssembly;")
        it.goto((drawn_release.folder / "cats.html").as_uri())
        it.wait_for_selector("#problem:not([hidden])")
        assert "it has no WebAssembly" in it.inner_text("#problem")
    with opened(chromium, java_script_enabled=False) as (it, _, _):
        it.goto((drawn_release.folder / "cats.html").as_uri())
        assert "needs JavaScript" in it.inner_text("main")
