"""A server that answers like the Hugging Face hub, as far as a push needs it, and keeps what it was sent."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandInHub(ThreadingHTTPServer):
    """The hub on a free port of this machine.

    Attributes:
        status:  the answer to every request; 200 goes on as the hub does.
        created: what was asked of a new repository.
        tokens:  the authorisations of the requests that change something.
        files:   the content of each file of the last commit, by its path.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/someone/name", "id": "someone/name"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            self.files = {file["path"]: base64.b64decode(file["content"]) for file in sent}
            return {"commitUrl": f"{self.url}/someone/name/commit/abc", "commitOid": "abc", "success": True}
        return {"errors": [], "warnings": []}


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create" or "/commit/" in self.path:
            self.server.tokens.add(self.headers["Authorization"])
        is_good = self.server.status == 200
        answer = self.server.answer(self.path, body) if is_good else {"error": "refused"}
        data = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """A context in which the hub answers."""
    server = StandInHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
