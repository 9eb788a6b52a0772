"""A chat endpoint on a port of this machine, which answers as it is told and keeps what it was sent."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager

import anyio
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


def completion(text: str | None) -> Response:
    return JSONResponse({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})


class Judge:
    """answers: what the next requests get, the last one for ever: a text, or a Response, or "hang", or "trickle"."""

    def __init__(self, answers: Iterable[str | Response | None]):
        self.answers = list(answers)
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.delay = 0.0
        self.url = ""

    async def chat(self, request: Request) -> Response:
        self.bodies.append(json.loads(await request.body()))
        self.headers.append(dict(request.headers))
        self.times.append(time.monotonic())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await anyio.sleep(30 if answer == "hang" else self.delay)
        finally:
            self.under_way -= 1
        if answer == "trickle":
            return StreamingResponse(self._trickle(), media_type="application/json")
        return answer if isinstance(answer, Response) else completion(answer)

    async def _trickle(self):
        for _ in range(300):
            yield b" "
            await anyio.sleep(0.1)

    def images(self) -> list[Image.Image]:
        """The images it was sent."""
        parts = [body["messages"][0]["content"][0]["image_url"]["url"] for body in self.bodies]
        assert all(part.startswith("data:image/png;base64,") for part in parts)
        return [Image.open(io.BytesIO(base64.b64decode(part.partition(",")[2]))) for part in parts]

    def texts(self) -> list[str]:
        """The questions it was asked."""
        return [body["messages"][0]["content"][1]["text"] for body in self.bodies]


@contextmanager
def judge_that_answers(*answers: str | Response | None):
    """Run a Judge in a thread until the block ends."""
    judge = Judge(answers)
    app = Starlette(routes=[Route("/v1/chat/completions", judge.chat, methods=["POST"])])
    settings = uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    judge.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield judge
    finally:
        server.should_exit = True
        thread.join(timeout=10)
