"""What the 20B Qwen-Image takes of each GPU under every launcher config, by arithmetic: a table.

    python tests/bench/memory_sum.py --gpus 1 8 64 --gib 80

GiB of a GPU: weights + gradients + optimizer + activations, for a micro-batch of 4 images of 512 x 512 (1024 tokens, and
128 of text), twice for guidance (without, activations are half), checkpointed. AdamW; LoRA of rank 32 on weights in
bfloat16, full in float32 computed in bfloat16; text encoder and VAE offloaded. Bold fits: with 6 GiB left for what is not
counted (buffers, CUDA's own, fragments), and text encoder and VAE on it while nothing is trained.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import true_size
from peft import LoraConfig

from align.models.outline import outline
from align.parallel.memory import GIB, LAUNCHERS, Counts, Setup, count, need

ROOM = 6 * GIB
TOKENS = 4 * 2 * (1024 + 128)


def cell(counts: Counts, setup: Setup, there: float) -> str:
    """The sum on one GPU, in bold where it fits."""
    found = need(counts, setup)
    parts = (found.weights, found.gradients, found.optimizer, found.activations)
    text = " + ".join(f"{part / GIB:.1f}" for part in parts) + f" = {sum(parts) / GIB:.1f}"
    fits = found.lasting + max(found.activations, counts.encoders * setup.dtype) + ROOM <= there
    return f"**{text}**" if fits else text


def main() -> None:
    """Print the table, and what is beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--gib", type=float, default=80, help="what a GPU has")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = true_size.write_configs(Path(place) / "model")
        tunings = {
            "LoRA": (count(outline(folder, LoraConfig(r=known.rank))), Setup(dtype=2, offload=True, tokens=TOKENS)),
            "full": (count(outline(folder)), Setup(dtype=4, offload=True, tokens=TOKENS)),
        }
    print(f"| | | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in known.gpus)} |\n|{'---|' * (2 + len(known.gpus))}")
    for tuning, (counts, setup) in tunings.items():
        for launcher, stage in LAUNCHERS.items():
            sums = [cell(counts, replace(setup, processes=n, **stage), known.gib * GIB) for n in known.gpus]
            print(f"| {tuning} | {launcher} | {' | '.join(sums)} |")
    for tuning, (counts, setup) in tunings.items():
        host = [need(counts, replace(setup, processes=n, **LAUNCHERS["zero3_offload"])).host for n in known.gpus]
        loaded = (counts.transformer + counts.encoders) * setup.dtype
        print(
            f"\n{tuning}: {counts.trained / 1e9:.2f}e9 of {counts.transformer / 1e9:.2f}e9 parameters are trained. In the "
            f"host's memory, of each process: {loaded / GIB:.1f} GiB while it loads, under zero3_offload "
            f"{', '.join(f'{value / GIB:.1f}' for value in host)} for as long as it runs."
        )
    counts, setup = tunings["full"]
    copy = need(counts, replace(setup, reference=True)).copies
    print(
        f"full, with a reference (DPO, beta above 0): {copy / GIB:.1f} GiB more on each GPU; ZeRO-3 shares that out too."
    )


if __name__ == "__main__":
    main()
