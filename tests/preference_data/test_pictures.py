"""What is trained on is what a viewer shows: upright, in its colours, with nothing behind what is transparent."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from preference_data.images import BadRow, ImageSource

#: A landscape, red on the left and blue on the right.
PICTURE = Image.new("RGB", (96, 32), "red")
PICTURE.paste("blue", (48, 0, 96, 32))
#: The EXIF values, and what a viewer does with them.
TURNED = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def source(content: bytes) -> ImageSource:
    return ImageSource("here", data=content)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def text_chunk(where: str, orientation: int) -> PngInfo:
    info = PngInfo()
    if where == "xmp":
        info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    else:
        raw = b"Exif\0\0" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")
        info.add_text("Raw profile type exif", f"\nexif\n{len(raw):8d}\n{raw.hex()}\n", zip=where == "compressed")
    return info


def after_the_pixels(png: bytes) -> bytes:
    """A PNG with its text chunks behind its pixels, where some programs write them."""
    chunks, place = [], 8
    while place < len(png):
        size = struct.unpack(">I", png[place : place + 4])[0] + 12
        chunks.append(png[place : place + size])
        place += size
    text = [chunk for chunk in chunks if chunk[4:8] in (b"iTXt", b"tEXt", b"zTXt", b"eXIf")]
    return png[:8] + b"".join([*(c for c in chunks[:-1] if c not in text), *text, chunks[-1]])


WAYS = {
    "jpeg": lambda n: saved(PICTURE, "JPEG", exif=exif(n), quality=100),
    "webp": lambda n: saved(PICTURE, "WEBP", exif=exif(n), lossless=True),
    "tiff": lambda n: saved(PICTURE, "TIFF", tiffinfo={0x0112: n}),
    "tiff, xmp": lambda n: saved(PICTURE, "TIFF", tiffinfo={700: f'<x tiff:Orientation="{n}"/>'.encode()}),
    "tiff, compressed": lambda n: saved(PICTURE, "TIFF", tiffinfo={0x0112: n}, compression="tiff_lzw"),
    "avif": lambda n: saved(PICTURE, "AVIF", exif=exif(n), quality=100),
    "png": lambda n: saved(PICTURE, "PNG", exif=exif(n)),
    "png, late": lambda n: after_the_pixels(saved(PICTURE, "PNG", exif=exif(n))),
    "png, xmp": lambda n: saved(PICTURE, "PNG", pnginfo=text_chunk("xmp", n)),
    "png, xmp, late": lambda n: after_the_pixels(saved(PICTURE, "PNG", pnginfo=text_chunk("xmp", n))),
    "png, raw profile": lambda n: saved(PICTURE, "PNG", pnginfo=text_chunk("raw", n)),
    "png, compressed raw profile, late": lambda n: after_the_pixels(
        saved(PICTURE, "PNG", pnginfo=text_chunk("compressed", n))
    ),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_upright_and_its_size_is_known_from_the_header(way, orientation):
    """Else a portrait goes to a landscape bucket, and three quarters of it are cropped away."""
    read = source(WAYS[way](orientation))
    expected = PICTURE if TURNED[orientation] is None else PICTURE.transpose(TURNED[orientation])
    assert read.size() == read.open().size == expected.size
    assert ImageChops.difference(read.open(), expected).getextrema()[0][1] < 60


# --- Colours ---


def icc_profile(primaries: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """A matrix profile: the XYZ (D50) of red, green and blue, and one gamma."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    tags = {
        name: b"XYZ \0\0\0\0" + b"".join(map(fixed, xyz))
        for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (*primaries, (0.9642, 1.0, 0.8249)), strict=True)
    }
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 78 + b"\0"
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    table, body, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", 0, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + b"\0" * 12 + b"acsp"
    header = header + b"\0" * (68 - len(header)) + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    whole = header + b"\0" * (128 - len(header)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


#: Adobe RGB (1998), adapted to D50, and its gamma.
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
ADOBE_GAMMA = 563 / 256
GREY_PROFILE = icc_profile(ADOBE, ADOBE_GAMMA).replace(b"mntrRGB ", b"mntrGRAY").replace(b"rTRC", b"kTRC")
#: XYZ (D50) to linear sRGB (Bruce Lindbloom).
TO_SRGB = np.array(
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
)


def in_srgb(colour) -> np.ndarray:
    """What a viewer shows of an Adobe RGB colour, by the formulas of both."""
    xyz = np.array(ADOBE).T @ (np.array(colour) / 255) ** ADOBE_GAMMA
    linear = np.clip(TO_SRGB @ xyz, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("colour", [(100, 200, 100), (200, 60, 60), (128, 128, 128), (255, 255, 255)])
def test_colours_are_converted_from_the_embedded_profile(kind, colour):
    """Adobe RGB (100, 200, 100) is shown as (0, 201, 92); read as it stands it trains a paler green."""
    settings = {"quality": 100} if kind in ("JPEG", "WEBP") else {}
    content = saved(Image.new("RGB", (16, 16), colour), kind, icc_profile=icc_profile(ADOBE, ADOBE_GAMMA), **settings)
    assert np.abs(np.array(source(content).open().getpixel((8, 8))) - in_srgb(colour)).max() <= (4 if settings else 2)


def test_transparency_lies_on_white_after_the_colours_were_converted():
    image = Image.new("RGBA", (4, 4), (100, 200, 100, 255))
    image.putpixel((0, 0), (100, 200, 100, 0))
    opened = source(saved(image, "PNG", icc_profile=icc_profile(ADOBE, ADOBE_GAMMA))).open()
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.array(opened.getpixel((2, 2))) - in_srgb((100, 200, 100))).max() <= 2


@pytest.mark.parametrize("profile", [b"broken", b"\0" * 200, icc_profile(ADOBE, ADOBE_GAMMA)[:150]])
def test_a_broken_profile_leaves_the_colours_as_they_are(profile):
    assert source(saved(Image.new("RGB", (4, 4), "teal"), "PNG", icc_profile=profile)).open().getpixel((0, 0)) == (
        0,
        128,
        128,
    )


def test_a_profile_of_other_colours_than_the_image_has_is_no_harm():
    grey = Image.new("L", (4, 4), 100)
    assert source(saved(grey, "PNG", icc_profile=icc_profile(ADOBE, ADOBE_GAMMA))).open().getpixel((0, 0)) == (100,) * 3
    assert source(saved(PICTURE, "PNG", icc_profile=GREY_PROFILE)).open().getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.full((4, 4), 40000, np.uint16)), 155),  # 40000 / 257
        (Image.fromarray(np.full((4, 4), 200, np.uint16)), 0),  # as dark as it is, and not 200 of 255
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), 127),
        (Image.fromarray(np.full((4, 4), 200.0, np.float32)), 200),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), 0),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 100)), 155),
        (Image.new("1", (4, 4), 1), 255),
        (Image.new("LA", (4, 4), (0, 127)), 128),
        (Image.new("P", (4, 4), 0), 0),
    ],
    ids=["16 bits", "dark 16 bits", "0 to 1", "float", "nan", "cmyk", "bilevel", "grey with alpha", "palette"],
)
def test_every_mode_becomes_rgb(image, expected):
    opened = ImageSource("here", picture=image).open()
    assert opened.mode == "RGB" and opened.getpixel((1, 1)) == (expected,) * 3


# --- Formats ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA"])
def test_every_usual_format_is_read_under_any_name(kind, tmp_path):
    (tmp_path / "picture.png").write_bytes(saved(PICTURE, kind))
    read = ImageSource("here", path=tmp_path / "picture.png")
    read.check_header()
    assert read.size() == read.open().size == (96, 32)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PCX", "SGI", "DDS", "XBM"])
def test_what_starts_a_program_or_is_no_picture_is_not_opened_under_any_name(kind):
    """An EPS called a.png started Ghostscript."""
    image = PICTURE.convert("1") if kind == "XBM" else PICTURE
    for look in ("open", "size", "check_header"):
        with pytest.raises(BadRow, match="here: the image is broken: cannot identify it as PNG, JPEG, "):
            getattr(source(saved(image, kind)), look)()
