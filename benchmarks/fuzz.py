"""Change a release at random places, seal it again, and see what reads it: nothing may crash, hang, or read outside of it.

python -m benchmarks.fuzz
"""

import argparse
import json
import logging
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common import TINY, command_line, positive, report

SECONDS = 5.0  # for one mutation; more is a hang
PATIENCE = 60.0  # after which a process that hangs is killed
TEXT = (".json", ".jsonl", ".csv", ".md", ".py", "LICENSE")
WORDS: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**12, 2**63, 1e308, -0.5, "", "0", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a\n\x1b[31mb"),
    *([], {}, [[]], ["a"] * 1_000, {"a": {"b": None}}, "x" * 100_000, "0" * 64, "NaN", "hub:evil/release", "ab2", "cuda"),
)
RAW = ("NaN", "Infinity", "-1e999", '"\\ud800"', "1" * 5_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500)
MARK = "@@raw@@"  # where a text that is no proper JSON value is put


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 where nothing crashed, hung or escaped."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--mutations", type=positive, default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--quick", action="store_true", help="300 mutations")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # for the process that reads: the folder with the release
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        answer(given.work, given.seed, given.first)
        return 0
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch:
        make_release(Path(scratch))
        figures = watch(Path(scratch), given.seed, 300 if given.quick else given.mutations)
    report("fuzz", figures, given)
    return 1 if figures["crashed"] or figures["hung"] or figures["escaped"] else 0


def make_release(scratch: Path) -> None:
    """Make a small release with each kind of file, in `scratch/release`. It needs no Prefect server."""
    from tinycats_core.config import ClassifierConfig
    from tinycats_core.data import preparation
    from tinycats_core.device import pick_device
    from tinycats_core.evaluation import classifier, fidelity, gate, samples, sweep
    from tinycats_core.generator import sampling
    from tinycats_core.presets import resolve
    from tinycats_core.records import ReleaseParts
    from tinycats_core.release import bundle, export, graph_check, inference, precision
    from tinycats_core.training.start import train

    small = {**TINY, "train": {**TINY["train"], "steps": 60, "checkpoint_every": 60, "sample_every": 60, "ema_decays": [0.9]}}
    config = resolve("smoke", {**small, "publish": {"name": "fuzz", "page": "none"}, "evaluate": {"samples": 52, "kid_subsets": 5}})
    dataset = preparation.prepare(config.data, scratch / "data")
    config = config.for_classes(len(dataset.classes))
    settings = ClassifierConfig(backbone="mobilenet_v3_small", epochs=1)  # a small file: each mutation is hashed
    judge = classifier.train_classifier(dataset, settings, scratch / "classifier", "cpu")
    trained = train(dataset, config.model, config.train, scratch / "run", "cpu")
    evaluations, device = scratch / "evaluations", pick_device("cpu")
    choice = sweep.choose(trained, dataset, config.sample, config.evaluate, judge, evaluations, "cpu")
    drawn = samples.draw_samples(choice.weights, dataset, choice.sample, 52, scratch / "drawn.safetensors", "cpu")
    measured = fidelity.evaluate(drawn, dataset, config.evaluate, judge, evaluations, "cpu")
    fp32 = export.export_denoiser(choice.weights, config.export, scratch / "onnx")
    int8 = export.quantize(fp32, scratch / "onnx")
    models = tuple(export.check(choice.weights, model, config.export, scratch / "onnx") for model in (fp32, int8))
    graphs = tuple(graph_check.export_graph(model, choice.sample, config.export, scratch / "onnx") for model in models)
    speed = inference.benchmark(choice.weights, graphs, choice.sample, scratch / "inference", "cpu")
    forms = precision.choose(
        graphs, speed, dataset, choice.sample, config.evaluate, config.export, judge, scratch / "forms", evaluations, "cpu"
    )
    other = samples.draw_samples(int8, dataset, choice.sample, 52, scratch / "int8.safetensors", "cpu")
    picture = scratch / "ema_and_raw.png"
    parts = ReleaseParts(
        config=config,
        dataset=dataset,
        choice=choice,
        samples=drawn,
        report=measured,
        decision=gate.decide(measured, None, None, config.evaluate, scratch / "decision"),
        models=models,
        graphs=graphs,
        classifier=judge,
        classifier_onnx=export.export_classifier(judge, dataset, config.export, scratch / "onnx"),
        baseline=None,
        onnx_reports=(fidelity.evaluate(other, dataset, config.evaluate, judge, evaluations, "cpu"),),
        precision=forms,
        inference=speed,
        ema_and_raw=sampling.draw_ema_and_raw(choice.weights, trained.raw, choice.sample, picture, device),
    )
    shutil.copytree(bundle.build(scratch / "registry", parts).folder, scratch / "release")


def watch(scratch: Path, seed: int, mutations: int) -> dict[str, Any]:
    """Let a process read one mutation after another, start another one if it dies or hangs, and count."""
    counts, by_file, bad = Counter({"crashed": 0, "hung": 0, "escaped": 0, "refused": 0}), Counter(), []
    started, done = time.perf_counter(), 0
    while done < mutations:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--work", str(scratch), "--seed", str(seed), "--first", str(done)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, cwd=Path(__file__).parents[1]) as reader:
            for row in _rows(reader):
                if row is None:
                    row = {"case": done, "file": "?", "what": "the process died or hung", "crashed": "?", "seconds": PATIENCE}
                done = row["case"] + 1
                by_file[row["file"]] += 1
                found = {"crashed": bool(row.get("crashed")), "hung": row["seconds"] > SECONDS, "escaped": bool(row.get("escaped"))}
                counts.update({name: int(value) for name, value in found.items()})
                counts["refused"] += bool(row.get("refused"))
                if any(found.values()):
                    bad.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
                if done >= mutations:
                    break
            reader.kill()
    seconds = round(time.perf_counter() - started, 1)
    return {"mutations": mutations, **counts, "files": dict(sorted(by_file.items())), "bad": bad[:20], "seconds": seconds}


def _rows(reader: "subprocess.Popen[bytes]") -> Iterator[dict[str, Any] | None]:
    """Return what a reading process says of each mutation; None as the last one if it dies or hangs."""
    assert reader.stdout
    rest = b""
    while True:
        if not select.select([reader.stdout], [], [], PATIENCE)[0] or not (chunk := os.read(reader.stdout.fileno(), 65536)):
            yield None
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (json.loads(line) for line in lines)


def answer(scratch: Path, seed: int, first: int) -> None:
    """Be the process that reads: print one JSON object a mutation, from the number `first` on."""
    logging.disable(logging.CRITICAL)
    place, opened = scratch / "mutated", []
    read(scratch / "release")  # what is imported and cached only once is opened now

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            opened.append(os.fsdecode(arguments[0]))

    sys.addaudithook(note)
    folders = (place, sys.prefix, sys.base_prefix, Path(__file__).parents[1] / "tinycats_core")
    inside = ("/proc/", "/sys/", "/dev/null", *(str(Path(folder).resolve()) for folder in folders))  # an environment may be a link
    case = first
    while True:
        rng = random.Random(f"{seed}-{case}")
        file, what = mutate(scratch / "release", place, rng)
        opened.clear()
        started = time.perf_counter()
        row = {"case": case, "file": file, "what": what, **read(place)}
        row["seconds"] = round(time.perf_counter() - started, 3)
        row["escaped"] = [name for name in opened if not os.path.realpath(name).startswith(inside)]
        print(json.dumps(row), flush=True)
        case += 1


def read(folder: Path) -> dict[str, Any]:
    """Read a release in every way in which a stranger's is read. Returns what refused it, or what crashed."""
    from tinycats_core.errors import TinycatsError
    from tinycats_core.evaluation.classifier import load_classifier
    from tinycats_core.generator.onnx_file import onnx_velocity
    from tinycats_core.generator.weights import load_generator
    from tinycats_core.presets import resolve
    from tinycats_core.records import Release
    from tinycats_core.release import history, lineage, manifest, shipped

    refused, crashed = [], []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except TinycatsError as error:
            refused.append(str(error)[:300])
            if not str(error).isprintable():
                crashed.append(f"prints {str(error)[:100]!r}")
        except Exception as error:
            crashed.append(f"{type(error).__name__}: {error}"[:300])

    result = attempt(lambda: lineage.inspect(folder))
    refused += result["wrong"] if result else []
    release = attempt(lambda: manifest.read_release(folder))
    if not isinstance(release, Release):
        return {"refused": refused[:1], "crashed": crashed}
    published = release.model_copy(update={"location": "https://hub.example/owner/name"})
    attempt(lambda: shipped.config(release).sample.single())
    attempt(lambda: shipped.locate_data(published, shipped.config(published)))
    attempt(lambda: shipped.sample(release, resolve("smoke").sample))
    attempt(lambda: history.origin(folder))
    attempt(lambda: load_generator(shipped.generator(release).path))
    if found := attempt(lambda: shipped.classifier(release)):
        attempt(lambda: load_classifier(found.path))
    if model := attempt(lambda: shipped.onnx(release)):
        attempt(lambda: onnx_velocity(model.path))
    attempt(lambda: shipped.onnx_report(release))
    return {"refused": refused[:1], "crashed": crashed}


def mutate(release: Path, place: Path, rng: random.Random) -> tuple[str, str]:
    """Put a changed copy of a release into `place`, sealed again. Returns the file and what was done to it."""
    from tinycats_core.files import parse_json

    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(release, place, copy_function=os.link)
    files = sorted(path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file())
    read_back = [name for name in files if name.endswith((".json", ".safetensors", ".onnx"))]
    file = rng.choice(read_back if rng.random() < 0.8 else files)
    content = (release / file).read_bytes()
    if file == "release.json":
        changed, what = change_json(content, rng)
        _replace(place / file, changed)
        try:
            _seal(place, parse_json(changed))
        except (ValueError, AttributeError):
            what += ", not sealed"
        return file, what
    if rng.random() < 0.05:
        what = change_kind(place, file, rng)
    elif file.endswith(".json") and rng.random() < 0.9:
        changed, what = change_json(content, rng)
        _replace(place / file, changed)
    elif file.endswith(".safetensors") and rng.random() < 0.6:
        what = change_header(release / file, place / file, rng)
    elif file.endswith(".onnx") and rng.random() < 0.6:
        what = change_onnx(release / file, place / file, rng)
    else:
        changed, what = change_bytes(content, rng)
        _replace(place / file, changed)
    manifest = parse_json((release / "release.json").read_bytes())
    _seal_file(place, manifest, file)
    return file, what


def change_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Change one value of a JSON file, or take it out, or add another."""
    value = json.loads(content)
    places = list(_places(value))
    if rng.random() < 0.02 or not places:
        return rng.choice([b"", b"[]", b"null", b"{}", b"7", b"\xff\xfe", b"[" * 100_000]), "another whole"
    parent, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del parent[key]
            return json.dumps(value, indent=2).encode(), f"without {str(key)[:40]!r}"
        case 1 if isinstance(parent, dict):
            name = rng.choice(["", "../x", "/etc/passwd", "a\n\x1b[2Jb", "x" * 10_000, "sample", "format", "files"])
            parent[name] = parent[key]
            return json.dumps(value, indent=2).encode(), f"with {name[:40]!r}"
        case 2:
            parent[key], raw = MARK, rng.choice(RAW)
            return json.dumps(value, indent=2).replace(f'"{MARK}"', raw).encode(), f"{str(key)[:40]!r} is {raw[:20]}"
        case _:
            parent[key] = rng.choice(WORDS)
            return json.dumps(value, indent=2).encode(), f"{str(key)[:40]!r} is {str(parent[key])[:40]!r}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Return every place in a JSON value: what holds it, and its key."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(item)


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Flip bits, cut, double or overwrite a part."""
    data, place = bytearray(content), rng.randrange(len(content) or 1)
    near = rng.randrange(min(len(content), 2_000) or 1)  # headers are small but delicate
    match rng.randrange(5):
        case 0:
            return bytes(data[:place]), "cut"
        case 1:
            return bytes(data[:near] + data[near + rng.randrange(1, 100) :]), "a part taken out"
        case 2:
            return bytes(data[:near] + rng.randbytes(rng.randrange(1, 100)) + data[near:]), "a part put in"
        case 3:
            data[:8] = rng.randrange(2**64).to_bytes(8, "little")
            return bytes(data), "another length"
        case _:
            for _ in range(rng.choice([1, 1, 8, 64])):
                if data:
                    data[rng.choice([place, near, rng.randrange(len(data))])] ^= 1 << rng.randrange(8)
            return bytes(data), "bits flipped"


def change_header(source: Path, path: Path, rng: random.Random) -> str:
    """Change the header of a weights file, with the digest inside of it made anew."""
    from safetensors.torch import load_file

    from tinycats_core.tensors import read_header, write_safetensors

    kind = "generator" if source.name.startswith("model") else "classifier"
    tensors, header = load_file(source), read_header(source, kind)
    changed, what = change_json(json.dumps({key: value for key, value in header.items() if key != "digest"}).encode(), rng)
    path.unlink()
    try:
        write_safetensors(path, tensors, json.loads(changed))
    except (ValueError, TypeError, AttributeError, RecursionError):
        path.write_bytes(b"")
        what += ", not written"
    return f"header {what}"


def change_onnx(source: Path, path: Path, rng: random.Random) -> str:
    """Change the metadata, a shape or a node of an ONNX file, or let it read its weights from elsewhere."""
    import onnx

    model = onnx.load(source)
    weights, node = rng.choice(model.graph.initializer), rng.choice(model.graph.node)
    match rng.randrange(5):
        case 0:
            weights.data_location, what = onnx.TensorProto.EXTERNAL, "weights from elsewhere"
            weights.external_data.add(key="location", value=rng.choice(["../../secret", "/etc/passwd", "README.md", "/dev/zero"]))
        case 1:
            rng.choice(model.metadata_props).value = rng.choice(["", "/etc/passwd", "x" * 10_000, "a\n\x1b[2J"])
            what = "metadata"
        case 2:
            weights.dims[:], what = [rng.choice([0, -1, 2**40])] * (len(weights.dims) + 1), "dims"
        case 3:
            node.op_type, what = rng.choice(["Loop", "If", "MatMul", "Evil", ""]), "op"
        case _:
            del node.input[:]
            what = "inputs"
    _replace(path, model.SerializeToString())
    return what


def change_kind(place: Path, file: str, rng: random.Random) -> str:
    """Put something else than a regular file in the place of a file, or beside it."""
    path = place / file
    kind = rng.choice(["link out", "link to a device", "pipe", "folder", "sparse", "odd name", "gone", "link loop"])
    if kind != "odd name":
        path.unlink()
    match kind:
        case "link out":
            path.symlink_to("/etc/passwd")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "link loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "sparse":
            with path.open("wb") as sparse:
                sparse.truncate(rng.choice([10 * 2**30, 2**40]))
        case "odd name":
            (place / "a\n\x1b[2Jb").write_text("x")
    return kind


def _replace(path: Path, content: bytes) -> None:
    path.unlink()  # it is a link to the release's own file
    path.write_bytes(content)


def _seal_file(place: Path, manifest: dict[str, Any], file: str) -> None:
    """Seal a mutated release as its maker would: whatever is there is listed."""
    from tinycats_core.files import sha256_of

    path = place / file
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 2**30:
        size = 10 * 2**30 if path.is_file() and not path.is_symlink() else 4
        manifest["files"][file] = {"sha256": "0" * 64, "bytes": size}
    else:
        manifest["files"][file] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    _seal(place, manifest)


def _seal(place: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with its lineage and its digest made anew, as far as it has them."""
    from tinycats_core.release import manifest as sealing

    (place / "release.json").unlink()
    with suppress(KeyError, TypeError, AttributeError):  # too odd to have one
        if "lineage" in manifest:
            manifest["lineage"] = sealing.lineage(manifest)
    sealing.write_sealed(place, manifest)


if __name__ == "__main__":
    sys.exit(main())
