"""Two machines on one: network namespaces that see nothing but each other, over a cable of their own."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A namespace: its name, its address, and the interface that has it."""

    name: str
    address: str
    interface: str

    def inside(self, *words: object) -> list[object]:
        """The command that runs ``words`` on this machine; gloo would otherwise take the first interface it finds."""
        return ["ip", "netns", "exec", self.name, "env", f"GLOO_SOCKET_IFNAME={self.interface}", *words]


def why_not() -> str | None:
    """Why there can be none here, if so."""
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    if os.geteuid():
        return "only root can make network namespaces"
    name = f"fa{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Both are gone behind it, with whatever still ran on them."""
    first, second = (
        Machine(f"fa{os.getpid()}{letter}", f"10.77.0.{place}", f"fa{letter}")
        for place, letter in enumerate("ab", start=1)
    )
    try:
        for machine in (first, second):
            _ip("netns", "add", machine.name)
        _ip("link", "add", first.interface, "netns", first.name, "type", "veth", "peer", "name", second.interface,
            "netns", second.name)  # fmt: skip
        for machine in (first, second):
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.interface)
            for interface in (machine.interface, "lo"):
                _ip("-n", machine.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for machine in (first, second):
            left = subprocess.run(["ip", "netns", "pids", machine.name], capture_output=True, text=True).stdout
            for pid in left.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
