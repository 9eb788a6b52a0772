"""Serve rewards over HTTP: ``flow-align rewards serve --use hpsv2 --use ocr --port 8000``.

| | |
|---|---|
| ``POST /score/NAME`` | takes a frame of `rewards.remote.wire`, or JSON ``{"prompts": [...], "images": [base64 PNG, ...], "columns": {}}``; answers ``{"scores": [...]}``, null for not scored, and ``"extras": {NAME: [...]}`` if the reward returns any |
| ``GET /rewards`` | names, the columns that each takes and needs, the limits, the version |
| ``GET /health`` | 200 if everything is loaded and well, else 503 with what is wrong |
| ``GET /metrics`` | for Prometheus |

The header ``X-Reward-Digest`` of an answer, also given by ``/rewards``, is the same for the same ``use`` and ``args``:
the client refuses to mix scores with different digests. A frame may have up to ``--max_body_mb``, and so may its images
in memory (an RGB image takes four bytes a pixel and eight a row), and so may JSON once it is read (its bytes and 100 for
each value, four times the bytes if it is not plain ASCII), of which no more than 64 MiB are read. A body may take 600 s.

Errors: 400 neither a frame nor JSON, 401 wrong token, 404 no such reward, 408 the body does not arrive, 413 too many
bytes, 422 content that cannot be scored, 500 the reward raised (with its message), 503 too many requests are waiting or
the rewards are loading. The token is read from the environment variable FLOW_ALIGN_TOKEN or from ``--token_file``;
clients send it as ``Authorization: Bearer TOKEN``, unencrypted unless a proxy in front of the service uses HTTPS.

Built on Starlette and uvicorn. LitServe is quicker to set up, but its whole server ends when one worker does.
"""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rewards.redaction import redacted
from rewards.registry import read_rewards
from rewards.remote import wire

try:
    import uvicorn

    from rewards.remote.connections import Connection, Listening, Seldom, accepted_at_once
    from rewards.remote.service import Service
except ImportError as error:
    raise SystemExit(f'error: {error}. The service needs: pip install "flow-align[serve]"') from None

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in progress are answered first."""
    args = _arguments(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Seldom())
    try:
        specs, token = _specs(args), _token(args.token_file)
        listening = _open_socket(args.host, args.port)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {redacted(str(error))}") from None
    limits = wire.Limits(int(args.max_body_mb * 2**20), args.max_images, args.max_pixels)
    service = Service(
        specs,
        limits,
        token,
        max_queue=args.max_queue,
        max_batch_size=args.max_batch_size,
        max_wait=args.max_wait_ms / 1000,
    )
    config = uvicorn.Config(
        service.app,
        http=Connection,
        ws="none",
        backlog=accepted_at_once(),
        lifespan="on",
        log_config=None,  # to the handlers above, with their filter
        log_level=args.log_level,
        access_log=False,
        timeout_graceful_shutdown=args.grace,
    )
    server = uvicorn.Server(config)
    service.stop = lambda: setattr(server, "should_exit", True)
    if token is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("anyone who can reach %s can use this service: set FLOW_ALIGN_TOKEN", args.host)
    host, port = listening.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn sends the signal again after its own handling
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        logger.info("interrupted")
    if service.error:
        raise SystemExit(f"error: {redacted(service.error)}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flow-align rewards serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--use", action="append", default=[], help="a built-in name, module:attr or file.py:attr; may be repeated")
    add("--config", type=Path, help="YAML with a list `rewards:`, as for training (args, environment, timeout)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all addresses")
    add("--port", type=_between(int, 0, 65535), default=8000, help="0: any free port")
    add(
        "--workers",
        action="store_true",
        help="run each reward in its own process, which is restarted when it dies or hangs",
    )
    add("--token_file", type=Path, help="file with the token; or set FLOW_ALIGN_TOKEN")
    count, milliseconds = _between(int, 1, 2**40), _between(float, 0, 10**6)
    megabytes = _between(float, 0.001, 2**20)
    add(
        "--max_body_mb",
        type=megabytes,
        default=256,
        help="size of a request, and of its images in memory; for JSON at most 64",
    )
    add("--max_images", type=count, default=1024, help="images in one request")
    add("--max_pixels", type=count, default=2**26, help="pixels of one image")
    add("--max_queue", type=count, default=64, help="requests waiting for one reward")
    joined = "join waiting requests up to this many images; 0: each request is its own call"
    add("--max_batch_size", type=_between(int, 0, 2**40), default=0, help=joined)
    add("--max_wait_ms", type=milliseconds, default=5, help="how long a request waits for others to join")
    add("--grace", type=_between(int, 0, 10**6), default=30, help="seconds that requests in progress have to end")
    add("--log_level", default="warning", choices=["debug", "info", "warning", "error"])
    return parser.parse_args(argv)


def _between(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    """Return a type for argparse: a number in the range."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:  # also refuses NaN
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, found {text}")
        return value

    number.__name__ = kind.__name__  # argparse shows it if the text is not a number
    return number


def _specs(args: argparse.Namespace) -> list[Any]:
    """Return the entries to load; with ``--workers`` each runs in its own process, with this Python."""
    specs: list[Any] = list(args.use)
    if args.config:
        specs += read_rewards(args.config)
    if not specs:
        raise ValueError("no reward was given: pass --use NAME, or --config with `rewards:`")
    if args.workers:
        specs = [{"use": spec} if isinstance(spec, str) else spec for spec in specs]
        this_python = {"python": sys.executable}
        specs = [
            {**spec, "environment": this_python | dict(spec.get("environment") or {})}
            if isinstance(spec, Mapping) and "endpoints" not in spec
            else spec
            for spec in specs
        ]
    return specs


def _token(file: Path | None) -> str | None:
    text = file.read_text() if file else os.environ.get("FLOW_ALIGN_TOKEN")
    return wire.checked_token(text, str(file or "FLOW_ALIGN_TOKEN"))


def _open_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = Listening(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listening


if __name__ == "__main__":
    main()
