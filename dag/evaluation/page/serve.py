"""Serves the page of a run to this machine's browser while the run goes on."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dag.errors import RunError, UsageError
from dag.evaluation.page.document import document, news
from dag.evaluation.page.pictures import read_sheets
from dag.run.folder import RunFolder

_ADDRESS = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Answers on 127.0.0.1 alone: `/`, `/state.json` and `/pictures/EPOCH.jpg`.

    Args:
        port: 0 takes any that is free.

    Raises:
        UsageError: the port is taken, or no port.
    """

    daemon_threads = True

    def __init__(self, run: RunFolder, port: int) -> None:
        self.run = run
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except OverflowError:
            raise UsageError(f"--serve {port}: a port is a number from 0 to 65535") from None
        except OSError as error:
            raise UsageError(
                f"--serve {port}: the port cannot be used ({error.strerror}); choose another: --serve {port + 1}"
            ) from None

    @property
    def address(self) -> str:
        return f"http://{_ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no error worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        # A page of another site could reach this server by a name that it lets point here.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (_ADDRESS, "localhost"):
            self._answer(403, "text/plain", b"this page is for this machine alone\n")
            return
        path = self.path.partition("?")[0]
        try:
            self._route(path)
        except (RunError, OSError) as error:
            self._answer(503, "text/plain; charset=utf-8", f"{error}\n".encode())

    def _route(self, path: str) -> None:
        run = self.server.run
        if path == "/":
            self._answer(200, "text/html; charset=utf-8", document(run, is_live=True).encode())
        elif path == "/state.json":
            self._answer(200, "application/json", json.dumps(news(run), allow_nan=False).encode())
        else:
            sheets = {f"/pictures/{sheet.epoch}.jpg": sheet.jpeg for sheet in read_sheets(run)[0]}
            if path in sheets:
                self._answer(200, "image/jpeg", sheets[path])
            else:
                self._answer(404, "text/plain", b"not here\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=3600" if kind == "image/jpeg" else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed for a request: there is one every two seconds."""


def serve(run: RunFolder, port: int) -> None:
    """Serve the page until Ctrl-C. Raises UsageError if the port cannot be used."""
    with PageServer(run, port) as server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
