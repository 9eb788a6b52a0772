"""Calculate the memory that the 20B Qwen-Image needs on each GPU under every launcher config.

    python tests/bench/memory_sum.py --gpus 1 8 64 --gib 80

The table shows GiB on one GPU: weights + gradients + optimizer + activations, for a micro-batch of 4 images of 512 x 512
pixels (1024 tokens, and 128 of text), twice for guidance (activations are half without it), checkpointed. The optimizer is
AdamW. LoRA has rank 32 on weights in bfloat16; "full" has weights in float32, computed in bfloat16. Text encoder and VAE
are offloaded. A sum in bold fits, with 6 GiB left for what is not counted (buffers, CUDA itself, fragmentation), and with
text encoder and VAE on the GPU while nothing is trained.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import true_size
from peft import LoraConfig

from align.models.families import outline
from align.parallel.memory import GIB, LAUNCHERS, Counts, Setup, memory_use

RESERVE = 6 * GIB  # for what is not counted
TOKENS = 4 * 2 * (1024 + 128)  # images, guidance, tokens of an image and its text


def cell(counts: Counts, setup: Setup, gpu_bytes: float) -> str:
    """Format the sum on one GPU, in bold if it fits into `gpu_bytes`."""
    use = memory_use(counts, setup)
    terms = (use.weights, use.gradients, use.optimizer, use.activations)
    text = " + ".join(f"{term / GIB:.1f}" for term in terms) + f" = {sum(terms) / GIB:.1f}"
    fits = use.lasting + max(use.activations, counts.encoders * setup.dtype) + RESERVE <= gpu_bytes
    return f"**{text}**" if fits else text


def main() -> None:
    """Print the table, and below it the memory of the host and of a reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 8, 64], help="numbers of GPUs")
    parser.add_argument("--gib", type=float, default=80, help="memory of each GPU")
    parser.add_argument("--rank", type=int, default=32, help="rank of the LoRA")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = true_size.write_configs(Path(temporary) / "model")
        tunings = {
            "LoRA": (
                outline(folder, LoraConfig(r=args.rank)).parameter_counts(),
                Setup(dtype=2, offload=True, tokens=TOKENS),
            ),
            "full": (outline(folder).parameter_counts(), Setup(dtype=4, offload=True, tokens=TOKENS)),
        }
    print(f"| | | {' | '.join(f'{n} GPU' + 's' * (n > 1) for n in args.gpus)} |\n|{'---|' * (2 + len(args.gpus))}")
    for tuning, (counts, setup) in tunings.items():
        for launcher, stage in LAUNCHERS.items():
            sums = [cell(counts, replace(setup, processes=n, **stage), args.gib * GIB) for n in args.gpus]
            print(f"| {tuning} | {launcher} | {' | '.join(sums)} |")
    for tuning, (counts, setup) in tunings.items():
        host = [memory_use(counts, replace(setup, processes=n, **LAUNCHERS["zero3_offload"])).host for n in args.gpus]
        loaded = (counts.transformer + counts.encoders) * setup.dtype
        print(
            f"\n{tuning}: {counts.trained / 1e9:.2f}e9 of {counts.transformer / 1e9:.2f}e9 parameters are trained. In the "
            f"host's memory, of each process: {loaded / GIB:.1f} GiB while it loads, under zero3_offload "
            f"{', '.join(f'{value / GIB:.1f}' for value in host)} for as long as it runs."
        )
    counts, setup = tunings["full"]
    copy = memory_use(counts, replace(setup, reference=True)).copies
    print(
        f"full, with a reference (DPO, beta above 0): {copy / GIB:.1f} GiB more on each GPU; ZeRO-3 shares that out too."
    )


if __name__ == "__main__":
    main()
