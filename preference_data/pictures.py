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
#: Colours of an ICC profile, and the modes that it is for.
_COLOURS = {"RGB ": ("RGB", "RGBA", "P", "PA"), "GRAY": ("L", "LA", "1"), "CMYK": ("CMYK",)}


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and convert it to RGB.

    Its orientation (EXIF, XMP, or a raw profile in a PNG) is applied, its colours are converted from the embedded ICC profile
    to sRGB, 16 bits a channel are scaled to 8 instead of clipped, and transparency is put on white. Of several frames it is
    the first.
    """
    image.load()
    image, mode = ImageOps.exif_transpose(image), image.mode
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), sixteen=mode.startswith("I;16"))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = _to_srgb(image, image.convert("L" if mode == "LA" else "RGB"), mode).convert("RGBA")
        opaque.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    return _to_srgb(image, image, mode)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that :func:`upright_rgb` gives, of an image that need not be decoded."""
    width, height = image.size
    if image.format == "TIFF" and _ORIENTATION in getattr(
        image, "tag_v2", {}
    ):  # Pillow gives the size of the turned image
        return width, height
    return (height, width) if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (width, height)


def _eight_bits(values: np.ndarray, sixteen: bool) -> np.ndarray:
    """Scale numbers of 16 bits, or of more than 8 where that is not known, or from 0 to 1, to 0 to 255."""
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        values = values * 255 if values.size and values.max() <= 1 else values
    else:
        values = values.astype(np.int64)
        values = values // 257 if sixteen or (values.size and values.max() > 255) else values
    return np.clip(values, 0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image, colours: Image.Image, mode: str) -> Image.Image:
    """Convert ``colours``, of the embedded profile of ``image``, to RGB in sRGB.

    As viewers do, a profile that is broken, or not for images of this ``mode``, is ignored.
    """
    profile = image.info.get("icc_profile")
    transform, modes = _transform(profile) if isinstance(profile, bytes) and profile else (None, ())
    if transform is None or mode not in modes:
        return colours.convert("RGB")
    converted = ImageCms.applyTransform(colours.convert(modes[0]), transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, tuple[str, ...]]:
    """Return what converts from an ICC profile to sRGB, and the modes it is for; None of sRGB itself, or of a broken one."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        modes = _COLOURS.get(opened.profile.xcolor_space, ())
        if not modes or "sRGB" in (opened.profile.profile_description or ""):
            return None, ()
        return ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), modes[0], "RGB"), modes
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None, ()
