import gzip
import hashlib
import io
import json
import os
import resource
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Hub, loopback_hub
from PIL import Image
from small_photos import bytes_of

from benchmarks import crops
from tinycats_core.config import BREEDS, CLASSES, DataConfig
from tinycats_core.data import download, oxford_archives, oxford_pets, parquet_mirror, preparation, splits, validation
from tinycats_core.errors import DataError, TinycatsError
from tinycats_core.records import Dataset

DOGS = ("beagle", "pug")
CONFIG = DataConfig(source="oxford_pets", image_size=16)


def photo(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    # mtime: without it the header holds the present second, and the same members are other bytes a second later
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


class Mirror:
    """A small set in the official layout on a real server, which can be told to misbehave."""

    def __init__(self):
        self.photos: dict[str, bytes] = {}
        lists: dict[str, list[str]] = {"trainval": [], "test": []}
        for species, names in ((1, BREEDS), (2, DOGS)):
            for number, name in enumerate(names, 1):
                for index, split in ((1, "trainval"), (34, "test"), (116, "trainval")):
                    self.photos[f"{name}_{index}"] = photo(len(self.photos))
                    lists[split].append(f"{name}_{index} {number} {species} {number}")
        self.lists = {split: "\n".join(lines) + "\n" for split, lines in lists.items()}
        self.annotations: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.failures: list[int] = []  # answer these codes first
        self.cut_at: list[int] = []  # then end the body after so many bytes
        self.ranges = True
        self.refused = ""  # a part of paths that are not here
        self.pack()

    def pack(self, extra: dict[str, bytes] | None = None, links: dict[str, str] | None = None) -> None:
        images = {"images/Abyssinian_100.mat": b"stray"} | (extra or {})
        images |= {f"images/{name}.jpg": content for name, content in self.photos.items()}
        annotations = {"annotations/trimaps/Bengal_1.png": b"x"} | self.annotations
        annotations |= {f"annotations/{split}.txt": text.encode() for split, text in self.lists.items()}
        self.files = {"images.tar.gz": tar(images, links), "annotations.tar.gz": tar(annotations)}

    def trust(self, monkeypatch: pytest.MonkeyPatch) -> None:
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in self.files.items()}
        monkeypatch.setattr(oxford_archives, "ARCHIVES", {name: md5[name] for name in oxford_archives.ARCHIVES})
        counts = {"train": self.lists["trainval"].count("\n"), "test": self.lists["test"].count("\n")}
        monkeypatch.setattr(oxford_archives, "PHOTOS", counts)
        monkeypatch.setattr(parquet_mirror, "PHOTOS", counts)
        monkeypatch.setattr(oxford_pets, "PHOTOS", counts)


def archives_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".origin"}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    mirror = Mirror()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            wanted, path = self.headers.get("Range"), self.path.partition("?")[0]
            mirror.requests.append((self.path, wanted))
            content = mirror.files.get(path.rsplit("/", 1)[1])
            absent = content is None or (mirror.refused and mirror.refused in path)
            code = mirror.failures.pop(0) if mirror.failures else 404 if absent else 200
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and mirror.ranges else 0
            if code == 200 and start:
                code = 206 if start < len(content or b"") else 416
            body = (content or b"")[start:] if code < 300 else b""
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if mirror.cut_at and body and self.path.endswith("images.tar.gz"):
                body, self.close_connection = body[: mirror.cut_at.pop(0)], True
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # clients that hang up are part of the tests

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("TINYCATS_OXFORD_URL", f"http://127.0.0.1:{server.server_port}/pets/data/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.001)
    mirror.trust(monkeypatch)
    yield mirror
    server.shutdown()
    thread.join()
    server.server_close()


# --- the data set -----------------------------------------------------------------------------------------------------


def test_the_official_archives_are_those_of_torchvision():
    from torchvision.datasets import OxfordIIITPet

    official = {url.rsplit("/", 1)[1]: md5 for url, md5 in OxfordIIITPet._RESOURCES}
    assert official == oxford_archives.ARCHIVES
    assert {url.rsplit("/", 1)[0] for url, _ in OxfordIIITPet._RESOURCES} == {oxford_archives.ADDRESSES[0]}


def test_the_set_is_downloaded_and_split_as_its_lists_say(mirror: Mirror, tmp_path: Path):
    steps: list[tuple[float, str]] = []
    dataset = preparation.prepare(CONFIG, tmp_path, lambda *step: steps.append(step))
    report = validation.validate(dataset, CONFIG)
    assert dataset.classes == CLASSES
    assert [row["train"] for row in report.rows] == [1] * 12 + [3]
    assert [row["val"] for row in report.rows] == [1] * 13
    assert [row["test"] for row in report.rows] == [1] * 12 + [2]
    assert report.warnings == ()
    rows = {row["name"]: (row["class"], row["split"]) for row in splits.read_manifest(dataset)["images"]}
    assert rows["Egyptian_Mau_34.jpg"] == ("Egyptian_Mau", "test")
    assert rows["pug_1.jpg"] == ("other", "train")
    assert len(rows) == 42
    assert [fraction for fraction, _ in steps] == sorted(fraction for fraction, _ in steps)
    assert any(text.startswith("images.tar.gz: ") for _, text in steps)
    assert mirror.requests == [("/pets/data/annotations.tar.gz", None), ("/pets/data/images.tar.gz", None)]


def test_archives_are_downloaded_once_for_all_sizes(mirror: Mirror, tmp_path: Path):
    small = preparation.prepare(CONFIG, tmp_path)
    large = preparation.prepare(DataConfig(source="oxford_pets", image_size=32), tmp_path)
    assert len(mirror.requests) == 2
    assert small.sha256 != large.sha256
    assert preparation.prepare(CONFIG, tmp_path / "elsewhere").sha256 == small.sha256


def test_a_photo_in_both_splits_stays_in_the_test_split(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mirror.photos["Bengal_1"] = mirror.photos["Bengal_34"]
    mirror.pack()
    mirror.trust(monkeypatch)
    dataset = preparation.prepare(CONFIG, tmp_path)
    rows = {row["name"]: row["split"] for row in splits.read_manifest(dataset)["images"]}
    assert rows["Bengal_34.jpg"] == "test"
    assert "Bengal_1.jpg" not in rows
    assert "Bengal_1.jpg (= Bengal_34.jpg)" in validation.validate(dataset, CONFIG).warnings[0]


def test_known_odd_files_and_contradictions_are_warnings(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mirror.photos["beagle_116"] = b"damaged"
    mirror.photos["Birman_116"] = mirror.photos["Persian_116"]
    mirror.pack()
    mirror.trust(monkeypatch)
    report = validation.validate(preparation.prepare(CONFIG, tmp_path), CONFIG)
    assert report.warnings == (
        "1 file is not decodable and left out: beagle_116.jpg (not an image).",
        "2 files are the same image as one of another class and left out: "
        "Birman_116.jpg (= Persian_116.jpg), Persian_116.jpg (= Birman_116.jpg).",
    )


def test_other_damaged_photos_fail_unless_skipped(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mirror.photos["pug_116"] = mirror.photos["pug_116"][:-200]
    mirror.pack()
    mirror.trust(monkeypatch)
    dataset = preparation.prepare(CONFIG, tmp_path)
    with pytest.raises(DataError, match=r"1 file is not decodable: pug_116\.jpg \(image file is truncated"):
        validation.validate(dataset, CONFIG)
    skip = CONFIG.model_copy(update={"corrupt_files": "skip"})
    assert "pug_116.jpg" in validation.validate(dataset, skip).warnings[0]


def test_members_that_point_elsewhere_touch_nothing(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(photo(999))
    evil = {"../../evil.jpg": photo(1000), "/tmp/tinycats-evil.jpg": photo(1001), "images/../../evil.txt": b"x"}
    mirror.pack(evil)
    mirror.trust(monkeypatch)
    preparation.prepare(CONFIG, tmp_path / "a" / "data")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "secret.jpg", ".lock", "images.tar.gz", "images.tar.gz.origin", "annotations.tar.gz", "annotations.tar.gz.origin",
        "images.safetensors", "manifest.json",
    }  # fmt: skip
    assert not Path("/tmp/tinycats-evil.jpg").exists()

    mirror.photos.pop("Bengal_1")
    mirror.pack(links={"images/Bengal_1.jpg": str(secret)})
    mirror.trust(monkeypatch)
    with pytest.raises(DataError, match=r"lacks 1 of the listed photos \(Bengal_1\.jpg\)"):
        preparation.prepare(CONFIG, tmp_path / "b")


@pytest.mark.parametrize("line", ["Bengal_1 6 1", "Bengal_1 6 3 2", "Tabby_1 6 1 2", "", "\N{REPLACEMENT CHARACTER}"])
def test_lists_of_another_form_are_refused(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str):
    mirror.lists["test"] += line + "\n"
    mirror.pack()
    mirror.trust(monkeypatch)
    with pytest.raises(DataError, match="the test list has the line"):
        preparation.prepare(CONFIG, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a tar", tar({"a": b"x"})[:-20], tar({"a": b"x"})],
    ids=["empty", "text", "truncated", "of something else"],
)
def test_archives_of_another_form_are_refused(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes):
    mirror.files["annotations.tar.gz"] = content
    mirror.trust(monkeypatch)
    with pytest.raises(DataError, match=r"annotations\.tar\.gz (is not a readable archive|has no annotations)"):
        preparation.prepare(CONFIG, tmp_path)


def parquet(rows: list[tuple[str, int, bytes]], names: list[str]) -> bytes:
    """Return a parquet file as the library `datasets` writes it."""
    images = [{"bytes": content, "path": f"{stem}.jpg"} for stem, _, content in rows]
    table = pyarrow.table({"image": images, "label": [label for _, label, _ in rows]})
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), buffer)
    return buffer.getvalue()


@pytest.fixture
def hub(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the photos of the mirror as someone/pets."""
    names = [name.lower().replace("_", " ") for name in (*DOGS, *BREEDS)]
    files: dict[str, bytes] = {"README.md": b"pets"}
    for split, text in mirror.lists.items():
        stems = [line.split()[0] for line in text.splitlines()]
        rows = [(stem, names.index(stem.rpartition("_")[0].lower().replace("_", " ")), mirror.photos[stem]) for stem in stems]
        files[f"data/{'train' if split == 'trainval' else split}-00000-of-00001.parquet"] = parquet(rows, names)
    with loopback_hub(monkeypatch, tmp_path / "hf") as hub:
        hub.commit("datasets/someone/pets", files)
        yield hub


MIRRORED = CONFIG.model_copy(update={"mirror": "someone/pets"})


def test_a_mirror_on_the_hub_has_the_same_images(hub: Hub, tmp_path: Path):
    dataset = preparation.prepare(MIRRORED, tmp_path / "a")
    assert dataset.sha256 == preparation.prepare(CONFIG, tmp_path / "b").sha256
    manifest = splits.read_manifest(dataset)
    commit = hub.commits["datasets/someone/pets"][-1][0]
    assert manifest["origin"] == {"someone/pets": {"commit": commit, "from": "the Hub"}}
    (warning,) = validation.validate(dataset, MIRRORED).warnings
    assert warning.endswith(f"was taken for it: someone/pets (commit {commit[:12]}).")


def test_what_is_no_mirror_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refusal(home: str = "a") -> str:
        with pytest.raises(DataError) as error:
            preparation.prepare(MIRRORED, tmp_path / home)
        assert "\n" not in str(error.value)
        return str(error.value)

    files = hub.commits["datasets/someone/pets"][-1][1]
    train, test = sorted(name for name in files if name.endswith(".parquet"))[::-1]
    hub.commit("datasets/someone/pets", {train: files[train]})
    assert "has 28 of 28 train and 0 of 14 test photos: it is no mirror" in refusal()
    hub.commit("datasets/someone/pets", files | {test: b"PAR1 damaged"})
    assert "is damaged" in refusal()
    hub.commit("datasets/someone/pets", files | {train: parquet([("x", 0, photo(1))] * 28, ["cat"])})
    assert "its labels have no names of the 12 breeds" in refusal()
    middle = len(files[train]) // 3
    hub.commit("datasets/someone/pets", files | {train: files[train][:middle] + bytes(2000) + files[train][middle + 2000 :]})
    assert "is damaged" in refusal()
    hub.commits.clear()
    assert refusal("b").startswith("cannot download data.mirror someone/pets: ")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"data\.mirror needs pyarrow: pip install"):
        parquet_mirror._open(tmp_path, "someone/pets")


def voc(*edges: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """Return an annotation as the official ones are."""
    box = "".join(f"<{name}>{edge}</{name}>" for name, edge in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    head = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{head}</annotation>".encode()


def trimap(left: int, right: int) -> bytes:
    """Return a trimap whose animal lies between two columns, with a border of two pixels."""
    values = np.full((32, 40), 2, np.uint8)
    values[4:28, max(0, left - 2) : right + 2] = 3
    values[6:26, left:right] = 1
    return bytes_of(Image.fromarray(values), "PNG")


def left_edge(dataset: Dataset, mirror: Mirror, name: str) -> int:
    """Return the first column of the square that was cut out of a photo, which is 40 pixels wide and 32 high."""
    rows = splits.read_manifest(dataset)["images"]
    row = next(row for row in rows if row["name"] == f"{name}.jpg")
    index = [other["name"] for other in rows if other["split"] == row["split"]].index(row["name"])
    found = splits.load_split(dataset, row["split"])[0][index].permute(1, 2, 0).numpy()
    photo = Image.open(io.BytesIO(mirror.photos[name]))
    cut = [photo.crop((left, 0, left + 32, 32)).resize((16, 16), Image.Resampling.LANCZOS) for left in range(9)]
    return int(np.argmin([np.abs(found.astype(int) - np.asarray(square)).sum() for square in cut]))


def test_heads_and_animals_decide_the_square(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    subject = CONFIG.model_copy(update={"crop": "subject"})
    stems = list(mirror.photos)
    mirror.annotations = {f"annotations/trimaps/{stem}.png": trimap(10, 30) for stem in stems}
    mirror.annotations |= {
        "annotations/xmls/Bengal_1.xml": voc(38, 5, 40, 20),  # the head at the right,
        "annotations/trimaps/Bengal_1.png": trimap(0, 40),  # the animal everywhere
        "annotations/trimaps/Bengal_34.png": trimap(0, 9),  # a test photo, without its head
        "annotations/xmls/pug_1.xml": voc(38, 5, 60, 20, size=(60, 32)),  # of another picture
        "annotations/trimaps/pug_1.png": trimap(0, 9),
        "annotations/xmls/pug_116.xml": b"<annotation>",
        "annotations/trimaps/beagle_1.png": trimap(0, 0),
    }
    mirror.pack()
    mirror.trust(monkeypatch)
    dataset = preparation.prepare(subject, tmp_path)
    left = {name: left_edge(dataset, mirror, name) for name in ("Bengal_1", "Bengal_34", "pug_1", "Birman_1", "beagle_1")}
    assert left == {"Bengal_1": 8, "Bengal_34": 0, "pug_1": 0, "Birman_1": 4, "beagle_1": 4}
    bad, none = validation.validate(dataset, subject).warnings
    assert bad.startswith(
        "3 boxes are unusable and left out: beagle_1.jpg (annotations/trimaps/beagle_1.png: it shows no animal), "
    )
    assert "pug_1.jpg (annotations/xmls/pug_1.xml: drawn on 60x32, the photo is 40x32), pug_116.jpg (annotations/xmls/" in bad
    assert none == "1 photo is without a box and cut at the centre: beagle_1.jpg."
    assert dataset.sha256 != preparation.prepare(CONFIG, tmp_path).sha256
    figures = crops.measure(crops.read_oxford(tmp_path / "oxford-iiit-pet"))
    assert (figures["photos"], figures["heads"], figures["animals"]) == (40, 1, 40)  # pug_1 has two sizes, beagle_1 nothing
    assert (figures["head_kept_centre"], figures["head_kept_subject"], figures["head_kept_animal_alone"]) == (0, 1, 0)


# --- the download -----------------------------------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_stopped(mirror: Mirror, tmp_path: Path):
    size = len(mirror.files["images.tar.gz"])
    mirror.cut_at = [5000, 3000]
    oxford_archives.fetch(tmp_path)
    assert mirror.requests[1:] == [
        ("/pets/data/images.tar.gz", None),
        ("/pets/data/images.tar.gz", "bytes=5000-"),
        ("/pets/data/images.tar.gz", "bytes=8000-"),
    ]
    assert size > 8000
    assert archives_in(tmp_path) == mirror.files


def test_a_download_that_makes_progress_is_never_given_up(mirror: Mirror, tmp_path: Path):
    mirror.cut_at = [1000] * (download.ATTEMPTS + 3)
    oxford_archives.fetch(tmp_path)
    assert len(mirror.requests) == download.ATTEMPTS + 3 + 2


def test_a_later_run_goes_on_with_the_part_of_an_earlier_one(mirror: Mirror, tmp_path: Path):
    (tmp_path / "images.tar.gz.part").write_bytes(mirror.files["images.tar.gz"][:7000])
    (tmp_path / "annotations.tar.gz.part").write_bytes(mirror.files["annotations.tar.gz"])  # whole: answered by 416
    oxford_archives.fetch(tmp_path)
    assert mirror.requests[-1] == ("/pets/data/images.tar.gz", "bytes=7000-")
    assert archives_in(tmp_path) == mirror.files


def test_a_server_without_ranges_sends_everything_again(mirror: Mirror, tmp_path: Path):
    mirror.ranges = False
    (tmp_path / "images.tar.gz.part").write_bytes(mirror.files["images.tar.gz"][:7000])
    oxford_archives.fetch(tmp_path)
    assert len(mirror.requests) == 2
    assert archives_in(tmp_path) == mirror.files


@pytest.mark.parametrize("length", [700, 10**6])
def test_a_part_of_another_file_is_thrown_away(mirror: Mirror, tmp_path: Path, length: int):
    (tmp_path / "images.tar.gz.part").write_bytes(b"x" * length)
    oxford_archives.fetch(tmp_path)
    assert archives_in(tmp_path) == mirror.files


@pytest.mark.parametrize("code", [503, 500, 429, 408])
def test_a_busy_server_is_asked_again(mirror: Mirror, tmp_path: Path, code: int):
    mirror.failures = [code, code]
    oxford_archives.fetch(tmp_path)
    assert [path for path, _ in mirror.requests] == ["/pets/data/annotations.tar.gz"] * 3 + ["/pets/data/images.tar.gz"]


def test_a_server_that_stays_busy_is_given_up(mirror: Mirror, tmp_path: Path):
    mirror.failures = [503] * 99
    with pytest.raises(DataError, match="the server answers 503 Service Unavailable"):
        oxford_archives.fetch(tmp_path)
    assert len(mirror.requests) == download.ATTEMPTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [403, 404])
def test_a_refusal_is_final(mirror: Mirror, tmp_path: Path, code: int):
    mirror.failures = [code]
    with pytest.raises(DataError, match=f"the server answers {code}"):
        oxford_archives.fetch(tmp_path)
    assert len(mirror.requests) == 1


def lose(mirror: Mirror, photo: str) -> None:
    """Pack the archive of images without a photo; the lists and the checksums stay."""
    annotations = mirror.files["annotations.tar.gz"]
    mirror.photos.pop(photo)
    mirror.pack()
    mirror.files["annotations.tar.gz"] = annotations


@pytest.mark.parametrize("cut_at", [[], [5000], [5000] * 50])
def test_a_wrong_archive_is_an_error_and_leaves_nothing(mirror: Mirror, tmp_path: Path, cut_at: list[int]):
    lose(mirror, "Bengal_1")
    mirror.cut_at = cut_at
    said = r"its md5 is \w{32}, not \w{32}, and it is not that archive packed anew: it lacks 1 of the 42 listed photos\. Check"
    with pytest.raises(DataError, match=said):
        oxford_archives.fetch(tmp_path)
    assert archives_in(tmp_path).keys() == {"annotations.tar.gz"}
    assert len(mirror.requests) < 30


def test_an_archive_that_rotted_on_disk_is_named(mirror: Mirror, tmp_path: Path):
    oxford_archives.fetch(tmp_path)
    (tmp_path / "images.tar.gz").write_bytes(b"rotten")
    with pytest.raises(
        DataError, match=r"images\.tar\.gz: its md5 is .*, not .*: .* is not a readable archive .*\. Delete it and run again"
    ):
        oxford_archives.fetch(tmp_path)


def test_archives_that_were_packed_anew_are_taken_for_their_content(mirror: Mirror, tmp_path: Path):
    official = preparation.prepare(CONFIG, tmp_path / "a")
    mirror.pack({"images/more.txt": b"of a mirror"})
    dataset = preparation.prepare(CONFIG, tmp_path / "b")
    (warning,) = validation.validate(dataset, CONFIG).warnings
    found = hashlib.md5(mirror.files["images.tar.gz"]).hexdigest()
    said = "1 archive or mirror is not the official one, but has as many photos, and was taken for it: images.tar.gz"
    assert warning == f"{said} (md5 {found})."
    assert dataset.sha256 == official.sha256
    one, other = splits.read_manifest(official), splits.read_manifest(dataset)
    assert one["photos_sha256"] == other["photos_sha256"]
    address = os.environ["TINYCATS_OXFORD_URL"]
    assert other["origin"]["images.tar.gz"] == {"md5": found, "from": f"{address}images.tar.gz"}


def test_other_photos_have_another_digest(mirror: Mirror, tmp_path: Path):
    official = preparation.prepare(CONFIG, tmp_path / "a")
    mirror.photos["Bengal_1"] = photo(999)
    mirror.pack()
    dataset = preparation.prepare(CONFIG, tmp_path / "b")
    assert splits.read_manifest(official)["photos_sha256"] != splits.read_manifest(dataset)["photos_sha256"]
    assert dataset.sha256 != official.sha256


def test_lists_of_other_photos_are_not_the_official_ones(mirror: Mirror, tmp_path: Path):
    mirror.lists["test"] += "pug_117 2 2 2\n"
    mirror.pack()
    with pytest.raises(DataError, match="its lists have 28 of 28 train and 15 of 14 test photos"):
        oxford_archives.fetch(tmp_path)


@pytest.mark.parametrize("first", ["down", "refuses", "another file"])
def test_the_next_address_is_tried_and_named(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str):
    address = os.environ["TINYCATS_OXFORD_URL"].rstrip("/")
    mirror.files["page"] = b"<html>moved</html>"
    bad = {"down": "http://127.0.0.1:1/pets", "refuses": f"{address}/gone/x", "another file": f"{address}/page?"}[first]
    monkeypatch.delenv("TINYCATS_OXFORD_URL")
    monkeypatch.setattr(oxford_archives, "ADDRESSES", (bad, address))
    mirror.refused = "/gone/"
    said: list[str] = []
    archives = oxford_archives.fetch(tmp_path, lambda _, text: said.append(text))
    assert [archive.url for archive in archives] == [f"{address}/{name}" for name in oxford_archives.ARCHIVES]
    assert any(text.startswith(f"cannot download {bad}/") for text in said)
    assert archives_in(tmp_path) == {name: mirror.files[name] for name in oxford_archives.ARCHIVES}
    assert oxford_archives.fetch(tmp_path) == archives  # and later runs know it


def test_no_address_gives_the_archives(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TINYCATS_OXFORD_URL")
    monkeypatch.setattr(oxford_archives, "ADDRESSES", ("http://127.0.0.1:1/a", "http://127.0.0.1:1/b"))
    with pytest.raises(
        DataError, match=r"cannot download http://127\.0\.0\.1:1/a/\S+: .*; http://127\.0\.0\.1:1/b/\S+: .*\. Check the network"
    ):
        oxford_archives.fetch(tmp_path)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "nonsense", "ftp-of-old://x"])
def test_no_network_is_one_clear_error(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("TINYCATS_OXFORD_URL", url)
    with pytest.raises(DataError) as error:
        preparation.prepare(CONFIG, tmp_path)
    assert str(error.value).startswith(f"cannot download {url}/annotations.tar.gz: ")
    assert "Check the network and run again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_clear_error(mirror: Mirror, tmp_path: Path):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*images\.tar\.gz\.part: File too large\. Free some space"):
            oxford_archives.fetch(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(mirror.requests) == 2
    oxford_archives.fetch(tmp_path)  # and with room, it goes on
    assert archives_in(tmp_path) == mirror.files


def test_a_download_larger_than_the_disk_is_not_begun(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage:
        free = 1_000_000

    mirror.files["images.tar.gz"] = bytes(2_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(DataError, match="2 MB are needed and 1 MB are free"):
        oxford_archives.fetch(tmp_path)


def test_an_unwritable_folder_is_one_clear_error(mirror: Mirror, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TinycatsError, match="cannot write to"):
        oxford_archives.fetch(tmp_path / "file" / "data")
    assert mirror.requests == []
