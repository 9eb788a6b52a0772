"""A reward in a process of its own: requests come on standard input, scores leave on standard output.

Started by `rewards.remote.isolated`, with the Python of the reward's own environment, in which this package is not installed.
Its only needs are Python 3.10 and Pillow. Prints of the reward go to standard error. It ends when its input does, and
when whoever started it is gone; processes that the reward started end with it.
"""

import json
import os
import queue
import select
import signal
import sys
import threading
from typing import Any

from rewards.calling import as_json, score_one
from rewards.contract import RewardError, describe
from rewards.registry import load_rewards
from rewards.remote import wire


def main(spec: str) -> None:
    """Load the reward of ``spec`` (JSON of a config's entry), say hello, answer until the input ends."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the reward prints or reads is not the protocol's
    os.dup2(2, 1)
    owner = os.getpid()
    requests: queue.SimpleQueue[tuple[dict[str, Any], bytearray]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(incoming, os.getppid(), requests), daemon=True).start()
    try:
        (reward,) = load_rewards([json.loads(spec)])
    except Exception as error:  # whatever it is, the run that asked for this reward says it
        _send(outgoing, owner, {"error": str(error), "type": type(error).__name__})
        sys.exit(1)
    _send(outgoing, owner, {"columns": reward.columns, "required": reward.required, "python": sys.version.split()[0]})
    while True:
        header, body = requests.get()
        number = header.pop("number")
        _send(outgoing, owner, {"number": number, **_answer(reward, header, body)})


def _answer(reward: Any, header: dict[str, Any], body: bytearray) -> dict[str, Any]:
    try:
        request = wire.decode_request(header, body, wire.UNLIMITED)
        return {"scores": as_json(score_one(reward, request.images, request.prompts, request.columns))}
    except RewardError as error:
        return {"error": str(error), "kind": "contract"}
    except Exception as error:  # nothing of one request may end the worker
        return {"error": describe(error), "kind": "raised"}


def _send(descriptor: int, owner: int, header: dict[str, Any]) -> None:
    if os.getpid() != owner:  # the reward forked, and its child came back too: one answer is enough
        os._exit(0)
    data = b"".join(wire.frame(header))
    while data:
        data = data[os.write(descriptor, data) :]


def _listen(descriptor: int, parent: int, requests: Any) -> None:
    """Read requests while one is being scored, so that the end of the input is noticed in its middle too."""

    def fill(room: memoryview) -> None:
        while room:
            # The pipe alone does not tell: a child of the parent may hold its other end open.
            while not select.select([descriptor], [], [], 1.0)[0]:
                if os.getppid() != parent:
                    _leave()
            count = os.readv(descriptor, [room])
            if not count:
                _leave()  # nobody waits for what is being scored
            room = room[count:]

    while True:
        requests.put(wire.read_frame(fill))


def _leave() -> None:
    """End at once, with what the reward started: nobody else will end it."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)
