"""Frames: what is sent arrives as it was, and what does not add up is refused before it costs anything."""

import base64
import io
import json
import math
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from rewards.remote import wire

ROOT = Path(__file__).parents[3]
COLOURS = Image.effect_mandelbrot((40, 31), (-2, -1, 1, 1), 60)


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 31)) -> Image.Image:
    return COLOURS.resize(size).convert(mode)


def sent(images, prompts, columns=None, limits=wire.Limits()):  # noqa: B008  # frozen
    data = b"".join(wire.encode_request(images, prompts, columns or {}))
    return wire.decode_request(*wire.split(data, limits), limits)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def framed(header, body: bytes = b"") -> bytes:
    return b"".join(wire.frame(header, [body]))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says it is as large as that."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


# --- There and back ---


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (40, 31), (9, 2)])
def test_an_image_of_every_mode_arrives_pixel_for_pixel(mode, size):
    image = picture("L", size).convert("I").convert(mode) if mode == "I;16" else picture(mode, size)
    arrived = sent([image, image], ["a", "b"]).images
    assert [(i.mode, i.size, i.tobytes()) for i in arrived] == [(mode, size, image.tobytes())] * 2


def test_prompts_and_columns_arrive_as_they_were():
    prompts = ["", 'two "red" circles', "两个圆 \U0001f600 \ud800"]
    columns = {
        "spec": [{"n": 2, "shape": ["a", None, True]}, None, {}],
        "number": [0.1, 1e-310, -0.0],
        "large": [2**70, -1, 0],
    }
    arrived = sent([picture()] * 3, prompts, columns)
    assert (arrived.prompts, arrived.columns) == (prompts, columns)
    assert math.copysign(1, arrived.columns["number"][2]) == -1


def test_no_images_are_a_request_too():
    arrived = sent([], [])
    assert (arrived.images, arrived.prompts, arrived.columns) == ([], [], {})


def test_a_frame_read_in_small_pieces_is_the_same():
    data = io.BytesIO(b"".join(wire.encode_request([picture()], ["p"], {"a": [1]})) + b"the next frame")
    header, body = wire.read_frame(lambda room: room.__setitem__(slice(None), data.read(len(room))))
    assert wire.decode_request(header, body, wire.UNLIMITED).images[0].tobytes() == picture().tobytes()
    assert data.read() == b"the next frame"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_a_png_is_read_in_a_frame_and_in_plain_json(mode):
    image = picture(mode)
    data = png(image)
    framed_png = wire.split(framed({"prompts": ["p"], "images": [{"png": len(data)}]}, data), wire.Limits())
    plain = {"prompts": ["p"], "images": [base64.b64encode(data).decode()]}
    for request in (wire.decode_request(*framed_png, wire.Limits()), wire.decode_json(plain, wire.Limits())):
        (arrived,) = request.images
        assert (arrived.mode, arrived.size, type(arrived)) == (mode, image.size, Image.Image)
        assert ImageChops.difference(arrived.convert("RGB"), image.convert("RGB")).getbbox() is None


# --- What cannot be sent ---


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ((1, 2), "tuple"),
        ({1: "a"}, "the key 1"),
        ({"a": [{"b": {3}}]}, "set"),
        (b"x", "bytes"),
        (picture(), "Image"),
        (1j, "complex"),
    ],
)
def test_a_column_that_json_would_lose_or_change_is_named(value, found):
    with pytest.raises(ValueError, match=f"column 'target', row 1: {found} cannot be sent"):
        wire.encode_request([picture()] * 2, ["a", "b"], {"fine": [1, 2], "target": [None, value]})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "image 1 is NoneType, not a PIL image"),
        (picture("P"), "image 1 has mode 'P'"),
        (Image.new("RGB", (0, 5)), "image 1 is empty: 0x5"),
    ],
)
def test_what_is_no_plain_image_is_refused_by_row(image, message):
    with pytest.raises(ValueError, match=message):
        wire.encode_request([picture(), image], ["a", "b"], {})


# --- What cannot be read ---

GOOD = b"".join(wire.encode_request([picture()], ["p"], {}))
RAW = {"mode": "RGB", "size": [40, 31]}
PIXELS = picture().tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a frame"),
        (b"GET / HTTP/1.1\r\n", "not a frame"),
        (GOOD[:10], "not a frame"),
        (GOOD[:-1], "claims .* and has"),
        (GOOD + b"x", "claims .* and has"),
        (b"FAR1" + struct.pack("<IQ", 3, 0) + b"{'a", "not JSON"),
        (b"FAR1" + struct.pack("<IQ", 2, 0) + b"\xff\xff", "not JSON"),
        (b"FAR1" + struct.pack("<IQ", 2, 0) + b"[]", "JSON list, not an object"),
        (b"FAR1" + struct.pack("<IQ", 200_000, 0) + b"[" * 200_000, "not JSON: RecursionError"),
        (framed({"prompts": ["p"], "images": [RAW]}, PIXELS[:-1]), "extend beyond the body"),
        (framed({"prompts": ["p"], "images": [RAW]}, PIXELS + b"x"), "they take 3720 bytes of a body of 3721"),
        (framed({"prompts": ["p"], "images": [{"png": 10**15}]}, b"x"), "PNG extends beyond the body"),
    ],
)
def test_bytes_that_do_not_add_up_are_no_frame(data, message):
    with pytest.raises(wire.FrameError, match=message) as caught:
        wire.decode_request(*wire.split(data, wire.Limits()), wire.Limits())
    assert type(caught.value) is wire.FrameError


@pytest.mark.parametrize("header", [2, 2**31])
def test_a_frame_that_claims_too_much_is_refused_from_its_first_bytes(header):
    with pytest.raises(wire.TooLarge, match="at most 1000 are allowed"):
        wire.lengths(b"FAR1" + struct.pack("<IQ", header, 2**40), wire.Limits(bytes=1000))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "`images` must be a list"),
        ({"images": {}, "prompts": []}, "`images` must be a list"),
        ({"images": [RAW]}, "`prompts` must be a list of texts"),
        ({"images": [RAW], "prompts": [1]}, "`prompts` must be a list of texts"),
        ({"images": [RAW], "prompts": "p"}, "`prompts` must be a list of texts"),
        ({"images": [RAW], "prompts": []}, "prompts: 0 for 1 images"),
        ({"images": [RAW], "prompts": ["p"], "columns": [1]}, "`columns` must be an object"),
        ({"images": [RAW], "prompts": ["p"], "columns": {"a": [1, 2]}}, "column 'a': 2 for 1 images"),
        ({"images": [RAW], "prompts": ["p"], "columns": {"a": "x"}}, "column 'a': str for 1 images"),
        ({"images": [RAW], "prompts": ["p"], "weights": 1}, "unknown key 'weights'"),
        ({"images": [RAW] * 5, "prompts": ["p"] * 5}, "5 images; at most 4"),
        ({"images": [{"mode": "RGB", "size": [0, 0]}], "prompts": ["p"]}, "at least 1x1"),
        ({"images": [{"mode": "RGB", "size": [-1, 5]}], "prompts": ["p"]}, "at least 1x1"),
        ({"images": [{"mode": "RGB", "size": [True, 5]}], "prompts": ["p"]}, "at least 1x1"),
        ({"images": [{"mode": "P", "size": [1, 1]}], "prompts": ["p"]}, "neither a PNG"),
        ({"images": [3], "prompts": ["p"]}, "neither a PNG"),
        ({"images": [{"mode": [], "size": [1, 1]}], "prompts": ["p"]}, "neither a PNG"),
        ({"images": [{"mode": {}, "size": [1, 1]}], "prompts": ["p"]}, "neither a PNG"),
        ({"images": [{"mode": "RGB", "size": [101, 100]}], "prompts": ["p"]}, "101x100 is more than 10000 pixels"),
        ({"images": [{"mode": "L", "size": [10**9, 10**9]}], "prompts": ["p"]}, "more than 10000 pixels"),
    ],
)
def test_content_that_cannot_be_scored_says_why(header, message):
    limits = wire.Limits(images=4, pixels=10_000)
    with pytest.raises(wire.ContentError, match=message):
        wire.decode_request(header, PIXELS, limits)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(60_000, 60_000), "pixels"),
        (bomb(100_000, 100_000), "pixels|bomb"),
        (bomb(10, 0), "not a readable PNG"),
        (bomb(50, 50), "not a readable PNG"),
        (png(picture())[:-40], "not a readable PNG"),
        (b"GIF89a" + b"\0" * 50, "not a readable PNG"),
        (bomb(50, 50)[:33] + chunk(b"acTL", struct.pack(">II", 2, 0)) + bomb(50, 50)[33:], "is an animated PNG"),
        (b"", "not base64|not a readable PNG|neither"),
    ],
)
def test_a_bomb_or_a_broken_png_is_refused(data, message):
    with pytest.raises(wire.ContentError, match=message):
        wire.decode_json({"prompts": ["p"], "images": [base64.b64encode(data).decode()]}, wire.Limits())


def test_many_small_pngs_that_unpack_to_much_are_refused():
    data = base64.b64encode(png(Image.new("RGB", (1000, 1000)))).decode()
    request = {"prompts": ["p"] * 20, "images": [data] * 20}
    assert len(json.dumps(request)) < 200_000
    with pytest.raises(wire.ContentError, match=r"image 2: .* unpack to more than 10000000 bytes"):
        wire.decode_json(request, wire.Limits(bytes=10_000_000))


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "LA", "RGB", "RGBA", "I", "F"])
def test_images_count_as_what_they_take_in_memory(mode):
    image = Image.new(mode, (64, 64))
    taken = np.dtype({"1": "u1", "L": "u1", "P": "u1", "I;16": "u2"}.get(mode, "u4")).itemsize * 64 * 64 + 64 * 8
    limits, heard = wire.Limits(bytes=10**6), []
    requests = (
        [framed({"prompts": ["p"], "images": [{"png": len(png(image))}]}, png(image))] if mode not in ("F", "I") else []
    )
    requests += [b"".join(wire.encode_request([image], ["p"], {}))] if mode != "P" else []
    for data in requests:
        start = len(heard)
        wire.decode_request(*wire.split(data, limits), limits, heard.append)
        assert sum(heard[start:]) == taken  # a decoder's own memory is given back
        header, body = wire.split(data, limits)
        with pytest.raises(wire.ContentError, match="unpack to more than"):
            wire.decode_request(header, body, wire.Limits(bytes=taken - 1))
    assert [count for count in heard if count == taken] == [wire.memory(mode, image.size)] * len(requests)


@pytest.mark.parametrize("size", [(1, 2**26), (2**26, 1), (2, 2**25)])
def test_a_pixel_wide_image_counts_its_rows(size):
    """A PNG of 130 KB, a pixel wide, held 0.6 GiB: Pillow keeps a pointer to every row."""
    refused, counted = base64.b64encode(bomb(*size)).decode(), []

    def refuse(count):
        counted.append(count)
        if sum(counted) > 2**28:
            raise ArithmeticError

    with pytest.raises((wire.ContentError, ArithmeticError)):
        wire.decode_json({"prompts": ["p"], "images": [refused]}, wire.Limits(), refuse)
    if size[1] > 1:
        assert counted == [2 * len(refused)] and wire.memory("RGB", size) > wire.Limits().bytes


@pytest.mark.parametrize("unit", ["{}", "[]", '{"":0}', '{"":{}}', '{"":[0]}', "1.5", '"ab"', '"\\u4e2d"', "[[[]]]"])
def test_json_counts_as_what_it_takes_once_it_is_read(unit):
    """A body of 60 MiB of `{}` became 1.45 GiB, for each request."""
    text = ('{"prompts": [' + ", ".join([unit] * 20_000) + "]}").encode()
    tracemalloc.start()
    try:
        value = wire.parse_object(text)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken <= wire.json_memory(text) < 12 * taken and value
    with pytest.raises(wire.TooLarge, match="JSON that takes"):
        wire.parse_object(text, wire.Limits(bytes=taken))


def test_json_is_refused_before_it_is_read_and_held_in_bounds_with_other_requests():
    whole = b'{"images": [' + b"{}, " * (15 * 2**20) + b"{}]}"
    tracemalloc.start()
    try:
        with pytest.raises(wire.TooLarge, match=r"JSON that takes \d+ bytes of memory; at most 268435456"):
            wire.parse_object(whole, wire.Limits())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    heard = []
    text = b'{"a": "\\u4e2d"}'
    wire.parse_object(text, wire.Limits(), heard.append)
    assert heard[0] == wire.json_memory(text) == sum(heard) > 4 * len(text)


def test_an_image_that_is_refused_is_not_decoded():
    def refuse(count):
        raise ArithmeticError(count)

    whole = png(picture())
    cut = base64.b64encode(whole[:-40]).decode()  # to decode it would be another error
    with pytest.raises(ArithmeticError):
        wire.decode_json({"prompts": ["p"], "images": [cut]}, wire.Limits(), refuse)


def test_json_is_taken_up_to_64_mib():
    with pytest.raises(wire.TooLarge, match="at most 67108864 are allowed"):
        wire.parse_object(b" " * (2**26 + 1))


@pytest.mark.parametrize("text", ["no base64!", 3, None, "é"])
def test_images_in_json_are_base64(text):
    with pytest.raises(wire.ContentError, match="image 0 is not base64 text"):
        wire.decode_json({"prompts": ["p"], "images": [text]}, wire.Limits())


def test_the_wire_and_the_worker_need_the_standard_library_and_pillow_alone():
    code = "import sys, json, rewards.remote.wire, rewards.remote.worker; print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    start = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    at_start = {name.split(".")[0] for name in start.stdout.split()}
    other = set(json.loads(printed)) - set(sys.stdlib_module_names) - at_start
    assert {name for name in other if not name.startswith("_")} <= {"rewards", "PIL", "defusedxml"}
