"""A Hugging Face Hub on the loopback, as much of it as publishing and downloading a release needs."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_loopback_token"
LARGE = (".safetensors", ".onnx", ".png")


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

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        commits = self.commits.get(repo, [])
        found = [files for sha, files in commits if revision in ("main", sha)]
        return found[-1] if found else None

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.commits.setdefault(repo, [])
        sha = hashlib.sha1(repr((repo, len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((sha, files))
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
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, statuses in hub.failures.items():
            if part in line and statuses:
                return self.answer(statuses.pop(0), {"error": "as the test asked"})
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
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        owner, name, _, revision, file = path.strip("/").split("/", 4)  # owner/name/resolve/<revision>/<file>
        files = hub.files(f"{owner}/{name}", revision)
        if files is None or file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, files[file], ETag=f'"{_git_oid(files[file])}"', X_Repo_Commit=revision)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, request: dict[str, Any]) -> None:
        self.hub.created.append(request)
        repo = f"{request['organization'] or self.hub.account['name']}/{request['name']}"
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
            sha = hub.commits[repo][-1][0] if revision == "main" else revision
            return self.answer(200, {"id": repo, "sha": sha})
        if action == "tree":
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)} for name, data in sorted(files.items())
            ]
            return self.answer(200, rows)
        if action == "preupload":
            asked = json.loads(body)["files"]
            return self.answer(200, {"files": [self.upload_mode(item["path"], files) for item in asked]})
        return self.accept(repo, dict(files), [json.loads(line) for line in body.splitlines()])

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
        sha = self.hub.commit(repo, files)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def loopback_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Serve a Hub and make the library use it, with a token of its own and nothing of the user's."""
    from huggingface_hub import close_session, constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(home))
    # The library reads its environment when it is imported, which may have been before.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # plain HTTP uploads
    close_session()
    try:
        yield hub
    finally:
        close_session()
        server.shutdown()
        thread.join()
        server.server_close()
