"""A stand-in for the hub: keeps what is committed to it, and speaks as much of its language as a push needs."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their files."""

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Answers)
        self.token = token
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, content: object, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def known(self) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if not known:
            self.answer({"error": "Invalid username or password."}, 401)
        return known

    def do_GET(self) -> None:
        hub, parts = self.server, self.path.split("?")[0].split("/")  # /api/models/OWNER/NAME...
        name = "/".join(parts[3:5])
        if not self.known():
            return
        if name not in hub.files:
            self.answer({"error": "Repository not found"}, 404)
        elif "tree" in parts:
            files = hub.files[name].items()
            self.answer([{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files])
        else:
            siblings = [{"rfilename": path} for path in hub.files[name]]
            self.answer({"id": name, "sha": "0" * 40, "private": hub.private[name], "siblings": siblings})

    def do_POST(self) -> None:
        hub, given, parts = self.server, self.body(), self.path.split("?")[0].split("/")
        if not self.known():
            return
        if parts[2:4] == ["repos", "create"]:
            asked = json.loads(given)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            taken = name in hub.files
            hub.private.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
            hub.files.setdefault(name, {})
            self.answer({"url": f"{hub.address}/{name}"}, 409 if taken else 200)
        elif parts[2] == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "preupload" in parts:
            paths = [one["path"] for one in json.loads(given)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "commit" in parts:
            files = hub.files["/".join(parts[3:5])]
            for line in (json.loads(line) for line in given.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.address}/x/y/commit/{'1' * 40}"})
        else:
            self.answer({"error": self.path}, 404)


@contextmanager
def hub(token: str) -> Iterator[Hub]:
    """One that knows who brings `token`, until the block ends."""
    with Hub(token) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
