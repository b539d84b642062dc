"""A Hugging Face Hub and its Xet storage on the loopback, for tests and for `benchmarks.publish_faults`.

Real: the client libraries, the HTTP between them and the server, and the chunks and shards of Xet. Imitated: as much of the
Hub as publishing, tagging and downloading a release needs; git; and Xet without compression and deduplication.
"""

import base64
import hashlib
import io
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback_token"
LARGE = (".safetensors", ".onnx", ".png", ".wasm")
STORAGE = ("/v1/", "/v2/")  # addresses of the Xet storage, which is on the same port
XET = {  # of its client: no waiting before it tries again, and data that can be read back without its decoders
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms",
    "HF_XET_XORB_COMPRESSION_POLICY": "none",
    "HF_XET_TELEMETRY_ENABLED": "false",
}


class Hub:
    """The state of the Hub: what tests set and look at."""

    def __init__(self) -> None:
        self.url = ""
        self.account: dict[str, Any] = {
            "name": "someone",
            "orgs": [{"name": "cats", "roleInOrg": "write"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # repository: (sha, files), oldest first
        self.readonly: set[str] = set()  # repositories that the token may not write
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []  # what the creation of a repository was asked with
        self.failures: dict[str, list[int]] = {}  # part of a request line: the statuses to answer with, one after another
        self.faults: dict[int, str] = {}  # number of a request: "busy" (503), "dropped" before it took effect, or "lost" after
        self.silent: set[str] = set()  # parts of request lines that get no answer before the Hub closes
        self.tags: dict[str, dict[str, str]] = {}  # repository: name and commit
        self.messages: dict[str, tuple[str, str]] = {}  # commit: title and description
        self.storage_url = ""  # where Xet clients are sent; "" = here
        self.xorbs: dict[str, bytes] = {}
        self.closing = threading.Event()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        commits = self.commits.get(repo, [])
        sha = self.tags.get(repo, {}).get(revision, revision)
        found = [files for other, files in commits if sha in ("main", other)]
        return found[-1] if found else None

    def commit(self, repo: str, files: dict[str, bytes], title: str = "initial commit", description: str = "") -> str:
        commits = self.commits.setdefault(repo, [])
        sha = hashlib.sha1(repr((repo, len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((sha, files))
        self.messages[sha] = title, description
        return sha


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        hub.requests.append(line)
        fault = hub.faults.pop(len(hub.requests), None)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if any(part in line for part in hub.silent):
            hub.closing.wait()
            return None
        if fault == "dropped":
            return None
        if fault == "busy":
            return self.answer(503, {"error": "as the test asked"})
        for part, statuses in hub.failures.items():
            if part in line and statuses:
                return self.answer(statuses.pop(0), {"error": f"as the test asked {self.headers.get('Authorization', '')}"})
        if fault == "lost":
            self.wfile = io.BytesIO()
        if path.startswith(STORAGE):
            return self.storage(path, body)
        return self.route(path, body)

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path.startswith("/lfs/"):
            hub.blobs[path.removeprefix("/lfs/")] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "bad token"}, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self.answer(200, hub.account)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/api/models/"):
            return self.model_api(path.removeprefix("/api/models/").split("/"), body)
        for kind in (
            "datasets",
            "spaces",
        ):  # in `commits` the names of data sets begin with datasets/, those of Spaces with spaces/
            if path.startswith(f"/api/{kind}/"):
                owner, name, *rest = path.removeprefix(f"/api/{kind}/").split("/")
                return self.model_api([f"{kind}/{owner}", name, *rest], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        repo, _, rest = path.strip("/").partition("/resolve/")  # owner/name/resolve/<revision>/<file>
        revision, file = rest.split("/", 1)
        files = hub.files(repo, revision)
        if files is None or file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, files[file], ETag=f'"{_git_oid(files[file])}"', X_Repo_Commit=revision)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, request: dict[str, Any]) -> None:
        self.hub.created.append(request)
        kind = f"{request['type']}s/" if request.get("type") in ("dataset", "space") else ""
        repo = f"{kind}{request['organization'] or self.hub.account['name']}/{request['name']}"
        address = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub.commits:
            return self.answer(409, address)
        self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, address)

    def model_api(self, parts: list[str], body: bytes) -> None:
        hub, repo, action, revision = self.hub, "/".join(parts[:2]), (parts + [""])[2], (parts + ["", "main"])[3] or "main"
        if repo not in hub.commits:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = hub.files(repo, "main" if action == "auth-check" else revision)
        if files is None:
            return self.answer(404, {"error": "Invalid revision"}, X_Error_Code="RevisionNotFound")
        if repo in hub.readonly and action in ("auth-check", "preupload", "commit"):
            return self.answer(403, {"error": "no write access"})
        if action == "auth-check":
            return self.answer(200)
        if action in ("", "revision"):
            tagged = hub.tags.get(repo, {}).get(revision, revision)
            return self.answer(200, {"id": repo, "sha": hub.commits[repo][-1][0] if revision == "main" else tagged})
        if action == "tree":
            return self.answer(200, [_row(name, data) for name, data in sorted(files.items())])
        if action == "commits":
            return self.answer(200, [self.described(sha) for sha, _ in reversed(hub.commits[repo])])
        if action == "refs":
            tags = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in hub.tags.get(repo, {}).items()]
            return self.answer(200, {"branches": [], "converts": [], "tags": tags})
        if action == "tag":
            tags, tag = hub.tags.setdefault(repo, {}), json.loads(body)["tag"]
            return self.answer(409 if tag in tags else 200, {"name": tags.setdefault(tag, revision)})
        if action == "xet-write-token":
            return self.answer(200, {"casUrl": hub.storage_url or hub.url, "accessToken": "xet", "exp": int(time.time()) + 3600})
        if action == "preupload":
            asked = json.loads(body)["files"]
            return self.answer(200, {"files": [self.upload_mode(item["path"], files) for item in asked]})
        return self.accept(repo, dict(files), [json.loads(line) for line in body.splitlines()])

    def described(self, sha: str) -> dict[str, Any]:
        title, description = self.hub.messages[sha]
        return {"id": sha, "authors": [], "date": "2026-01-01T00:00:00.000Z", "title": title, "message": description}

    def storage(self, path: str, body: bytes) -> None:
        """Answer as Xet's storage, which knows no chunk yet and none of the newer ways to upload."""
        if path.startswith("/v1/xorbs/"):
            self.hub.xorbs[path.rsplit("/", 1)[1]] = body
            return self.answer(200, {"was_inserted": True})
        if path == "/v1/shards":
            for oid, data in _files_of_shard(body, self.hub.xorbs):
                self.hub.blobs[oid] = data
            return self.answer(200, {"result": 1})
        return self.answer(404, {"error": "not here"})

    def upload_mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        large, old = path.endswith(LARGE), files.get(path)
        oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def accept(self, repo: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for item in lines:
            kind, value = item["key"], item["value"]
            if kind == "header" and value.get("parentCommit") != self.hub.commits[repo][-1][0]:
                return self.answer(412, {"error": "A commit has happened since"})
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        header = next(item["value"] for item in lines if item["key"] == "header")
        sha = self.hub.commit(repo, files, header["summary"], header.get("description", ""))
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _row(name: str, data: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
    if name.endswith(LARGE):
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return row


def _files_of_shard(shard: bytes, xorbs: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the sha256 and the content of each file that a shard puts together from pieces of xorbs."""
    place = 48  # after the header
    while (head := shard[place : place + 48])[:32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", head, 32)
        data = b""
        for entry in range(place + 48, place + 48 * (count + 1), 48):
            first, last = struct.unpack_from("<II", shard, entry + 40)
            data += b"".join(_chunks(xorbs[_hash(shard[entry : entry + 32])])[first:last])
        place += 48 * (count + 1 + (count if flags >> 31 else 0))
        if flags >> 30 & 1:
            yield _hash(shard[place : place + 32]), data
            place += 48


def _chunks(xorb: bytes) -> list[bytes]:
    """Return the chunks of a xorb, each of which follows a header of eight bytes."""
    chunks, place = [], 0
    while place < len(xorb) and xorb[place] == 0:  # the version; what follows the chunks begins with a letter
        size, scheme = int.from_bytes(xorb[place + 1 : place + 4], "little"), xorb[place + 4]
        assert scheme == 0, "compressed"
        chunks.append(xorb[place + 8 : place + 8 + size])
        place += 8 + size
    return chunks


def _hash(raw: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


@contextmanager
def serve_hub(home: Path, xet: bool = False) -> Iterator[Hub]:
    """Serve a Hub and make the library use it, with a token of its own and nothing of the user's.

    Args:
        home: the library's folder.
        xet: upload with Xet instead of plain HTTP.
    """
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils._xet import abort_xet_session

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_XET_CACHE": str(home / "xet"), **XET}
    settings = {  # read when the library was imported, which may have been before
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": not xet,
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        for name, value in settings.items():
            stack.enter_context(patch.object(constants, name, value))
        close_session()
        abort_xet_session()
        try:
            yield hub
        finally:
            hub.closing.set()
            close_session()
            abort_xet_session()
            server.shutdown()
            thread.join()
            server.server_close()
