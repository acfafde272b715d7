"""Serve a reward over HTTP, for a recipe's `reward: {name: http, url: ...}`.

    python -m dag.rewards.serve --name aesthetic --port 8500 [--set path=... ...] [--host 127.0.0.1] [--device cuda]

GET says what is served. `dag.rewards.wire` defines the protocol: a scorer that needs another environment can have a server of
its own, in a page of code. The server only answers this machine unless --host says otherwise, and has no authentication: do
not put it on an open network.

It uses http.server on purpose. uvicorn and starlette would save six lines, but they answer a bad Content-Length without JSON
and wait forever for unfinished headers; waitress limits neither the duration of a request nor the number of waiting ones.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from dag.errors import RunError, UsageError, exit_code
from dag.recipe.load import parse_reward
from dag.rewards import Reward, build_reward, checked
from dag.rewards.wire import decode_request

MAX_BODY = 256 << 20
MAX_IMAGES = 256
MAX_SIDE = 4096
# Of all images of a request together: that of 256 images of 512 x 512.
MAX_PIXELS = 1 << 26
# Requests that are answered at the same time; further ones are refused.
MAX_AT_ONCE = 16
# A Content-Length of more digits is refused without being parsed.
_DIGITS = 12
# Seconds a client may take to send its request.
PATIENCE = 60


class RewardServer(ThreadingHTTPServer):
    """A server that reads and decodes requests in threads, while the reward scores one request at a time."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], name: str, reward: Reward) -> None:
        super().__init__(address, _Handler)
        self.name, self.reward, self.lock = name, reward, threading.Lock()
        self.places = threading.BoundedSemaphore(MAX_AT_ONCE)

    def answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """(HTTP status, JSON) of a request's body."""
        try:
            images, prompts = decode_request(body, MAX_IMAGES, MAX_SIDE, MAX_PIXELS)
        except ValueError as error:
            return 400, {"error": str(error)}
        try:
            with self.lock:
                return 200, {"rewards": checked(self.name, self.reward, images, prompts).tolist()}
        except (RunError, UsageError) as error:
            return 500, {"error": str(error)}
        except (torch.OutOfMemoryError, MemoryError):
            return 503, {"error": "out of memory; send fewer images at a time"}


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = PATIENCE
    server_version = "dag"
    sys_version = ""

    def do_GET(self) -> None:
        self._reply(200, {"name": self.server.name, "max_images": MAX_IMAGES, "max_side": MAX_SIDE})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._reply(411, {"error": "the request has no Content-Length"})
        elif len(length) > _DIGITS or int(length) > MAX_BODY:
            self._reply(413, {"error": f"the body has {length[:_DIGITS]} bytes or more; at most {MAX_BODY}"})
        elif not self.server.places.acquire(blocking=False):
            self._reply(503, {"error": f"{MAX_AT_ONCE} requests are being answered already"})
        else:
            try:
                self._reply(*self.server.answer(self._body(int(length))))
            finally:
                self.server.places.release()

    def _body(self, length: int) -> bytes:
        """The request's body. Raises TimeoutError, which ends the connection, if the client sends it too slowly."""
        until, parts = time.monotonic() + self.timeout, []
        while length > 0 and (part := self.rfile.read1(min(length, 1 << 20))):
            if time.monotonic() > until:
                raise TimeoutError("the request took too long")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        # The body of a refused request was not read, so the connection cannot carry another one.
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a run sends hundreds of requests."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dag.rewards.serve", description="Serve a reward over HTTP.")
    parser.add_argument("--name", required=True, help="as in a recipe, e.g. aesthetic")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; only this machine by default")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="option of the reward")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one"
    )
    given = parser.parse_args(arguments)
    try:
        term = parse_reward(given.name, given.set)
        server = RewardServer((given.host, given.port), term.name, build_reward(term, torch.device(given.device)))
    except (RunError, UsageError) as error:
        return exit_code(error)
    except (OSError, OverflowError) as error:
        print(f"--host {given.host} --port {given.port}: {error}", file=sys.stderr)
        return 2
    print(f"{term.name} at http://{given.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
