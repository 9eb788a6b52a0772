"""Compare the speed at which align.models.qwen_vae and stock diffusers decode single images.

    python tests/bench/vae.py

The table has the tiny VAE, and one of Qwen-Image's size with random weights. It shows seconds an image, the least of
several runs that take turns, and the largest difference of the two results relative to the largest value.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from diffusers.models import AutoencoderKLQwenImage

from align.models.qwen_vae import speed_up_images
from align.tiny import CHECKPOINT


def seconds(work: Callable[[], torch.Tensor]) -> float:
    """Return the wall time of one call, including the accelerator's work."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def row(name: str, vae: AutoencoderKLQwenImage, images: int, size: int, repeats: int) -> str:
    """Measure, and format a line of the table."""
    fast_vae = copy.deepcopy(vae)
    speed_up_images(fast_vae.decoder)
    shape = (images, vae.config.z_dim, 1, size // 8, size // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(vae.device, vae.dtype)

    def stock() -> torch.Tensor:
        return vae.decode(latents).sample

    def fast() -> torch.Tensor:
        return fast_vae.decode(latents).sample

    expected, result = stock(), fast()
    difference = ((expected - result).abs().max() / expected.abs().max()).item()
    times = [(seconds(stock), seconds(fast)) for _ in range(repeats)]
    stock_time, fast_time = (min(times_of_way) / images for times_of_way in zip(*times, strict=True))
    return f"| {name} | {stock_time:.4f} | {fast_time:.4f} | {stock_time / fast_time:.1f} | {difference:.0e} |"


def main() -> None:
    """Measure both VAEs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="pixels along each side of the large VAE's images")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    large = AutoencoderKLQwenImage().eval().to(device)
    tiny = AutoencoderKLQwenImage.from_pretrained(CHECKPOINT / "vae").eval().to(device)
    print(f"{device}, {torch.get_num_threads()} threads\n")
    print("| VAE | stock, s an image | one frame, s an image | times as fast | apart |\n|---|---|---|---|---|")
    print(row("tiny, 64 pixels", tiny, 32, 64, args.repeats))
    print(row(f"Qwen-Image's size, {args.size} pixels", large, 1, args.size, args.repeats))


if __name__ == "__main__":
    main()
