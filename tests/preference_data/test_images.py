"""Images that are not read yet: what they are made of, what opening them gives, and what is said of broken ones."""

import contextlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image
from preference_files import encoded, noise, picture

from preference_data.images import BadRow, ImageSource


def of(value, folder=None):
    return ImageSource.of(value, "a.parquet, row 3, column 'chosen'", folder)


def as_bytes(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    return tmp_path


# --- What an image may be given as ---


def test_every_form_gives_the_same_pixels(saved):
    forms = [
        of("a.png", saved),
        of(saved / "a.png"),
        of(str(saved / "a.png"), saved / "elsewhere"),  # an absolute path stays
        of(encoded(1)),
        of(bytearray(encoded(1))),
        of({"bytes": encoded(1), "path": "gone.png"}),
        of({"bytes": None, "path": "a.png"}, saved),
        of(picture(1)),
    ]
    for form in forms:
        assert form.open().mode == "RGB" and form.open().tobytes() == picture(1).tobytes()
        assert form.size() == (8, 6)
        assert Image.open(io.BytesIO(form.read())).tobytes() == picture(1).tobytes()


def test_a_source_is_passed_on():
    source = of(encoded(1))
    assert of(source) is source


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "there is no image"),
        ("", "there is no image"),
        (b"", "the image has no bytes"),
        ({"bytes": None, "path": None}, "there is no image"),
        ({"bytes": b"", "path": "a.png"}, "the image has no bytes"),
        ("https://example.org/a.png", "is a URL"),
        (3, "expected an image .* found int"),
        ({"url": "a.png"}, "found dict"),
        (["a.png"], "found list"),
    ],
)
def test_what_is_no_image_is_said_with_its_place(value, problem):
    with pytest.raises(BadRow, match=rf"^a\.parquet, row 3, column 'chosen': .*{problem}"):
        of(value)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    source = of("late.png", tmp_path)
    (tmp_path / "late.png").write_bytes(encoded(2))
    assert source.open().tobytes() == picture(2).tobytes()


# --- What opening gives ---


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    marked = picture(1, (8, 6))
    marked.putpixel((0, 0), (255, 255, 255))
    for kind in ("JPEG", "PNG", "WEBP"):
        source = of(as_bytes(marked, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
        assert source.open().size == source.size() == (6, 8), kind
    assert of(as_bytes(marked, "PNG", exif=exif)).open().getpixel((5, 0)) == (255, 255, 255)


def test_transparency_stands_on_white():
    for image in (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("LA", (4, 4), (0, 0))):
        assert of(image).open().getpixel((1, 1)) == (255, 255, 255)
        assert of(as_bytes(image)).open().getpixel((1, 1)) == (255, 255, 255)
    half = of(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).open().getpixel((0, 0))
    assert all(abs(value - 127) <= 1 for value in half)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 1), 1)
    opened = of(as_bytes(palette, transparency=0)).open()
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 1)) == (40, 50, 60)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [of(as_bytes(deep)).open().getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr", "P"])
def test_every_mode_becomes_rgb(mode):
    assert of(picture(1).convert(mode)).open().mode == "RGB"


# --- Broken images ---


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_an_image_cut_short_is_broken(kind, tmp_path):
    content = as_bytes(noise(), kind)
    for length in (len(content) // 2, 20, 3):
        (tmp_path / "a.bin").write_bytes(content[:length])
        for source in (of(content[:length]), of("a.bin", tmp_path)):
            with pytest.raises(BadRow, match=r"^a\.parquet, row 3, column 'chosen': .*broken"):
                source.open()


def test_what_is_no_image_at_all_is_broken(tmp_path):
    (tmp_path / "a.png").write_text("<html>404</html>")
    for attempt in (of("a.png", tmp_path).open, of("a.png", tmp_path).size, of(b"text").size):
        with pytest.raises(BadRow, match="is broken: cannot identify"):
            attempt()


def test_a_missing_file_is_named(tmp_path):
    source = of("gone.png", tmp_path)
    for attempt in (source.check, source.read, source.open, source.size, source.digest):
        with pytest.raises(BadRow, match=r"row 3, column 'chosen': the image .*gone\.png does not exist"):
            attempt()


def test_an_empty_file_or_a_folder_is_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(BadRow, match=r"empty\.png has no bytes"):
        of("empty.png", tmp_path).check()
    with pytest.raises(BadRow, match="is not a file"):
        of(tmp_path).check()
    with pytest.raises(BadRow, match="cannot be read"):
        of("a\0b.png", tmp_path).check()


def test_a_decompression_bomb_is_an_error_even_where_pillow_only_warns(monkeypatch):
    content = encoded(1, size=(40, 30))
    for limit in (1000, 500):  # pixels; Pillow warns above it and refuses above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for attempt in (of(content).open, of(content).size):
            with pytest.raises(BadRow), pytest.warns() if limit == 1000 else contextlib.nullcontext():
                attempt()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert of(content).open().size == (40, 30)


def test_the_error_survives_the_way_out_of_a_worker_process():
    error = pickle.loads(pickle.dumps(BadRow("a, row 1", "broken")))
    assert str(error) == "a, row 1: broken" and (error.where, error.problem) == ("a, row 1", "broken")


# --- What tells images apart ---


def test_a_message_sends_no_control_characters_of_the_data_to_the_terminal():
    """A name in a row could clear the screen or forge a line, and one with half a character could not be printed."""
    error = BadRow("a\x1b[2J.jsonl, row 1", "the image \x9b31m\nforged\u202e\udcff.png does not exist")
    assert str(error) == "a\\x1b[2J.jsonl, row 1: the image \\x9b31m\\nforged\\u202e\\udcff.png does not exist"
    assert str(BadRow("Fotos 日本\u3000é.jsonl", "x")) == "Fotos 日本\u3000é.jsonl: x"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_digest_is_of_the_bytes(saved):
    assert of("a.png", saved).digest() == of(encoded(1)).digest() != of(encoded(2)).digest()
    assert of(encoded(1)).digest() != of(encoded(1, "BMP")).digest()
    assert of(picture(1)).digest() == of(picture(1)).digest() != of(picture(2)).digest()
    assert of(Image.new("L", (2, 3))).digest() != of(Image.new("L", (3, 2))).digest()


def test_same_as_agrees_with_the_digest(saved, tmp_path):
    (tmp_path / "copy.png").write_bytes(encoded(1))
    (tmp_path / "other.png").write_bytes(encoded(2))
    sources = [of(name, saved) for name in ("a.png", "copy.png", "other.png")]
    sources += [of(encoded(1)), of(encoded(2)), of(picture(1)), of(picture(1))]
    for one in sources:
        for other in sources:
            assert one.same_as(other) == (one.digest() == other.digest())
    with pytest.raises(BadRow, match="does not exist"):
        sources[0].same_as(of("gone.png", saved))
