"""The one way in which an encoded image becomes pixels: upright, in sRGB, without transparency, 8 bits a channel."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps

#: Formats that are read, whatever a file's ending says. Others of Pillow's start programs (EPS) or are no pictures.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA")
#: A PNG without any of these bytes says nothing of its orientation.
ORIENTED_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
#: Version of what :func:`upright_rgb` makes of a file; goes up when it makes something else, so that caches know.
OPENED = 2
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # the tag's values that swap width and height
_COLOURS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of an ICC profile, and the mode that it is for


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and convert it to RGB.

    Its orientation (EXIF, XMP, or a raw profile in a PNG) is applied, its colours are converted from the embedded ICC profile
    to sRGB, 16 bits a channel are scaled to 8 instead of clipped, and transparency is put on white. Of several frames it is
    the first.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = _to_srgb(image, image.convert("RGB")).convert("RGBA")
        opaque.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    return _to_srgb(image, image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that :func:`upright_rgb` gives, of an image that need not be decoded."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow gives the size of the turned image, and the tag as it was
        return width, height
    return (height, width) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (width, height)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scale numbers of more than 8 bits, or from 0 to 1, to 0 to 255."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        values = values * 255 if values.size and values.max() <= 1 else values
    else:
        values = values.astype(np.int64)
        values = values // 257 if values.size and values.max() > 255 else values
    return np.clip(values, 0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image, colours: Image.Image) -> Image.Image:
    """Convert ``colours``, of the embedded profile of ``image``, to RGB in sRGB; as viewers do, a broken one is ignored."""
    profile = image.info.get("icc_profile")
    transform, mode = _transform(profile) if isinstance(profile, bytes) and profile else (None, "RGB")
    if transform is None:
        return colours.convert("RGB")
    converted = ImageCms.applyTransform(colours.convert(mode), transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """Return what converts from an ICC profile to sRGB, and the mode it takes; None of sRGB itself, or of a broken one."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _COLOURS.get(opened.profile.xcolor_space)
        if mode is None or "sRGB" in (opened.profile.profile_description or ""):
            return None, "RGB"
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB"), mode
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None, "RGB"
