"""The process of an isolated reward: it reads requests from standard input and writes scores to standard output.

`rewards.remote.isolated` starts it with the Python of the reward's own environment, in which this package is not
installed; it needs only Python 3.10 and Pillow. What the reward prints goes to standard error. The process ends, with
all processes that the reward started, when its input ends or the process that started it is gone.
"""

import os
import queue
import select
import signal
import sys
import threading
from typing import Any

from rewards.calling import score_one
from rewards.contract import RewardError, describe
from rewards.registry import load_rewards
from rewards.remote import wire


def main() -> None:
    """Load the reward that the first frame names, send its columns, and answer until the input ends."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the reward prints or reads must not disturb the protocol
    os.dup2(2, 1)
    owner = os.getpid()
    requests: queue.SimpleQueue[tuple[dict[str, Any], bytearray]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(incoming, os.getppid(), requests), daemon=True).start()
    try:
        # Not among the words of the command, which all users of the machine can list.
        (reward,) = load_rewards([requests.get()[0]["spec"]])
    except Exception as error:  # raised by the run that asked for this reward
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
        return score_one(reward, request.images, request.prompts, request.columns)._asdict()
    except RewardError as error:
        return {"error": str(error), "kind": "contract"}
    except Exception as error:  # no request may end the worker
        return {"error": describe(error), "kind": "raised"}


def _send(descriptor: int, owner: int, header: dict[str, Any]) -> None:
    if os.getpid() != owner:  # a fork made by the reward, which must not answer as well
        os._exit(0)
    data = b"".join(wire.frame(header))
    while data:
        data = data[os.write(descriptor, data) :]


def _read_requests(descriptor: int, parent: int, requests: Any) -> None:
    """Read requests in a thread, so that the end of the input is noticed even while a request is being scored."""

    def fill(buffer: memoryview) -> None:
        while buffer:
            # The end of the input is not enough: a child of the parent may keep the pipe open.
            while not select.select([descriptor], [], [], 1.0)[0]:
                if os.getppid() != parent:
                    _leave()
            count = os.readv(descriptor, [buffer])
            if not count:
                _leave()  # nobody waits for the scores any more
            buffer = buffer[count:]

    while True:
        requests.put(wire.read_frame(fill))


def _leave() -> None:
    """End at once, together with the processes that the reward started, which nobody else would end."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)
