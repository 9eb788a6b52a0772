"""Build the tiny Qwen-Image from nothing, in half an hour on one CPU core, seeded and offline.

    python -m align.tiny.build --output DIR

This writes a folder that the stock `QwenImagePipeline.from_pretrained` loads, with a model card and the measured
figures. `python -m align.tiny.world` writes the prompt sets.
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

PICTURE_KINDS = ("count", "pair", "word")  # an "open" prompt is shown by the picture of a count
# The share of each kind among the denoiser's captions. Open prompts have many right answers and are by far the
# hardest. With a larger share, words would be learned perfectly, and reinforcement learning could gain nothing.
SHARES = {"open": 0.8, "count": 0.1, "pair": 0.06, "word": 0.04}
SAMPLING_STEPS = 6  # steps of the ODE, without guidance, with which all figures are measured


def paint(
    kinds: tuple[str, ...], number: int, split: str, seed: int
) -> dict[str, list[tuple[dict, dict, Image.Image]]]:
    """Paint `number` pictures of each kind, seeded.

    Returns, by kind, triples of the prompt's spec, the picture's spec and the picture.
    """
    rng = random.Random(f"{split} {seed}")
    specs = {kind: [world.sample(rng, kind, split) for _ in range(number)] for kind in kinds}
    return {
        kind: [(prompt_spec, picture_spec, world.render(picture_spec, rng)) for prompt_spec, picture_spec in pairs]
        for kind, pairs in specs.items()
    }


def normalise(autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Scale latents to mean 0 and std 1 in each channel, and register the constants in the VAE's config.

    `latents` and the result are (batch, CHANNELS, 1, height, width). Channels that the VAE does not use (std near 0)
    stay small: scaled to std 1 they would be noise that the denoiser had to learn.
    """
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    std = std.clamp_min(0.3 * std.max())
    autoencoder.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def mean_and_error(values: Sequence[float | None]) -> list[float]:
    """Return the mean of the values that are not None, and its standard error."""
    scores = [value for value in values if value is not None]
    return [round(float(np.mean(scores)), 4), round(float(np.std(scores) / math.sqrt(len(scores))), 4)]


def grade(images: list[Image.Image], specs: list[dict]) -> dict[str, list[float]]:
    """Return mean and standard error of each reward that applies to the specs."""
    prompts = [world.sentence(spec) for spec in specs]
    figures = {
        "following": mean_and_error(shapes.shapes_following(images, prompts, spec=specs)),
        "exact": mean_and_error(shapes.shapes_exact(images, prompts, spec=specs)),
    }
    letters = [score for score in shapes.shapes_word(images, prompts, spec=specs) if score is not None]
    return figures | ({"letters": mean_and_error(letters)} if letters else {})


def draw(pipeline: QwenImagePipeline, prompts: list[str], seed: int, batch_size: int = 64) -> list[Image.Image]:
    """Sample one image for each prompt with the stock pipeline, seeded."""
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
    """Measure the PSNR on held-out pictures, and the rewards of their reconstructions.

    No denoiser can exceed these rewards.
    """
    figures = {}
    for kind, triples in paint(PICTURE_KINDS, number, "held-out", seed).items():
        pictures = [picture for _, _, picture in triples]
        reconstructions = vae.decode(autoencoder, vae.encode(autoencoder, pictures))
        grades = grade(reconstructions, [prompt_spec for prompt_spec, _, _ in triples])
        figures[kind] = {"psnr_db": round(vae.psnr(pictures, reconstructions), 2), **grades}
    return figures


def grade_base(pipeline: QwenImagePipeline, number: int, seed: int) -> dict:
    """Measure the rewards on `number` held-out prompts of each kind."""
    figures, rng = {}, random.Random(seed)
    for kind in world.PROMPT_KINDS:
        specs = [world.sample(rng, kind, "held-out")[0] for _ in range(number)]
        figures[kind] = grade(draw(pipeline, [world.sentence(spec) for spec in specs], seed), specs)
    return figures


def grade_open(pipeline: QwenImagePipeline, images_per_prompt: int, seed: int) -> dict:
    """Measure the rewards and the variety on the held-out prompts of the set "background".

    These prompts leave out the background, so its colour should vary between the images.
    """
    rows = list(world.prompt_rows("background", "held-out")) * images_per_prompt
    specs = [row["spec"] for row in rows]
    images = draw(pipeline, [row["prompt"] for row in rows], seed)
    counts = Counter(shapes.measure(image).background for image in images)
    shares = {color: round(counts[color] / len(images), 3) for color in shapes.COLORS}
    entropy = -sum(share * math.log(share) for share in shares.values() if share) / math.log(len(shares))
    warm = shapes.warm_background(images, [row["prompt"] for row in rows], spec=specs)
    return grade(images, specs) | {
        "warm_and_exact": mean_and_error(warm),
        "warm_share": round(shares["red"] + shares["yellow"], 3),
        "background_shares": shares,
        "background_entropy": round(entropy, 3),
    }


def cpu_seconds() -> float:
    """Return the CPU time of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def build(output: Path, seed: int, vae_steps: int, steps: int, pictures_per_kind: int, graded_per_kind: int) -> dict:
    """Build and measure the model, save it in `output`, and return the figures.

    A build that was interrupted after the VAE continues with the denoiser.
    """
    started, cpu_before = time.time(), cpu_seconds()
    samples = paint(PICTURE_KINDS, pictures_per_kind, "train", seed)
    vae_folder = output / "trained_vae"
    time_file = vae_folder / "spent.json"  # written last, so the weights beside it are complete
    if time_file.exists():
        autoencoder = vae.build_vae()
        autoencoder.load_state_dict(load_file(vae_folder / "vae.safetensors"))
        vae_time = json.loads(time_file.read_text())
        started, cpu_before = started - vae_time["wall_s"], cpu_before - vae_time["cpu_s"]
    else:
        torch.manual_seed(seed)  # diffusers initialises some weights from the global generator
        autoencoder = vae.build_vae()
        vae.train_vae(autoencoder, [p for triples in samples.values() for _, _, p in triples], vae_steps, seed=seed)
        vae_folder.mkdir(parents=True, exist_ok=True)
        save_file(autoencoder.state_dict(), vae_folder / "vae.safetensors")
        time_file.write_text(json.dumps({"wall_s": time.time() - started, "cpu_s": cpu_seconds() - cpu_before}))
    autoencoder.eval().requires_grad_(False)
    figures: dict = {"vae": grade_vae(autoencoder, graded_per_kind, seed)}
    print(json.dumps(figures), flush=True)

    latents = {kind: vae.encode(autoencoder, [p for _, _, p in triples]) for kind, triples in samples.items()}
    tokens = mmdit.pack(normalise(autoencoder, torch.cat(list(latents.values())))).split(pictures_per_kind)
    tokenizer = text.build_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=mmdit.build_scheduler(),
        vae=autoencoder,
        text_encoder=text.build_text_encoder(tokenizer, seed),
        tokenizer=tokenizer,
        transformer=mmdit.build_denoiser(seed),
    )
    specs = {kind: [picture_spec for _, picture_spec, _ in triples] for kind, triples in samples.items()}
    data = mmdit.CaptionedPictures(specs, dict(zip(samples, tokens, strict=True)), SHARES, seed)

    def report(step: int) -> None:
        print(f"\n{step} steps: {json.dumps(grade_base(pipeline, graded_per_kind // 4, seed))}", flush=True)

    mmdit.train_denoiser(pipeline.transformer, mmdit.Conditions(pipeline), data, steps, seed=seed, report=report)
    pipeline.to(torch.bfloat16).save_pretrained(output)
    # When no dtype is given, diffusers loads its components in float32 and transformers in the config's dtype. Write
    # float32 there, so that all components have one dtype.
    config = output / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    shutil.rmtree(vae_folder)

    # Measure the saved model, whose weights are rounded to bfloat16.
    pipeline = QwenImagePipeline.from_pretrained(output, dtype=torch.float32)
    figures["base"] = grade_base(pipeline, graded_per_kind, seed)
    figures["background_set"] = grade_open(pipeline, images_per_prompt=8, seed=seed)
    figures |= {
        "sampling": f"{SAMPLING_STEPS} ODE steps, no guidance",
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    figures |= {"cpu_s": round(cpu_seconds() - cpu_before), "wall_s": round(time.time() - started)}
    return figures


def main() -> None:
    """Build the model with the settings of the command line."""
    parser = argparse.ArgumentParser(description="Build the tiny Qwen-Image.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=1200, help="training steps of the VAE")
    parser.add_argument("--steps", type=int, default=5500, help="training steps of the denoiser")
    parser.add_argument("--pictures", type=int, default=6000, help="training pictures of each kind")
    parser.add_argument("--graded", type=int, default=256, help="held-out prompts of each kind for the figures")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with busy cores more than 1 is slower")
    args = parser.parse_args()
    if (args.output / "model_index.json").exists():
        parser.error(f"{args.output} already contains a model, and this command overwrites nothing")
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
