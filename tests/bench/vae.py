"""How much faster single images are decoded with align.models.qwen_vae, side by side with diffusers' own.

    python tests/bench/vae.py

On the tiny VAE and on one of Qwen-Image's size with random weights: seconds an image, the least of several runs taken in
turn, and how far the two results lie apart, as a share of the largest value.
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
    """Wall time of one run, the accelerator's work included."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def row(name: str, vae: AutoencoderKLQwenImage, images: int, size: int, repeats: int) -> str:
    """One line of the table."""
    ours = copy.deepcopy(vae)
    speed_up_images(ours.decoder)
    shape = (images, vae.config.z_dim, 1, size // 8, size // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(vae.device, vae.dtype)

    def stock() -> torch.Tensor:
        return vae.decode(latents).sample

    def fast() -> torch.Tensor:
        return ours.decode(latents).sample

    a, b = stock(), fast()
    apart = ((a - b).abs().max() / a.abs().max()).item()
    times = [(seconds(stock), seconds(fast)) for _ in range(repeats)]
    slow, quick = (min(each) / images for each in zip(*times, strict=True))
    return f"| {name} | {slow:.4f} | {quick:.4f} | {slow / quick:.1f} | {apart:.0e} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="of the large VAE's images, in pixels")
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
