"""A stand-in for the hub on loopback: what `snapshot_download` asks for.

`serve({"models/Qwen/Qwen2.5-0.5B-Instruct": folder, "datasets/...": folder})` serves each
folder's files as that repository and counts the bytes sent per file. Point the client
at it with `HF_ENDPOINT`. API: https://huggingface.co/docs/hub/api
"""

import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version, cut = "HTTP/1.1", False

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, content, status: int = 200) -> None:
        self.answer(json.dumps(content).encode(), status, Content_Type="application/json")

    def files(self, repo: str) -> list[dict]:
        folder = self.server.repos[repo]
        return [
            {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size,
             "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
            for p in sorted(folder.rglob("*")) if p.is_file()
        ]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(unquote(self.path))
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.fail_first and "/resolve/" in self.path and (
                self.command == "GET" and self.path not in self.server.failed):
            self.server.failed.add(self.path)
            if not self.path.endswith(".safetensors"):
                return self.answer(b"busy", 429)
            self.cut = True
        for repo in self.server.repos:
            if url.path.startswith(f"/api/{repo}"):
                return self.api(repo, url.path.removeprefix(f"/api/{repo}").strip("/"))
            place = "/" + repo.removeprefix("models/") + "/resolve/"
            if url.path.startswith(place):
                return self.resolve(repo, url.path.removeprefix(place).partition("/")[2])
        self.send_json({"error": "Repository not found"}, 404)

    def api(self, repo: str, rest: str) -> None:
        if rest.startswith("tree/"):
            return self.send_json(self.files(repo))
        if not rest or rest.startswith("revision/"):
            name = repo.partition("/")[2]
            return self.send_json({
                "id": name, "modelId": name, "sha": COMMIT, "private": False,
                "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": f["path"]} for f in self.files(repo)]})
        self.send_json({"error": f"no such call: {rest}"}, 404)

    def resolve(self, repo: str, path: str) -> None:
        file = self.server.repos[repo] / path
        if not file.is_file():
            return self.answer(b"Entry not found", 404, X_Error_Code="EntryNotFound",
                               X_Repo_Commit=COMMIT)
        content, status = file.read_bytes(), 200
        headers = dict(ETag=f'"{hashlib.sha256(content).hexdigest()}"',
                       X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {begin}-{end}/{len(content)}"
            content, status = content[begin : end + 1], 206
        if self.command == "GET":
            self.server.sent[f"{repo}/{path}"] += len(content) // (2 if self.cut else 1)
        if self.cut:  # Half of it, and the line goes dead.
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.answer(content, status, **headers)

    def log_message(self, *unused) -> None:
        pass


@contextmanager
def serve(repos: dict[str, Path]):
    """Yield a server with `url`, `sent` (bytes per file) and `asked` (list of calls).

    With `fail_first` set, the first request of a file, of those in `failed`, is answered
    with 429, of weights with their first half.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.sent, server.asked = repos, Counter(), []
    server.fail_first, server.failed = False, set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
