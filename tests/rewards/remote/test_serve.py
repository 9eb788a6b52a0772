"""The service: what it answers, what it refuses and how, and that it scores as before after all of it."""

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import io
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import pytest
import starlette.requests
import uvicorn
from PIL import Image
from services import IN_CLEAR, ODD, ROOT, Service

from rewards import load_rewards, score
from rewards.contract import RunsElsewhere
from rewards.remote import wire
from rewards.remote.connections import Connection
from rewards.remote.lanes import Lane
from rewards.remote.service import Refused
from rewards.remote.service import Service as App
from rewards.serve import _specs

TOKEN = "kept-secret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
IMAGE = Image.effect_noise((30, 20), 50).convert("RGB")


@pytest.fixture(scope="module")
def service():
    limits = ("--max_body_mb", "2", "--max_pixels", "100000", "--max_images", "8", "--max_queue", "2")
    service = Service(
        "--use", f"{ODD}:told", "--use", f"{ODD}:needing", "--use", f"{ODD}:patient", *limits, token=TOKEN
    )
    yield service
    assert TOKEN not in service.end()
    assert service.process.returncode == 0


@pytest.fixture
def http(service):
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30) as client:
        yield client


def png(image: Image.Image = IMAGE) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def frame(prompts=("p",), columns=None, image=IMAGE) -> bytes:
    return b"".join(wire.encode_request([image] * len(prompts), list(prompts), columns or {}))


def expected() -> list[float]:
    (here,) = load_rewards([f"{ODD}:told"])
    return score([here], [IMAGE], ["p"], {})[0][0]


@pytest.fixture(autouse=True)
def still_right(http):
    """Whatever a test did to it, the service scores as before."""
    yield
    assert http.post("/score/told", content=frame()).json() == {"scores": expected()}


# --- Answers ---


def test_a_frame_and_plain_json_give_the_scores_of_this_process_to_the_bit(http):
    factors = [0.1, 1 / 3]
    (here,) = load_rewards([f"{ODD}:told"])
    ((right,), _) = score([here], [IMAGE] * 2, ["p"] * 2, {"factor": factors})
    as_frame = http.post("/score/told", content=frame("pp", {"factor": factors}))
    plain = {"prompts": ["p", "p"], "images": [png()] * 2, "columns": {"factor": factors}}
    assert as_frame.json() == http.post("/score/told", json=plain).json() == {"scores": right}
    assert http.post("/score/patient", content=frame(["four"])).json() == {"scores": [4.0]}


def test_not_scored_is_null(http):
    answer = http.post("/score/told", content=frame(["nothing"] * 4))
    assert answer.json() == {"scores": [None, None, None, 0.1]}


def test_the_pages_say_what_is_served_and_how_it_goes(http):
    served = http.get("/rewards").json()
    digests = [entry.pop("digest") for entry in served["rewards"].values()]
    assert len(set(digests)) == 3 and digests[0] == http.post("/score/told", content=frame()).headers["X-Reward-Digest"]
    assert served["rewards"] == {
        "told": {"columns": ["factor"], "required": []},
        "needing": {"columns": None, "required": ["target"]},
        "patient": {"columns": [], "required": []},
    }
    assert served["limits"] == {"bytes": 2 * 2**20, "images": 8, "pixels": 100000}
    health = http.get("/health")
    assert health.status_code == 200 and health.json()["rewards"]["told"]["ready"] is True

    def count(line: str) -> float:
        found = [text for text in http.get("/metrics").text.splitlines() if text.startswith(line)]
        return float(found[0].split()[-1]) if found else 0.0

    images, failures = (
        'flow_align_reward_images_total{reward="told"}',
        'flow_align_reward_failures_total{reward="told"}',
    )
    refused = 'flow_align_reward_requests_total{reward="unknown",status="404"}'
    before = [count(images), count(failures), count(refused)]
    http.post("/score/told", content=frame("ppp"))
    http.post("/score/told", content=frame(["raise"]))
    http.post("/score/whatever", content=b"")
    assert [count(images), count(failures), count(refused)] == [before[0] + 3, before[1] + 1, before[2] + 1]
    assert "whatever" not in http.get("/metrics").text


def test_rewards_are_scored_side_by_side_and_one_reward_one_call_after_the_other(http):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = time.monotonic()
        slow = pool.submit(http.post, "/score/told", content=frame(["sleep"], {"factor": [1.0]}))
        time.sleep(0.2)
        assert http.post("/score/needing", content=frame(columns={"target": [3]})).json() == {"scores": [3.0]}
        assert not slow.done()
        assert http.post("/score/told", content=frame()).json() == {"scores": expected()}
        assert time.monotonic() - started >= 1.0 and slow.done()


# --- Refusals ---


@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN}x"])
@pytest.mark.parametrize("page", ["/score/told", "/rewards", "/metrics"])
def test_without_the_right_token_nothing_is_told(service, given, page):
    headers = {} if given is None else {"Authorization": given}
    answer = httpx.request("POST" if "score" in page else "GET", service.url + page, headers=headers)
    assert answer.status_code == 401 and "token" in answer.json()["error"] and TOKEN not in answer.text
    assert httpx.get(service.url + "/health", headers=headers).json() == {"status": "ok"}


def bomb() -> str:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"hello", 400, "not JSON"),
        (b"\x80\x04\x95pickled", 400, "not JSON"),
        (b"[" * 10_000, 400, "RecursionError"),
        (b"[" * 100_000, 413, "JSON that takes 10100100 bytes of memory; at most 2097152 are allowed"),
        (b"{}, " * 100_000, 413, "JSON that takes"),
        ({"prompts": ["p"] * 3, "images": [png(Image.new("1", (1, 100_000)))] * 3}, 422, "unpack to more than"),
        (b"[]", 400, "not an object"),
        (frame()[:-1], 400, "claims"),
        (frame() + b"x", 400, "claims"),
        (b"FAR1" + struct.pack("<IQ", 5, 2**62), 413, "at most"),
        (b"FAR1" + struct.pack("<IQ", 2**32 - 1, 0), 413, "at most"),
        (frame("ppp")[:20].replace(b"FAR1", b"FAR2"), 400, "not JSON"),
        ({"prompts": ["p"], "images": [png(), png()]}, 422, "prompts: 1 for 2 images"),
        ({"prompts": ["p"], "images": [png()], "columns": {"factor": []}}, 422, "column 'factor': 0 for 1 images"),
        (
            {"prompts": ["p"], "images": [png()], "columns": {"fctor": [1]}},
            422,
            "not take a column 'fctor'. Did you mean 'factor'",
        ),
        ({"prompts": ["p"] * 9, "images": [png()] * 9}, 422, "9 images; at most 8"),
        ({"prompts": ["p"], "images": ["???"]}, 422, "not base64"),
        ({"prompts": ["p"], "images": [base64.b64encode(b"GIF89a").decode()]}, 422, "not a readable PNG"),
        ({"prompts": ["p"], "images": [bomb()]}, 422, "12000x12000 is more than 100000 pixels"),
        ({"prompts": ["p"], "images": [png(Image.new("L", (317, 317)))]}, 422, "317x317 is more than"),
        ({"prompts": ["exit"], "images": [png()]}, 500, "SystemExit: 0"),
        ({"prompts": ["time out"], "images": [png()]}, 500, "TimeoutError: no answer from the database"),
        ({"prompts": ["raise"], "images": [png()]}, 500, "ValueError: no such file: weights.bin"),
        ({"prompts": ["short"], "images": [png()]}, 500, "'told' returned 0 scores for 1 images"),
        ({"prompts": ["text"], "images": [png()]}, 500, "'told' returned 'good' (str) for image 0"),
    ],
)
def test_what_is_wrong_is_answered_with_its_status_and_a_sentence(http, body, status, message):
    answer = http.post("/score/told", **({"json": body} if isinstance(body, dict) else {"content": body}))
    assert answer.status_code == status and message in answer.json()["error"]


def test_a_frame_with_an_empty_image_is_refused(http):
    header = {"prompts": ["p"], "images": [{"mode": "RGB", "size": [0, 0]}]}
    answer = http.post("/score/told", content=b"".join(wire.frame(header)))
    assert answer.status_code == 422 and "at least 1x1" in answer.json()["error"]


def test_an_unknown_reward_and_a_missing_column_are_named(http):
    answer = http.post("/score/tolt", content=frame())
    assert answer.status_code == 404 and "Did you mean 'told'?" in answer.json()["error"]
    answer = http.post("/score/needing", content=frame(columns={"traget": [1]}))
    assert answer.status_code == 422 and "needs the data column 'target'" in answer.json()["error"]
    assert http.get("/score/told").status_code == 405 and http.get("/nothing").status_code == 404


def test_a_body_that_claims_a_gigabyte_is_refused_at_once(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
        head = (
            f"POST /score/told HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {10**9}\r\n\r\n"
        )
        raw.sendall(head.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_a_length_is_cut_off_where_it_becomes_too_large(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
        head = f"POST /score/told HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        sent, piece = 0, b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            while sent < 2**30:
                raw.sendall(piece)
                sent += 65536
        except ConnectionError:
            assert sent < 2**28  # what lies in buffers is sent, and no more is taken
        assert 2 * 2**20 - 65536 <= sent < 2**28


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr("rewards.remote.service.IDLE_SECONDS", 0.05)
    application = App([])

    async def body():
        async def receive():
            await asyncio.sleep(10)

        request = starlette.requests.Request({"type": "http", "method": "POST", "headers": []}, receive)
        await application._read_body(request, lambda count: None)

    with pytest.raises(Refused, match=r"no byte of the body arrived for 0\.05 s") as caught:
        asyncio.run(body())
    assert caught.value.status == 408


def test_a_client_that_goes_away_disturbs_nobody(service):
    for sent in (
        b"POST /score/told HTTP/1.1\r\n",
        b"POST /score/told HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nxx",
    ):
        with socket.create_connection(("127.0.0.1", service.port), timeout=10) as raw:
            raw.sendall(sent)


# --- Connections ---


@contextlib.contextmanager
def served_here(*specs: str, **lane_options):
    """The service in a thread of this process, where a test can make its deadlines short."""
    application = App(list(specs), **lane_options)
    config = uvicorn.Config(application.app, port=0, http=Connection, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and (application.lanes or not specs)):
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield application, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def post(body: bytes, token: str = TOKEN, name: str = "told") -> bytes:
    head = f"POST /score/{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_hundreds_of_half_sent_heads_keep_nobody_out_and_fill_no_log():
    """300 connections without a token ended the service, with 316 MB of log in a minute."""
    service = Service("--use", f"{ODD}:told", files=256, token=TOKEN)
    half = post(b"")[:-10]
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=30))
            with contextlib.suppress(ConnectionError):  # it has been closed to make room
                raw.sendall(half)
        for _ in range(5):
            answer = httpx.post(f"{service.url}/score/told", content=frame(), headers=BEARER, timeout=30)
            assert answer.json() == {"scores": expected()}
    assert httpx.post(f"{service.url}/score/told", content=frame(), headers=BEARER, timeout=30).status_code == 200
    log = service.end()
    assert service.process.returncode == 0 and len(log) < 10_000, log[-2000:]


def test_requests_that_are_no_http_fill_no_log():
    service = Service("--use", f"{ODD}:told")
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as raw:
            raw.sendall(b"\0nonsense\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
    assert 50 <= service.end().count("Invalid HTTP request received") <= 100


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /score/told HTTP/1.1\r\nHost: x\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(sent, monkeypatch):
    """Also where bytes go on dripping, before and after a request that was answered."""
    monkeypatch.setattr("rewards.remote.connections.HEAD_SECONDS", 1.0)
    with served_here() as (_, port), socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(sent)
        assert drips_until_closed(raw)


def drips_until_closed(raw: socket.socket, seconds: float = 30.0) -> bool:
    """Send a byte now and then; whether the connection was closed in time."""
    until = time.monotonic() + seconds
    raw.settimeout(0.2)
    while time.monotonic() < until:
        try:
            raw.sendall(b"x")
            if not raw.recv(65536):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_body_that_drips_is_given_up(monkeypatch):
    """Every byte began the time anew."""
    monkeypatch.setattr("rewards.remote.service.BODY_SECONDS", 1.0)
    with served_here(f"{ODD}:told") as (_, port), socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(post(frame())[:-1000])
        assert drips_until_closed(raw)


def test_a_request_that_takes_longer_than_a_head_may_is_answered(monkeypatch):
    monkeypatch.setattr("rewards.remote.connections.HEAD_SECONDS", 0.5)
    with served_here(f"{ODD}:told") as (_, port), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):  # over one connection
            answer = client.post("/score/told", content=frame(["sleep"], {"factor": [1.5]}), timeout=30)
            assert answer.status_code == 200


def test_a_client_that_hangs_up_leaves_the_queue():
    """Three that hung up kept the places of all others until the call under way had ended."""
    with served_here(f"{ODD}:told", max_queue=2) as (application, port):
        queue, url = application.lanes["told"]._jobs, f"http://127.0.0.1:{port}/score/told"
        with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
            slow = pool.submit(httpx.post, url, content=frame(["sleep"], {"factor": [6.0]}), timeout=60)
            await_that(lambda: application.lanes["told"].state()["seconds"] > 0)
            waiting = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2)]
            for raw in waiting:
                raw.sendall(post(frame()))
            await_that(lambda: len(queue) == 2)
            assert httpx.post(url, content=frame()).status_code == 503
            for raw in waiting:
                raw.close()
            await_that(lambda: len(queue) == 0)
            assert not slow.done() and application._memory._reserved < 3 * len(frame(["sleep"])) + 10_000
            assert httpx.post(url, content=frame(), timeout=60).json() == {"scores": expected()}
            assert slow.result().status_code == 200
        await_that(lambda: application._memory._reserved == 0)


def await_that(condition, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_more_requests_than_may_wait_are_sent_away_for_a_while(http):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        body = frame(["sleep"], {"factor": [0.7]})
        answers = [
            future.result() for future in [pool.submit(http.post, "/score/told", content=body) for _ in range(6)]
        ]
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 200, 503, 503, 503]
    busy = next(answer for answer in answers if answer.status_code == 503)
    assert int(busy.headers["Retry-After"]) >= 1 and "waiting" in busy.json()["error"]


def test_what_images_unpack_to_is_held_in_bounds_until_they_are_scored():
    service = Service("--use", f"{ODD}:told", "--max_body_mb", "1")
    flat = png(Image.new("1", (1024, 1016)))  # 1 MiB in memory, as much as a request may hold
    body = {"prompts": ["sleep"], "images": [flat], "columns": {"factor": [0.3]}}
    ask = lambda _: httpx.post(f"{service.url}/score/told", json=body, timeout=60).status_code  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        statuses = list(pool.map(ask, range(14)))
    assert 1 <= statuses.count(200) <= 8 and statuses.count(503) == 14 - statuses.count(200)
    assert ask(0) == 200  # and all of it is given back
    service.end()


# --- Joined requests ---


def test_joined_requests_get_their_own_scores_and_their_own_failures():
    service = Service("--use", f"{ODD}:careful", "--max_batch_size", "4", "--max_wait_ms", "300")
    (here,) = load_rewards([f"{ODD}:careful"])
    factors = [[0.5], [0.25, 2.0], [3.0], [1.0]]
    prompts = [["a"], ["b", "c"], ["d"], ["raise"]]

    def ask(n):
        body = frame(prompts[n], {"factor": factors[n]})
        return httpx.post(f"{service.url}/score/careful", content=body, timeout=30).json()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, range(4)))
        metrics = httpx.get(f"{service.url}/metrics").text
    service.end()
    for n in range(3):
        assert answers[n] == {
            "scores": score([here], [IMAGE] * len(prompts[n]), prompts[n], {"factor": factors[n]})[0][0]
        }
    assert answers[3]["error"] == "ValueError: no such file: weights.bin"
    assert 'flow_align_reward_images_total{reward="careful"} 4.0' in metrics


def test_joined_requests_get_their_own_extras():
    service = Service("--use", f"{ODD}:careful", "--max_batch_size", "3", "--max_wait_ms", "5000")

    def ask(n):
        body = frame(["more"] * n, {"factor": [1.0] * n})
        return httpx.post(f"{service.url}/score/careful", content=body, timeout=30).json()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, (1, 2)))
    service.end()
    for n, found in zip((1, 2), answers, strict=True):
        width = [float(IMAGE.width)] * n
        assert found == {"scores": [0.5] * n, "extras": {"width": width, "calls": [7.0], "odd": [None]}}


# --- Workers ---


def test_a_reward_that_dies_or_hangs_in_its_worker_leaves_the_service_up(tmp_path):
    config = tmp_path / "service.yaml"
    config.write_text(f"rewards:\n  - {{use: '{ODD}:told', timeout: 1, retries: 0}}\n  - {{use: '{ODD}:process_id'}}\n")
    service = Service("--config", str(config), "--workers")
    pid = httpx.post(f"{service.url}/score/process_id", content=frame()).json()["scores"][0]
    assert pid != service.process.pid
    for prompt, message in (("die", "ended with code 7"), ("hang", "longer than 1 s and was killed")):
        answer = httpx.post(f"{service.url}/score/told", content=frame([prompt]), timeout=30)
        assert answer.status_code == 500 and message in answer.json()["error"]
        assert answer.json()["kind"] == "unavailable"
        service.await_health()  # it is started again without being asked
        assert httpx.post(f"{service.url}/score/told", content=frame(), timeout=30).json() == {"scores": expected()}
    assert httpx.post(f"{service.url}/score/process_id", content=frame()).json()["scores"] == [pid]
    service.end()
    assert service.process.returncode == 0 and not Path(f"/proc/{int(pid)}").exists()


def test_health_says_what_is_wrong_with_a_dead_worker(tmp_path):
    flag = tmp_path / "broken"
    (tmp_path / "fragile.py").write_text(
        f"import os\nassert not os.path.exists({str(flag)!r}), 'the GPU fell off'\n"
        "def fragile(images, prompts):\n    os._exit(9)\n"
    )
    service = Service("--use", f"{tmp_path}/fragile.py:fragile", "--workers")
    flag.touch()
    answer = httpx.post(f"{service.url}/score/fragile", content=frame(), timeout=60)
    assert answer.status_code == 500
    health = httpx.get(f"{service.url}/health")
    assert health.status_code == 503 and health.json()["status"] == "degraded"
    assert "GPU fell off" in health.json()["rewards"]["fragile"]["problem"]
    service.end()


class Sick(RunsElsewhere):
    """A reward whose worker cannot be looked after."""

    def __init__(self):
        self.revived, self.asked_in = 0, None
        self.columns, self.required = (), ()

    def __call__(self, images, prompts):
        return [1.0 for _ in images]

    def check_values(self, row):
        pass

    def close(self):
        pass

    def revive(self):
        self.revived += 1
        raise OSError("out of memory")

    def problem(self):
        self.asked_in = threading.current_thread()
        return "out of memory"


def sick_service():
    sick = Sick()
    application = App(["sick"])
    application.lanes = {"sick": Lane(load_rewards([sick])[0], application.metrics)}
    return sick, application


def test_looking_after_the_workers_goes_on_whatever_one_raises(monkeypatch, caplog):
    monkeypatch.setattr("rewards.remote.service.WATCH_SECONDS", 0.01)
    sick, application = sick_service()

    async def watch():
        watching = asyncio.create_task(application._watch())
        while sick.revived < 3 and not watching.done():
            await asyncio.sleep(0.01)
        return watching.done()

    assert not asyncio.run(asyncio.wait_for(watch(), 10)) and "OSError: out of memory" in caplog.text


def test_health_is_asked_for_beside_the_event_loop():
    sick, application = sick_service()
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    answer = asyncio.run(application.health(starlette.requests.Request(scope)))
    assert answer.status_code == 503 and b"out of memory" in answer.body
    assert sick.asked_in is not threading.current_thread()


def test_a_service_whose_lanes_end_ends_too(monkeypatch):
    async def run(self):
        raise OSError("a lane ended")

    monkeypatch.setattr(Lane, "run", run)
    application, stopped = App([f"{ODD}:told"]), []
    application.stop = lambda: stopped.append(True)
    asyncio.run(application._load_and_run())
    assert application.error == "OSError: a lane ended" and stopped


# --- The program ---


def test_sigterm_lets_the_request_under_way_end(service):
    own = Service("--use", f"{ODD}:told")
    body, answers = frame(["sleep"], {"factor": [1.0]}), []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{own.url}/score/told", content=body, timeout=30))
    )
    thread.start()
    time.sleep(0.4)
    own.end(signal.SIGTERM)
    thread.join()
    assert own.process.returncode == 0 and len(answers[0].json()["scores"]) == 1


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rewards.serve", "--port", "0", *options]
    return subprocess.run(command, cwd=ROOT, env=IN_CLEAR, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no reward was given: pass --use NAME"),
        (("--use", "shapes_exat"), "Did you mean 'shapes_exact'?"),
        (("--use", f"{ODD}:Making"), "must take (images, prompts, ...)"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--config", "configs/accelerate/single.yaml"), "has no list `rewards:`"),
        (("--use", "shapes_exact", "--token_file", "/dev/null"), "the token in /dev/null is blank"),
        (("--use", "shapes_exact", "--port", "99999"), "--port: must be from 0 to 65535, found 99999"),
        (("--use", "shapes_exact", "--max_body_mb", "nan"), "--max_body_mb: must be from 0.001 to 1048576, found nan"),
        (("--use", "shapes_exact", "--max_queue", "few"), "--max_queue: invalid int value: 'few'"),
    ],
)
def test_what_cannot_be_served_is_a_sentence_and_a_failure(options, message):
    ended = run(*options)
    assert ended.returncode in (1, 2) and message in ended.stderr and "Traceback" not in ended.stderr


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(tmp_path):
    (tmp_path / "token").write_text("gehe\u00efm\n")
    ended = run("--use", "shapes_exact", "--token_file", str(tmp_path / "token"))
    assert ended.returncode == 1 and "characters other than printable ASCII" in ended.stderr
    assert "gehe" not in ended.stderr


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_token_is_refused_and_not_taken_for_none(blank, tmp_path):
    """`FLOW_ALIGN_TOKEN=$UNSET` opened the service to all."""
    (tmp_path / "token").write_text(blank)
    words = [sys.executable, "-m", "rewards.serve", "--port", "0", "--use", "shapes_exact"]
    for more, variables in ((["--token_file", str(tmp_path / "token")], {}), ([], {"FLOW_ALIGN_TOKEN": blank})):
        ended = subprocess.run(
            [*words, *more], cwd=ROOT, env=IN_CLEAR | variables, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 1 and "is blank, which is no token" in ended.stderr


def test_with_workers_an_entry_keeps_its_variables():
    entry = {"use": "ocr", "environment": {"variables": {"A": "1"}}}
    (spec,) = _specs(argparse.Namespace(use=[entry], config=None, workers=True))
    assert spec["environment"] == {"python": sys.executable, "variables": {"A": "1"}}


def test_a_port_in_use_is_named(service):
    ended = run("--use", "shapes_exact", "--port", str(service.port))
    assert ended.returncode == 1 and f"cannot listen on 127.0.0.1:{service.port}" in ended.stderr


def test_an_async_reward_that_blocks_delays_no_other():
    """They shared one event loop: while one slept in it, no other answered."""
    with served_here(f"{ODD}:blocking", f"{ODD}:patient") as (application, port):
        url = f"http://127.0.0.1:{port}/score"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            slow = pool.submit(httpx.post, f"{url}/blocking", content=frame(["6"]), timeout=120)
            await_that(lambda: application.lanes["blocking"].state()["seconds"] > 0)
            assert httpx.post(f"{url}/patient", content=frame(["abc"]), timeout=60).json() == {"scores": [3.0]}
            assert not slow.done()
            assert slow.result().json() == {"scores": [1.0]}
