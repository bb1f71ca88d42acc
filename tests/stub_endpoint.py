"""A server that speaks OpenAI's chat completions over real HTTP, and misbehaves where a test tells it to."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = re.findall(
    r"\w+",
    "amber basil cedar delta ember fjord grove haven ivory jolly kayak lemon maple noble ocean pearl quartz river "
    "solar tulip umbra velvet willow xenon yarrow zephyr anchor beacon candle dragon engine falcon garden hammer",
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the server answers: a status, headers and a body; after a delay, or not at all where
    `hang_up`, or a byte each tenth of a second where it `drips`."""

    status: int = 200
    body: object = None
    drips: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_seconds: float = 0.0
    hang_up: bool = False


@dataclass(frozen=True, kw_only=True)
class Received:
    """A request as it came: its JSON, its headers, and when."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float


@dataclass(kw_only=True)
class Stub:
    """The server of a test. `reply(number, body)` decides what request `number`, from 0, gets."""

    reply: Callable[[int, dict[str, Any]], Reply]
    url: str = ""
    received: list[Received] = field(default_factory=list)
    most_at_once: int = 0


def make_pairs(body: Mapping[str, Any], count: int = 4) -> list[dict[str, str]]:
    """Pairs that are unlike those of every other request, the same for the same request."""
    rng = random.Random(json.dumps(body, sort_keys=True))
    return [
        {
            "question": f"What about {' '.join(rng.sample(WORDS, 6))}?",
            "answer": f"Ah, my friend: {' '.join(rng.sample(WORDS, 20))}.",
        }
        for _ in range(count)
    ]


def complete(content: str | None, *, finish_reason: str = "stop", usage: object = None, **message: object) -> Reply:
    """A chat completion with this content."""
    usage = {"prompt_tokens": 100, "completion_tokens": 50} if usage is None else usage
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return Reply(body={"object": "chat.completion", "choices": [choice], "usage": usage})


def answer_well(number: int, body: dict[str, Any]) -> Reply:
    """Four new pairs."""
    return complete(json.dumps({"pairs": make_pairs(body)}))


def fail(status: int, message: str = "try later", code: object = None, **headers: str) -> Reply:
    """An error of the API; underscores in a header's name become hyphens."""
    error = {"message": message, "type": "error", "code": code}
    return Reply(
        status=status, body={"error": error}, headers={key.replace("_", "-"): value for key, value in headers.items()}
    )


@contextmanager
def run_stub(reply: Callable[[int, dict[str, Any]], Reply] = answer_well) -> Iterator[Stub]:
    """The server, on a free port of this machine."""
    stub = Stub(reply=reply)
    lock = threading.Lock()
    now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(stub.received)
                stub.received.append(Received(body=body, headers=dict(self.headers), at=time.monotonic()))
                now += 1
                stub.most_at_once = max(stub.most_at_once, now)
            try:
                known = self.path == "/v1/chat/completions"
                self._answer(stub.reply(number, body) if known else fail(404, f"no {self.path} here"))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    now -= 1

        def _answer(self, reply: Reply) -> None:
            time.sleep(reply.delay_seconds)
            if reply.hang_up:
                self.close_connection = True
                return
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for start in range(len(content)) if reply.drips else ():
                self.wfile.write(content[start : start + 1])
                time.sleep(0.1)
            if not reply.drips:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that was killed is no error of the server."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
