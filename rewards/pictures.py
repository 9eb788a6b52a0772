"""Converting images to what rewards need: RGB, and not larger than useful."""

from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, with transparency put on white."""
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def at_most(image: Image.Image, side: int) -> Image.Image:
    """Shrink an image whose longest side is above `side` pixels; its proportions are kept."""
    longest = max(image.size)
    if longest <= side:
        return image
    size = [max(1, round(length * side / longest)) for length in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
