"""A stand-in for the Hugging Face hub on this machine: the endpoints that pushing and pulling call."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class Hub:
    """Its state: files by repository, whether one is private, what was asked, and which sizes it lies about."""

    url: str = ""
    token: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


def _mode(path: str) -> str:
    """Weights are large files, whatever their size."""
    return "lfs" if path.endswith(".safetensors") else "regular"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, status: int, content: object = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _allowed(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self._answer(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid username or password.")
        return False

    def do_GET(self) -> None:
        if not self._allowed():
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]))
        else:  # OWNER/NAME/resolve/COMMIT/FILE
            self._file("/".join(parts[:2]), "/".join(parts[4:]))

    def do_HEAD(self) -> None:
        self.do_GET()

    def _info(self, name: str) -> None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": key, "size": self.hub.sizes.get(key, len(value))} for key, value in files.items()]
        self._answer(200, {"id": name, "sha": COMMIT, "private": self.hub.private[name], "siblings": siblings})

    def _file(self, name: str, file: str) -> None:
        content = self.hub.repositories[name][file]
        digest = hashlib.sha256(content).hexdigest()
        self._answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._allowed():
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.repositories[name] = {".gitattributes": b""}
            self.hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._answer(200, {"url": f"{self.hub.url}/{name}"})
        elif parts == ["api", "validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            asked = json.loads(body)
            files = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in asked["files"]]
            self._answer(200, {"files": files})
        elif parts[4] == "branch":
            self.hub.branches.append(parts[5])
            self._answer(201, {})
        else:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        """Large files go where the answer to their batch said; the address is the permission."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[self.path.rpartition("/")[2]] = content
        self._answer(200)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.hub.repositories[name][value["path"]]
        answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}"}
        self._answer(200, answer | {"hookOutput": ""})


@contextmanager
def serve_hub(token: str) -> Iterator[Hub]:
    """A running hub, which refuses whoever has another token."""
    hub = Hub(token=token)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
