"""An HTTP server made of sockets, which answers with whatever bytes it is told to."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

#: What the page of a reward service says of the reward `told`.
DESCRIBED = {
    "rewards": {"told": {"columns": ["factor"], "required": [], "digest": "0" * 64}},
    "limits": {"bytes": 2**20, "images": 8, "pixels": 2**20},
}


def answer(body: bytes | str | dict, status: str = "200 OK", **headers: str) -> bytes:
    """One whole answer."""
    body = json.dumps(body) if isinstance(body, dict) else body
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode() + body


def drip(data: bytes, seconds: float = 0.1) -> Iterator[bytes]:
    """One byte after the other."""
    for number in range(len(data)):
        time.sleep(seconds)
        yield data[number : number + 1]


@contextmanager
def raw_server(respond: Callable[[bytes], Iterable[bytes]]):
    """Send what ``respond`` gives for the head of a request; yields the URL and the heads that were received."""
    heads: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                head = b""
                while b"\r\n\r\n" not in head:
                    if not (piece := connection.recv(65536)):
                        return
                    head += piece
                heads.append(head)
                for piece in respond(head):
                    connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # a request whose body is unread would be a lost connection
                    pass
            except OSError:
                return  # the client has gone

    def accept() -> None:
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", heads


@contextmanager
def hostile_service(*pieces: bytes, slowly: bool = False):
    """A service that describes the reward `told`, and answers every request for scores with these pieces."""

    def respond(head: bytes) -> Iterable[bytes]:
        if head.startswith(b"GET /rewards"):
            return [answer(DESCRIBED)]
        return drip(b"".join(pieces)) if slowly else pieces

    with raw_server(respond) as (url, heads):
        yield url, heads
