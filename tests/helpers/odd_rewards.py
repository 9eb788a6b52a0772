"""Rewards that do as the prompt tells them: score, raise, hang, die, break the contract."""

import asyncio
import os
import sys
import time


def told(images, prompts, factor=None):
    """Column `factor` optional; what is printed must not disturb anything."""
    print("a stray print")
    os.write(1, b"and one to the descriptor\n")
    word = prompts[0] if prompts else ""
    if word == "raise":
        raise ValueError("no such file: weights.bin")
    if word == "hang":
        time.sleep(1000)
    if word == "sleep":
        time.sleep(float(factor[0]))
    if word == "die":
        print("last words", file=sys.stderr)
        os._exit(7)
    if word.startswith("die once "):
        path = word.removeprefix("die once ")
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(7)
    if word == "time out":
        raise TimeoutError("no answer from the database")
    if word == "exit":
        sys.exit(0)
    if word == "fork":
        os.fork()  # and both go on
    if word.startswith("leave a child "):
        if not (pid := os.fork()):
            time.sleep(1000)
        with open(word.removeprefix("leave a child "), "w") as file:
            file.write(str(pid))
        if factor:
            os._exit(factor[0])
    if word in ODD:
        return ODD[word](images)
    factors = factor or [1.0] * len(images)
    return [sum(image.tobytes()[:3000]) / 7 * by for image, by in zip(images, factors, strict=True)]


def careful(images, prompts, factor=None):
    """Raises wherever in a call, alone or joined with others, a prompt tells it to."""
    if "raise" in prompts:
        raise ValueError("no such file: weights.bin")
    return told(images, prompts, factor)


ODD = {
    "nothing": lambda images: [None, float("nan"), float("inf"), *[0.1] * (len(images) - 3)],
    "short": lambda images: [1.0] * (len(images) - 1),
    "text": lambda images: ["good"] * len(images),
    "no list": lambda images: 3.0,
    "more": lambda images: ([0.5] * len(images), {"width": [image.width for image in images], "calls": 7, "odd": None}),
    "odd extra": lambda images: ([0.5] * len(images), {"kind": "good"}),
}


async def patient(images, prompts):
    await asyncio.sleep(0.01)
    return [float(len(prompt)) for prompt in prompts]


async def blocking(images, prompts):
    time.sleep(float(prompts[0]))
    return [1.0 for _ in images]


def needing(images, prompts, target, note="-", **columns):
    return [float(value) for value in target]


def process_id(images, prompts):
    return [float(os.getpid()) for _ in images]


class Making:
    """A factory: of instances."""

    def __init__(self, scale, load_seconds=0.0):
        if scale == 0:
            raise ZeroDivisionError("a scale of 0")
        time.sleep(load_seconds)
        self.scale = scale

    def __call__(self, images, prompts, target):
        return [self.scale * value for value in target]
