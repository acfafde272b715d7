"""Rewards over HTTP: the format of messages, a server that gets bad requests, a client with a bad server."""

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from helpers.forked import exit_code, forked
from helpers.tiny_rewards import reward_of, section_of
from torch import Tensor

from dag.errors import RunError
from dag.rewards import serve as serving
from dag.rewards.http import Http
from dag.rewards.pixels import to_bytes
from dag.rewards.serve import RewardServer
from dag.rewards.wire import decode_request, decode_response, encode_request

PROMPTS = ["a cat", "ein Bär", ""]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    """A function that starts a server (of a reward, or with a handler) in a thread and returns its address."""
    servers: list[HTTPServer] = []

    def run(server: HTTPServer) -> str:
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def reward_server(name: str, reward: Any) -> RewardServer:
    return RewardServer(("127.0.0.1", 0), name, reward)


def answering(*responses: tuple[int, bytes] | None) -> HTTPServer:
    """A server that gives these answers in order and then repeats the last one; None closes the connection."""
    queue = list(responses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            response = queue.pop(0) if len(queue) > 1 else queue[0]
            if response is None:
                return self.connection.close()
            self.send_response(response[0])
            self.end_headers()
            self.wfile.write(response[1])
            return None

        def log_message(self, *args: Any) -> None:
            pass

    return HTTPServer(("127.0.0.1", 0), Handler)


# -- the wire -----------------------------------------------------------------------------------------------------


def test_pictures_arrive_bit_for_bit(images: Tensor) -> None:
    decoded, prompts = decode_request(encode_request(images, PROMPTS), max_images=3, max_side=12)
    assert prompts == PROMPTS
    assert (to_bytes(decoded) == to_bytes(images)).all()
    assert torch.equal(decoded, torch.from_numpy(to_bytes(images)).permute(0, 3, 1, 2).float() / 255)


def png(side: int = 4) -> str:
    """The same text in every process: tests that run in several of them need equal parameters."""
    return json.loads(encode_request(torch.full((1, 3, side, side), 0.5), ["x"]))["images"][0]


MALFORMED = [
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "expected"),
    (b'{"images": [], "prompts": []}', "0 images; allowed are 1 to 2"),
    (b'{"images": "x", "prompts": []}', "expected"),
    (b'{"images": [3], "prompts": ["x"]}', "must be strings"),
    (b'{"images": ["x"], "prompts": []}', "1 images but 0 prompts"),
    (b'{"images": ["!!"], "prompts": ["x"]}', "image 0 is not a base64 PNG"),
    (b'{"images": ["R0lGODlhAQABAAAAACw="], "prompts": ["x"]}', "image 0 is not a base64 PNG"),
    (json.dumps({"images": [png(9)], "prompts": ["x"]}).encode(), "image 0 is 9x9; at most 8"),
    (json.dumps({"images": [png(4), png(5)], "prompts": ["x", "y"]}).encode(), "one size"),
    (json.dumps({"images": [png()[:40]], "prompts": ["x"]}).encode(), "image 0 is not a base64 PNG"),
    (json.dumps({"images": [png()] * 3, "prompts": ["x"] * 3}).encode(), "allowed are 1 to 2"),
]


@pytest.mark.parametrize(("body", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_a_malformed_request_is_explained(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_request(body, max_images=2, max_side=8)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"rewards": 3}', b'{"rewards": ["x", 1]}', b'{"rewards": [1]}', b'{"rewards": [[1, 2]]}'],
)
def test_a_malformed_answer_is_explained(body: bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        decode_response(body, 2)


# -- client and server --------------------------------------------------------------------------------------------


def test_a_served_reward_scores_as_at_home(images: Tensor, start: Callable[..., str]) -> None:
    home = reward_of("compressibility")
    url = start(reward_server("compressibility", home))
    remote = reward_of("http", url=url, max_batch=2)
    rounded = torch.from_numpy(to_bytes(images)).permute(0, 3, 1, 2) / 255
    assert torch.equal(remote(images, PROMPTS), home(rounded, PROMPTS))
    assert json.loads(_get(url))["name"] == "compressibility"


def _get(url: str) -> bytes:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/")
    return connection.getresponse().read()


def test_prompts_reach_the_reward(images: Tensor, start: Callable[..., str]) -> None:
    url = start(reward_server("length", lambda pictures, prompts: torch.tensor([float(len(p)) for p in prompts])))
    assert reward_of("http", url=url)(images, PROMPTS).tolist() == [5.0, 7.0, 0.0]


def test_a_reward_that_fails_on_the_server_is_named_and_not_asked_again(
    images: Tensor, start: Callable[..., str]
) -> None:
    calls = []

    def broken(pictures: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(prompts))
        return torch.full((len(prompts),), torch.nan)

    url = start(reward_server("mine", broken))
    with pytest.raises(RunError, match=r"refused: 500 reward mine returned nan for prompt 'a cat'"):
        reward_of("http", url=url)(images, PROMPTS)
    assert calls == [3]


@pytest.mark.parametrize(
    ("send", "status"),
    [
        ({"body": b"x", "headers": {"Content-Length": str(1 << 40)}}, 413),
        ({"body": b"x", "headers": {"Content-Length": "9" * 5000}}, 413),
        ({"body": None, "headers": {"Content-Length": "-1"}}, 411),
        ({"body": b"\x00" * 9}, 400),
    ],
)
def test_the_server_survives_what_is_no_request(start: Callable[..., str], send: dict[str, Any], status: int) -> None:
    server = reward_server("colourfulness", reward_of("colourfulness"))
    url = start(server)
    for _ in range(2):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("POST", "/", **send)
        answer = connection.getresponse()
        assert answer.status == status
        assert "error" in json.loads(answer.read())
    assert json.loads(_get(url))["name"] == "colourfulness"


def test_a_client_that_sends_nothing_is_dropped(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving._Handler, "timeout", 0.2)
    server = reward_server("colourfulness", reward_of("colourfulness"))
    url = start(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.getresponse()
    assert json.loads(_get(url))["name"] == "colourfulness"


GOOD = (200, b'{"rewards": [1, 2, 3]}')


def remote_of(url: str, retries: int = 3) -> tuple[Any, list[float]]:
    pauses: list[float] = []
    section = section_of("http", url=url, retries=retries, timeout=5.0)
    return Http(section, torch.device("cpu"), sleep=pauses.append), pauses


@pytest.mark.parametrize("bad", [None, (503, b"busy"), (502, b""), (429, b"{}")])
def test_an_outage_is_bridged(images: Tensor, start: Callable[..., str], bad: tuple[int, bytes] | None) -> None:
    remote, pauses = remote_of(start(answering(bad, bad, GOOD)))
    assert remote(images, PROMPTS).tolist() == [1.0, 2.0, 3.0]
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("bad", [(400, b'{"error": "no"}'), (500, b"oops"), (200, b"{}"), (200, b'{"rewards": [1]}')])
def test_a_refusal_ends_at_once(images: Tensor, start: Callable[..., str], bad: tuple[int, bytes]) -> None:
    remote, pauses = remote_of(start(answering(bad, GOOD)))
    with pytest.raises(RunError, match=r"refused|broke the protocol"):
        remote(images, PROMPTS)
    assert pauses == []


def test_a_server_that_stays_away_ends_the_run_in_one_line(images: Tensor) -> None:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    port = server.server_port
    server.server_close()
    remote, pauses = remote_of(f"http://127.0.0.1:{port}", retries=7)
    with pytest.raises(RunError, match=r"gave no answer in 8 attempts; the last: .*refused") as caught:
        remote(images, PROMPTS)
    assert len(str(caught.value).splitlines()) == 1
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_slow_server_is_not_waited_for_for_ever(images: Tensor, start: Callable[..., str]) -> None:
    def slow(pictures: Tensor, prompts: object) -> Tensor:
        time.sleep(1)
        return torch.zeros(len(pictures))

    url = start(reward_server("slow", slow))
    remote = reward_of("http", url=url, retries=0, timeout=0.1)
    with pytest.raises(RunError, match="timed out"):
        remote(images, PROMPTS)


def test_the_command_serves_and_says_where(images: Tensor) -> None:
    reader, writer = os.pipe()
    process = forked(serving.main, ["--name", "image_text", "--set", "scale=1", "--port", "0"], writer)
    os.close(writer)
    try:
        with open(reader) as said:
            url = said.readline().split(" at ")[1].strip()
            found = reward_of("http", url=url)(images, PROMPTS)
    finally:
        os.kill(process, signal.SIGTERM)
    assert exit_code(process) == -signal.SIGTERM
    rounded = torch.from_numpy(to_bytes(images)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(found, reward_of("image_text", scale=1)(rounded, PROMPTS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "aestetic", "--port", "0"], "did you mean 'aesthetic'"),
        (["--name", "hpsv2", "--port", "0", "--set", "versoin=v2.0"], "did you mean 'version'"),
        (["--name", "colourfulness", "--port", "70000"], "--port 70000"),
        (["--name", "colourfulness", "--port", "0", "--host", "256.0.0.1"], "--host 256.0.0.1"),
    ],
)
def test_mistakes_in_the_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
