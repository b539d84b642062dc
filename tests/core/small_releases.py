"""Small sealed releases for a Hub on the loopback; what else a release holds makes no difference here."""

from pathlib import Path

from hub_server import Hub

from tinycats_core.config import PublishConfig
from tinycats_core.records import Release
from tinycats_core.release import manifest

CONFIG = PublishConfig(name="tinycats-test", to="hub")
REPO = "someone/tinycats-test"


def make_release(folder: Path, version: str, **files: str) -> Release:
    place = folder / version
    (place / "samples").mkdir(parents=True)
    contents = {"README.md": "---\nlicense: mit\n---\n", "model.safetensors": f"weights {version}", **files}
    for name, text in contents.items():
        (place / name).write_text(text)
    manifest.seal(place, CONFIG.name, version, "key", {})
    return manifest.read_release(place)


def held(server: Hub, repo: str = REPO) -> dict[str, bytes]:
    files = dict(server.files(repo) or {})
    files.pop(".gitattributes")
    return files


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
