"""Build the tiny Qwen-Image from nothing: half an hour on one CPU core, seeded, offline.

    python -m align.tiny.build --output DIR

writes a folder that stock `QwenImagePipeline.from_pretrained` loads, with its model card and the measured
figures. The prompt sets are written by `python -m align.tiny.world`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from align.tiny import denoiser as mmdit
from align.tiny import text, vae, world
from align.tiny.card import model_card
from rewards import shapes

PICTURED = ("count", "pair", "word")  # an "open" prompt is shown by the picture of a count
# Of the kinds among the denoiser's captions. Open prompts, which have many right answers, are by far the
# hardest; words would be learned perfectly with a larger share, and nothing would be left for reinforcement
# learning to gain.
SHARES = {"open": 0.8, "count": 0.1, "pair": 0.06, "word": 0.04}
SAMPLING_STEPS = 6  # of the ODE, without guidance: how all figures are measured


def paint(
    kinds: tuple[str, ...], number: int, split: str, seed: int
) -> dict[str, list[tuple[dict, dict, Image.Image]]]:
    """`number` triples of each kind: what is said, what is painted, the picture."""
    rng = random.Random(f"{split} {seed}")
    drawn = {kind: [world.sample(rng, kind, split) for _ in range(number)] for kind in kinds}
    return {kind: [(said, spec, world.render(spec, rng)) for said, spec in pairs] for kind, pairs in drawn.items()}


def normalise(autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Latents with mean 0 and std 1 in each channel; registers the constants where the pipeline looks for
    them.

    Channels that the VAE does not use (std near 0) are kept small instead of being blown up into noise that
    must be learned.
    """
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp_min(0.3 * std.max())
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def mean_and_error(values: Sequence[float | None]) -> list[float]:
    """The mean of the values that are not None, and its standard error."""
    scores = [value for value in values if value is not None]
    return [round(float(np.mean(scores)), 4), round(float(np.std(scores) / math.sqrt(len(scores))), 4)]


def grade(images: list[Image.Image], specs: list[dict]) -> dict[str, list[float]]:
    """Mean and standard error of the rewards that apply."""
    prompts = [world.sentence(spec) for spec in specs]
    figures = {
        "following": mean_and_error(shapes.shapes_following(images, prompts, spec=specs)),
        "exact": mean_and_error(shapes.shapes_exact(images, prompts, spec=specs)),
    }
    letters = [score for score in shapes.shapes_word(images, prompts, spec=specs) if score is not None]
    return figures | ({"letters": mean_and_error(letters)} if letters else {})


def draw(pipeline: QwenImagePipeline, prompts: list[str], seed: int, batch_size: int = 64) -> list[Image.Image]:
    """Sample one image for each prompt with the stock pipeline."""
    generator, images = torch.Generator().manual_seed(seed), []
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        images += pipeline(
            prompts[start : start + batch_size],
            height=shapes.SIZE,
            width=shapes.SIZE,
            num_inference_steps=SAMPLING_STEPS,
            true_cfg_scale=1.0,
            generator=generator,
        ).images
    return images


def grade_vae(autoencoder, number: int, seed: int) -> dict:
    """PSNR on held-out pictures, and the rewards of their reconstructions: what no denoiser can exceed."""
    figures = {}
    for kind, triples in paint(PICTURED, number, "held-out", seed).items():
        pictures = [picture for _, _, picture in triples]
        restored = vae.decode(autoencoder, vae.encode(autoencoder, pictures))
        grades = grade(restored, [said for said, _, _ in triples])
        figures[kind] = {"psnr_db": round(vae.psnr(pictures, restored), 2), **grades}
    return figures


def grade_base(pipeline: QwenImagePipeline, number: int, seed: int) -> dict:
    """Rewards on held-out prompts of each kind."""
    figures, rng = {}, random.Random(seed)
    for kind in world.PROMPT_KINDS:
        specs = [world.sample(rng, kind, "held-out")[0] for _ in range(number)]
        figures[kind] = grade(draw(pipeline, [world.sentence(spec) for spec in specs], seed), specs)
    return figures


def grade_open(pipeline: QwenImagePipeline, images_per_prompt: int, seed: int) -> dict:
    """The held-out prompts of the set "background": what is said is followed, what is not said stays varied."""
    rows = list(world.prompt_rows("background", "held-out")) * images_per_prompt
    specs = [row["spec"] for row in rows]
    images = draw(pipeline, [row["prompt"] for row in rows], seed)
    shown = Counter(shapes.measure(image).background for image in images)
    shares = {color: round(shown[color] / len(images), 3) for color in shapes.COLORS}
    entropy = -sum(share * math.log(share) for share in shares.values() if share) / math.log(len(shares))
    warm = shapes.warm_background(images, [row["prompt"] for row in rows], spec=specs)
    return grade(images, specs) | {
        "warm_and_exact": mean_and_error(warm),
        "warm_share": round(shares["red"] + shares["yellow"], 3),
        "background_shares": shares,
        "background_entropy": round(entropy, 3),
    }


def cpu_seconds() -> float:
    """CPU time of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def build(output: Path, seed: int, vae_steps: int, steps: int, pictures: int, graded: int) -> dict:
    """Make everything, save it in `output`, and return the figures."""
    started, cpu_before = time.time(), cpu_seconds()
    painted = paint(PICTURED, pictures, "train", seed)
    half_built = output / "trained_vae"  # a build that was interrupted goes on from here
    spent = half_built / "spent.json"
    if spent.exists():
        autoencoder = vae.build_vae()
        autoencoder.load_state_dict(load_file(half_built / "vae.safetensors"))
        before = json.loads(spent.read_text())
        started, cpu_before = started - before["wall_s"], cpu_before - before["cpu_s"]
    else:
        torch.manual_seed(seed)  # for what diffusers initialises by itself
        autoencoder = vae.build_vae()
        vae.train_vae(autoencoder, [p for triples in painted.values() for _, _, p in triples], vae_steps, seed=seed)
        half_built.mkdir(parents=True, exist_ok=True)
        save_file(autoencoder.state_dict(), half_built / "vae.safetensors")
        spent.write_text(json.dumps({"wall_s": time.time() - started, "cpu_s": cpu_seconds() - cpu_before}))
    autoencoder.eval().requires_grad_(False)
    figures: dict = {"vae": grade_vae(autoencoder, graded, seed)}
    print(json.dumps(figures), flush=True)

    latents = {kind: vae.encode(autoencoder, [p for _, _, p in triples]) for kind, triples in painted.items()}
    tokens = mmdit.pack(normalise(autoencoder, torch.cat(list(latents.values())))).split(pictures)
    tokenizer = text.build_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=mmdit.build_scheduler(),
        vae=autoencoder,
        text_encoder=text.build_text_encoder(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=mmdit.build_denoiser(seed),
    )
    specs = {kind: [spec for _, spec, _ in triples] for kind, triples in painted.items()}
    data = mmdit.Captioned(specs, dict(zip(painted, tokens, strict=True)), SHARES, seed)

    def report(step: int) -> None:
        print(f"\n{step} steps: {json.dumps(grade_base(pipeline, graded // 4, seed))}", flush=True)

    mmdit.train_denoiser(pipeline.transformer, mmdit.Conditions(pipeline), data, steps, seed=seed, report=report)
    pipeline.to(torch.bfloat16).save_pretrained(output)
    # Asked for no dtype, diffusers loads its parts in float32 and transformers in what the config says: let it be one.
    config = output / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    shutil.rmtree(half_built)

    # The figures are those of what was saved: its weights are rounded to bfloat16.
    pipeline = QwenImagePipeline.from_pretrained(output, dtype=torch.float32)
    figures["base"] = grade_base(pipeline, graded, seed)
    figures["background_set"] = grade_open(pipeline, images_per_prompt=8, seed=seed)
    figures |= {
        "sampling": f"{SAMPLING_STEPS} ODE steps, no guidance",
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    figures |= {"cpu_s": round(cpu_seconds() - cpu_before), "wall_s": round(time.time() - started)}
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the tiny Qwen-Image.")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the checkpoint, made anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=5500, help="of the denoiser")
    parser.add_argument("--pictures", type=int, default=6000, help="training pictures of each kind")
    parser.add_argument(
        "--graded", type=int, default=256, help="held-out prompts of each kind that the figures rest on"
    )
    parser.add_argument("--threads", type=int, default=1, help="more are slower where other processes are busy")
    args = parser.parse_args()
    if (args.output / "model_index.json").exists():
        parser.error(f"{args.output} holds a model already: nothing is overwritten")
    torch.set_num_threads(args.threads)
    figures = build(args.output, args.seed, args.vae_steps, args.steps, args.pictures, args.graded)
    command = (
        f"python -m align.tiny.build --output DIR --seed {args.seed} --steps {args.steps} --vae-steps {args.vae_steps}"
    )
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (args.output / "README.md").write_text(model_card(figures, command))
    figures["bytes"] = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
