"""Measure time, memory and utilisation of a Qwen-Image's rollout and update: true width, any depth, random weights.

    python tests/bench/gpu.py --depth 60 --tuning lora           # the whole transformer: 39 GiB and more
    python tests/bench/gpu.py --depth 8 --tuning lora full
    python tests/bench/gpu.py --device cpu --width small --depth 1    # to check that it runs

The algorithm is GRPO, with 24 heads of 128 channels, 512 x 512 pixels and 128 text tokens, activations checkpointed,
computed in bfloat16. A step of the rollout denoises --images images once. An update replays as many transitions, runs
the backward and an AdamW step. VAE and text encoder are the tiny model's; no figure includes them, except for the little
time they take. LoRA has rank 32 on weights in bfloat16; "full" trains weights in float32.

Model FLOP (tests/helpers/flops.py) are two for each weight that a token is multiplied with, and 4 N^2 D for attention in
each block. A backward is twice the forward; with LoRA, linear layers count only once, because their weights need no
gradient. MFU is model FLOP divided by the time and by the peak of the device (--peak, TFLOP/s in bfloat16). HFU also
counts the forward that checkpointing repeats. "Estimated" is the sum of align/parallel/memory.py, to compare with the
measured peak.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
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
from align.models.contract import Request
from align.models.qwen_image import Condition, QwenImage
from align.parallel.memory import GIB, Setup, memory_use
from align.sampling.noise import ImageKey, seeded_noise
from align.sampling.rollout import Rollout, SamplingPlan, rollout, velocity_fn
from align.tiny import CHECKPOINT

#: Dense TFLOP/s in bfloat16 from the data sheets, by a part of the device's name.
PEAKS = {"H200": 989.4, "H100": 989.4, "A100": 312.0, "B200": 2250.0}
STEPS, WINDOW = 4, 2


class RandomQwenImage(QwenImage):
    """Encode prompts as random embeddings of one length, so that no text encoder of this width is needed."""

    text_tokens = 128

    def encode(self, requests: Sequence[Request]) -> list[Condition]:
        shape = (self.text_tokens, self.transformer.config.joint_attention_dim)
        return [Condition(seeded_noise((r.prompt,), shape).to(self.dtype), shape[0], False) for r in requests]


def build(args: argparse.Namespace, tuning: str, device: torch.device) -> QwenImage:
    """Build the model on its device, ready for training with a LoRA ("lora") or of all weights ("full")."""
    config = QwenImageTransformer2DModel.load_config(CHECKPOINT / "transformer")
    if args.width == "true":
        config = config | true_size.TRANSFORMER
    torch.manual_seed(0)
    with device:
        torch.set_default_dtype(torch.float32 if tuning == "full" else torch.bfloat16)
        transformer = QwenImageTransformer2DModel.from_config(config | {"num_layers": args.depth})
        torch.set_default_dtype(torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(CHECKPOINT / "scheduler")
    components = {"transformer": transformer, "scheduler": scheduler}
    model = RandomQwenImage(QwenImagePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32, **components))
    model.text_tokens, model.device = args.text_tokens, device
    if tuning == "lora":
        model.add_lora(LoraConfig(r=32, lora_alpha=32, init_lora_weights="gaussian"))
    else:
        model.unfreeze()
    transformer.enable_gradient_checkpointing()
    return model


def make_update(model: QwenImage, sampled: Rollout, plan: SamplingPlan, requests: list[Request]) -> Callable[[], None]:
    """Return a function that does one update on the rollout's first stochastic step: replay, loss, backward, AdamW."""
    trained_parameters = [p for p in model.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr=1e-6)
    advantages = torch.ones(len(requests), device=model.device)
    record: Transition = sampled.transitions[0]

    def update() -> None:
        velocity = velocity_fn(model, plan)(record.latents, record.sigma, model.encode(requests))
        replayed = sampled.sampler.transition(
            record.latents, velocity, record.sigma, record.sigma_next, next_latents=record.next_latents
        )
        grpo_policy_loss(replayed.log_prob, record.log_prob, advantages, 1e-4, 1e-4).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def timed(work: Callable[[], Any], device: torch.device, repeats: int) -> tuple[float, float, Any]:
    """Call `work` once to warm up and then `repeats` times; return (median seconds, peak GiB, last result)."""
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


def measure(args: argparse.Namespace, tuning: str, device: torch.device) -> list[str]:
    """Measure rollout and update, and return their two lines of the table."""
    model = build(args, tuning, device)
    plan = SamplingPlan(
        args.size, args.size, STEPS, sde_steps=tuple(range(WINDOW)), noise_level=1.2, batch_size=args.images
    )
    requests = [Request(f"prompt {i}") for i in range(args.images)]
    keys = [ImageKey(0, 0, i, 0) for i in range(args.images)]
    tokens = model.latent_shape(args.size, args.size)[0]
    with torch.autocast(device.type, torch.bfloat16):
        rollout_time, rollout_peak, sampled = timed(lambda: rollout(model, requests, keys, plan), device, args.repeats)
        update_time, update_peak, _ = timed(make_update(model, sampled, plan, requests), device, args.repeats)
    setup = Setup(dtype=model.dtype.itemsize, offload=True, tokens=args.images * (tokens + args.text_tokens))
    estimate = memory_use(model.parameter_counts(), setup)
    linear_and_attention = forward_flops(model.transformer.config, tokens, args.text_tokens)
    forward = sum(linear_and_attention)
    backward = backward_flops(linear_and_attention, model.adapter)
    device_peak = args.peak or next((value for name, value in PEAKS.items() if name in device_name(device)), None)

    def line(
        phase: str, seconds: float, peak_gib: float, estimated: float, model_flop: float, executed_flop: float
    ) -> str:
        """Format a line of the table; FLOP are those of one image."""
        rates = [flop * args.images / seconds / 1e12 for flop in (model_flop, executed_flop)]
        utilisation = [f"{rate / device_peak:.1%}" if device_peak else "-" for rate in rates]
        return (
            f"| {tuning} | {phase} | {seconds:.3f} | {peak_gib:.2f} | {estimated / GIB:.2f} | "
            f"{model_flop * args.images / 1e12:.3f} | {rates[0]:.3f} | {utilisation[0]} | {utilisation[1]} |"
        )

    return [
        line("rollout step", rollout_time / STEPS, rollout_peak, estimate.weights, forward, forward),
        line("update", update_time, update_peak, estimate.total, forward + backward, 2 * forward + backward),
    ]


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tuning", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--depth", type=int, default=4, help="number of blocks; the published model has 60")
    parser.add_argument("--width", choices=["true", "small"], default="true")
    parser.add_argument("--size", type=int, default=512, help="pixels along each side of the images")
    parser.add_argument("--text_tokens", type=int, default=128)
    parser.add_argument("--images", type=int, default=4, help="images in a forward")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device, if it is not a known one")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU is available. To try the script, use --device cpu --width small --depth 1")
    print(f"{device_name(device)}, {args.depth} blocks, {args.images} images of {args.size} px, {args.width} width\n")
    print("| tuning | phase | seconds | peak GiB | estimated | model TFLOP | TFLOP/s | MFU | HFU |")
    print(f"|{'---|' * 9}", flush=True)
    for tuning in args.tuning:
        print("\n".join(measure(args, tuning, device)), flush=True)


if __name__ == "__main__":
    main()
