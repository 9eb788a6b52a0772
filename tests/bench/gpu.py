"""Rollout and update of a Qwen-Image of true width and chosen depth, with random weights: time, memory, utilisation.

    python tests/bench/gpu.py --depth 60 --tuning lora           # the whole transformer: 39 GiB and more
    python tests/bench/gpu.py --depth 8 --tuning lora full
    python tests/bench/gpu.py --device cpu --width small --depth 1    # that it runs at all

GRPO on 24 heads of 128 channels at 512 x 512 and 128 text tokens, activations checkpointed, computed in bfloat16: a step
of the rollout denoises --images images once, and an update replays as many transitions, goes back, and lets AdamW step.
VAE and text encoder are a tiny model's and left out of all figures but for their little time. LoRA of rank 32 on weights
in bfloat16; full in float32.

Model FLOP (tests/helpers/flops.py): two for each weight that a token meets, attention's 4 N^2 D a block; backward twice
that, or with LoRA once for linear layers, whose weights need no gradient. MFU is model FLOP over time over the peak of
the device (--peak, TFLOP/s in bfloat16). HFU counts the forward that checkpointing repeats too. "Estimated" is
align/memory.py's sum, to be held against the peak.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch
import true_size
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from flops import backward_flops, forward_flops
from peft import LoraConfig

from align.engine.metrics import memory_peak_gib
from align.maths.flow import Transition
from align.maths.losses import grpo_policy_loss
from align.models.qwen_image import Condition, QwenImage
from align.parallel.memory import GIB, Setup, count, need
from align.sampling.noise import seeded_noise
from align.sampling.rollout import ImageKey, Rollout, SamplingPlan, rollout, velocity_fn
from align.tiny import CHECKPOINT

#: TFLOP/s in bfloat16, dense, by what is in a device's name: the makers' data sheets.
PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "B200": 2250.0}
STEPS, WINDOW = 4, 2


class RandomQwenImage(QwenImage):
    """A Qwen-Image whose prompts are random embeddings of one length: no text encoder of its width is needed."""

    text_tokens = 128

    def encode_prompts(self, prompts: list[str]) -> list[Condition]:
        shape = (self.text_tokens, self.transformer.config.joint_attention_dim)
        return [Condition(seeded_noise((prompt,), shape).to(self.dtype), shape[0], False) for prompt in prompts]


def build(known: argparse.Namespace, tuning: str, device: torch.device) -> QwenImage:
    """The model, made on its device, with what is trained made ready."""
    config = QwenImageTransformer2DModel.load_config(CHECKPOINT / "transformer")
    if known.width == "true":
        config = config | true_size.TRANSFORMER
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(torch.float32 if tuning == "full" else torch.bfloat16)
        transformer = QwenImageTransformer2DModel.from_config(config | {"num_layers": known.depth})
        torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(CHECKPOINT / "scheduler")
    parts = {"transformer": transformer, "scheduler": scheduler}
    model = RandomQwenImage(QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32, **parts))
    model.text_tokens, model.device = known.text_tokens, device
    if tuning == "lora":
        model.add_lora(LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian"))
    else:
        model.unfreeze()
    transformer.enable_gradient_checkpointing()
    return model


def updater(model: QwenImage, drawn: Rollout, plan: SamplingPlan, prompts: list[str]) -> Callable[[], None]:
    """One update on the rollout's first stochastic step: replay, loss, backward, AdamW."""
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    advantages = torch.ones(len(prompts), device=model.device)
    record: Transition = drawn.transitions[0]

    def update() -> None:
        velocity = velocity_fn(model, plan)(record.latents, record.sigma, model.encode_prompts(prompts))
        now = drawn.sampler.transition(
            record.latents, velocity, record.sigma, record.sigma_next, next_latents=record.next_latents
        )
        grpo_policy_loss(now.log_prob, record.log_prob, advantages, 1e-4, 1e-4).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float, Any]:
    """(median seconds, peak GiB, last result), after one call that is not counted."""
    on_gpu = device.type == "cuda"
    work()
    seconds, result = [], None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        result = work()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2], memory_peak_gib(), result


def measure(known: argparse.Namespace, tuning: str, device: torch.device) -> list[str]:
    """Two lines of the table, rollout and update."""
    model = build(known, tuning, device)
    plan = SamplingPlan(
        known.size, known.size, STEPS, sde_steps=tuple(range(WINDOW)), noise_level=1.2, batch_size=known.images
    )
    prompts = [f"prompt {i}" for i in range(known.images)]
    keys = [ImageKey(0, 0, i, 0) for i in range(known.images)]
    tokens = model.latent_shape(known.size, known.size)[0]
    forward = forward_flops(model.transformer.config, tokens, known.text_tokens)
    with torch.autocast(device.type, torch.bfloat16):
        sampling, sampling_peak, drawn = timed(lambda: rollout(model, prompts, keys, plan), device, known.repeats)
        update = updater(model, drawn, plan, prompts)
        updating, updating_peak, _ = timed(update, device, known.repeats)
    setup = Setup(dtype=model.dtype.itemsize, offload=True, tokens=known.images * (tokens + known.text_tokens))
    sums = need(count(model), setup)
    back = backward_flops(forward, model.adapter)
    peak = known.peak or next((value for name, value in PEAKS.items() if name in device_name(device)), None)

    def line(phase: str, seconds: float, held: float, estimate: float, model_flop: float, done: float) -> str:
        rates = [flop * known.images / seconds / 1e12 for flop in (model_flop, done)]
        shares = [f"{rate / peak:.1%}" if peak else "-" for rate in rates]
        return (
            f"| {tuning} | {phase} | {seconds:.3f} | {held:.2f} | {estimate / GIB:.2f} | "
            f"{model_flop * known.images / 1e12:.3f} | {rates[0]:.3f} | {shares[0]} | {shares[1]} |"
        )

    once = sum(forward)
    return [
        line("rollout step", sampling / STEPS, sampling_peak, sums.weights, once, once),
        line("update", updating, updating_peak, sums.total, once + back, 2 * once + back),
    ]


def device_name(device: torch.device) -> str:
    """What it is."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tuning", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--depth", type=int, default=4, help="blocks; the published model has 60")
    parser.add_argument("--width", choices=["true", "small"], default="true")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--images", type=int, default=4, help="in a forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, where its name does not tell")
    known = parser.parse_args()
    device = torch.device(known.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here: --device cpu --width small --depth 1 shows that the script runs")
    print(
        f"{device_name(device)}, {known.depth} blocks, {known.images} images of {known.size} px, {known.width} width\n"
    )
    print("| tuning | phase | seconds | peak GiB | estimated | model TFLOP | TFLOP/s | MFU | HFU |")
    print(f"|{'---|' * 9}", flush=True)
    for tuning in known.tuning:
        print("\n".join(measure(known, tuning, device)), flush=True)


if __name__ == "__main__":
    main()
