"""Break each HTTP call of a publication, kill each step of a rollback and of a forced release, and see what is left.

python -m benchmarks.publish_faults

The Hub is on the loopback: `deployments/fake_hub.py` says what is real and what is imitated.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.common import command_line, positive, report

if TYPE_CHECKING:
    from deployments.fake_hub import Hub
    from tinycats_core.records import Release

KINDS = ("busy", "dropped", "lost")  # see deployments.fake_hub
TRIES = 4  # of one run: the task that publishes is repeated three times
NAME, OLD, NEW = "tinycats", "1" * 12, "2" * 12
MINE = {"notes.md": b"the owner's", "samples/favourite.png": b"the owner's, too", ".gitattributes": b"*.png filter=lfs\n"}
FILE_EVENTS = {"open", "os.rename", "os.symlink", "os.remove", "os.chmod", "os.mkdir"}  # before each of which a process is killed
COUNTS = ("cases", "mixed", "not_recovered", "double_commits", "foreign_lost")


@command_line
def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print its figures. Returns the exit status: 0 if nothing was mixed, lost or doubled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish_faults", description=__doc__)
    parser.add_argument("--pairs", type=positive, default=100, help="random pairs of faults for each upload path (default: 100)")
    parser.add_argument("--kills", type=positive, default=25, help="kills of a rollback, and of a forced release (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs")
    parser.add_argument("--quick", action="store_true", help="every twelfth call, two pairs and twice twenty kills")
    given = parser.parse_args(arguments)
    pairs, kills, step = (2, 20, 12) if given.quick else (given.pairs, given.kills, 1)
    started, rng = time.perf_counter(), random.Random(given.seed)
    figures: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    with tempfile.TemporaryDirectory(prefix="tinycats-") as scratch, patch("time.sleep"):  # which the library does when it waits
        figures |= kill_everywhere(Path(scratch) / "kills", kills)  # first: a process with threads is not to be forked
        for path in ("plain", "xet"):
            for name, value in break_everywhere(Path(scratch) / path, path == "xet", step, pairs, rng).items():
                figures[name] = figures.get(name, 0) + value
    figures["seconds"] = round(time.perf_counter() - started, 1)
    report("publish_faults", figures, given)
    return 0 if not any(figures[name] for name in (*COUNTS[1:], "kills_mixed", "kills_not_recovered")) else 1


def break_everywhere(scratch: Path, xet: bool, step: int, pairs: int, rng: random.Random) -> dict[str, int]:
    """Publish once for each fault, in a repository of its own, and count what went wrong."""
    from huggingface_hub.utils import disable_progress_bars, logging

    from deployments.fake_hub import serve_hub

    disable_progress_bars()
    logging.set_verbosity_error()
    with serve_hub(scratch / "home", xet) as hub:
        cases = count()
        calls, _ = publish(hub, scratch, next(cases), {})
        single = [{place: kind} for place, kind in product(range(1, calls + 1, step), KINDS)]
        double = [dict(zip(rng.sample(range(1, calls + 6), 2), rng.choices(KINDS, k=2), strict=True)) for _ in range(pairs)]
        found = [publish(hub, scratch, next(cases), faults)[1] for faults in [*single, *double]]
    sums = {name: sum(case[name] for case in found) for name in COUNTS[1:]}
    return {"cases": len(found), **sums, f"calls_{scratch.name}": calls}


def publish(hub: "Hub", scratch: Path, case: int, faults: dict[int, str]) -> tuple[int, dict[str, int]]:
    """Publish a release over another one, as a flow does, with faults at some of the calls.

    Returns:
        The number of calls, and what went wrong.
    """
    from tinycats_core.config import PublishConfig
    from tinycats_core.errors import RegistryError
    from tinycats_core.release import hub as releases

    repo, folder = f"someone/case-{case}", scratch / str(case)
    old, new = (make_release(folder, version, case) for version in (OLD, NEW))
    hub.commit(repo, {**contents(old), **MINE}, f"{NAME} {OLD}")
    config, wrong = PublishConfig(name=NAME, to="hub", repo_id=repo), dict.fromkeys(COUNTS[1:], 0)
    before = len(hub.requests)
    hub.faults = {before + place: kind for place, kind in faults.items()}
    whole = [{**contents(release), **MINE} for release in (old, new)]
    for _ in range(TRIES):
        try:
            found = releases.find_published(config, folder / "downloads")
            if found is None or found.version != NEW:
                releases.publish_to_hub(new, config, found and found.version)
            break
        except RegistryError as error:
            wrong["mixed"] |= hub.files(repo) not in whole
            if not releases.is_transient(error):
                break
    hub.faults = {}
    files = hub.files(repo) or {}
    commits = [sha for sha, _ in hub.commits[repo]]
    wrong["mixed"] |= files not in whole
    wrong["not_recovered"] = int(files != whole[1] or hub.tags.get(repo) != {OLD: commits[0], NEW: commits[-1]})
    wrong["double_commits"] = int(len(commits) > 2)
    wrong["foreign_lost"] = int(any(files.get(file) != content for file, content in MINE.items()))
    return len(hub.requests) - before, {name: int(value) for name, value in wrong.items()}


def kill_everywhere(scratch: Path, kills: int) -> dict[str, int]:
    """Kill a rollback and the publication of a forced release before each of their file operations, and run them again."""
    from tinycats_core.release import promotion, registry

    figures = {"kills": 0, "kills_mixed": 0, "kills_not_recovered": 0}
    verbs: dict[str, Callable[[Path], Any]] = {
        "rollback": lambda folder: registry.rollback(folder, NAME, OLD, "it was better"),
        "forced": lambda folder: promotion.promote(folder / NAME / ("3" * 12)),
    }
    for verb, act in verbs.items():
        killed, place = 0, 0
        while killed < kills:
            place += 1
            folder = registry_of_two(scratch / verb / f"{killed}-{place}")
            died, said = die_at(place, folder, lambda folder=folder, act=act: act(folder))
            if not died:  # there are no more operations: begin again
                assert said == "done", said
                place = 0
                continue
            killed += 1
            figures["kills_mixed"] += state(folder) not in ((NEW, []), after(verb))
            if state(folder)[0] == NEW:
                act(folder)
            figures["kills_not_recovered"] += state(folder) != after(verb)
        figures["kills"] += killed
    return figures


def die_at(place: int, folder: Path, act: Callable[[], Any]) -> tuple[bool, str]:
    """Run something in a child process that is killed before a file operation. Returns whether it was, and what it said."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        operations = count(1)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)) and next(operations) == place:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            act()
            os.write(writer, b"done")
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return os.WIFSIGNALED(status), pipe.read().decode()


def state(folder: Path) -> tuple[str | None, list[str]]:
    """Return the version that is published, and the history after the first two; every file of it has been verified."""
    from tinycats_core.config import PublishConfig
    from tinycats_core.release import registry

    found = registry.find_published(PublishConfig(name=NAME, folder=folder))
    entries = registry.read_history(folder, NAME)
    assert [entry.version for entry in entries[:2]] == [OLD, NEW]
    return found.version if found else None, [f"{entry.how} {entry.version}: {entry.why}" for entry in entries[2:]]


def after(verb: str) -> tuple[str, list[str]]:
    """Return the state after a verb."""
    version, why = (OLD, "it was better") if verb == "rollback" else ("3" * 12, "they wait")
    return version, [f"{verb} {version}: {why}"]


def registry_of_two(folder: Path) -> Path:
    """Return a registry with two published versions and a forced one that is not published."""
    from tinycats_core.release import registry

    releases = [make_release(registry.open_registry(folder) / NAME, version) for version in (OLD, NEW)]
    for release, before in zip(releases, (None, OLD), strict=True):
        registry.publish_to_folder(release, before)
    make_release(folder / NAME, "3" * 12, decision={"promoted": False, "terms": [], "forced": "they wait", "baseline": NEW})
    return folder


def make_release(folder: Path, version: str, case: int = 0, decision: dict[str, Any] | None = None) -> "Release":
    """Return a small sealed release: files that the Hub keeps itself, and large ones, some of them of this version alone."""
    from tinycats_core.release import manifest

    place = folder / version
    (place / "samples").mkdir(parents=True)
    (place / "README.md").write_text(f"---\nlicense: mit\n---\n{version}")
    (place / "model.safetensors").write_text(f"weights {version} {case}\n" * 20)
    (place / "samples" / "grid.png").write_text(f"the same in each version {case}")
    (place / "samples" / f"{version}.png").write_text(f"only in {version} {case}")
    if decision:
        (place / "decision.json").write_text(json.dumps(decision))
    manifest.seal(place, NAME, version, "key", {})
    return manifest.read_release(place)


def contents(release: "Release") -> dict[str, bytes]:
    """Return the files of a release."""
    folder = release.folder
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())
