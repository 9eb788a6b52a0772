"""Write the model card of the tiny model."""

from __future__ import annotations

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# tiny Qwen-Image

A real Qwen-Image with 3.6 M parameters (denoiser 2.5 M, VAE 0.7 M, text encoder 0.4 M) that paints 64 x 64
pictures of a small world. It has the classes and the folder layout of `Qwen/Qwen-Image`, so whatever runs
on it runs on the large one: tests, demos and experiments in post-training, on a laptop and offline. It
knows nothing but its world and was trained on nothing but pictures that its own recipe paints.

```python
import torch
from diffusers import QwenImagePipeline

pipeline = QwenImagePipeline.from_pretrained("align/tiny/checkpoint", dtype=torch.float32)
pipeline("two red circles", height=64, width=64, num_inference_steps=6, true_cfg_scale=1.0).images[0]
```

It understands, with eight colours (red, green, blue, yellow, purple, cyan, white, black) and four shapes
(circle, square, triangle, cross):

- counts from one to three: "three red circles on a blue background";
- pairs: "a red circle left of a green square on a blue background" (left of, right of, above, below);
- words of three letters out of ACEFIJLOPSTY: "the word CAT in red on white";
- open prompts: any part of a count may be left out ("two squares", "red objects on a blue background");
  what is not said is drawn at random.

Other prompts give pictures, but no sense. One combination in five was held out of the training.

## Figures

Held-out prompts, 6 ODE steps, no guidance, mean ± standard error of the rewards in `rewards/shapes.py`:
*following* grades every part that was said, *exact* is 1 only where all of it is right, *letters* is the
letter accuracy of the word.

<!-- figures -->

The text encoder is random (it only has to keep words apart), its vision tower is a stub, and the VAE's taps
for earlier video frames are zero: this model edits no image and makes no video.
"""


def model_card(figures: dict, command: str) -> str:
    """Write the README.md of the checkpoint.

    `figures` are those that `align.tiny.build.build` returns, `command` is the command line that built it.
    """

    def with_error(figure: list[float] | None) -> str:
        return "" if figure is None else f"{figure[0]:.3f} ± {figure[1]:.3f}"

    table = [
        "| held-out prompts | following | exact | letters | VAE alone: exact | VAE: PSNR |",
        "|---|---|---|---|---|---|",
    ]
    for kind, base in figures["base"].items():
        vae = figures["vae"].get(kind, {})  # empty for "open", which has no pictures of its own
        psnr = f"{vae['psnr_db']:.1f} dB" if vae else ""
        cells = [base["following"], base["exact"], base.get("letters"), vae.get("exact")]
        table.append(f"| {kind} | {' | '.join(map(with_error, cells))} | {psnr} |")
    background = figures["background_set"]
    minutes = (
        f"{figures['wall_s'] / 60:.0f} min ({figures['cpu_s'] / 60:.0f} min of CPU, {figures['threads']} thread"
        f"{'s' if figures['threads'] > 1 else ''})"
    )
    table += [
        "",
        f"The prompt set 'background' (background unsaid): exact {with_error(background['exact'])}, "
        f"red or yellow {background['warm_share']:.3f}, entropy of the background {background['background_entropy']:.3f} "
        "of its maximum.",
        "",
        f"Made by `{command}` in {minutes}.",
    ]
    return _CARD.replace("<!-- figures -->", "\n".join(table))
