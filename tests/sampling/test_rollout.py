"""The rollout: whose noise is whose, and that replay sees what sampling saw."""

from dataclasses import replace

import pytest
import torch
from asking import ask
from diffusers import LMSDiscreteScheduler
from peft import LoraConfig
from tqdm import tqdm

from align.maths.flow import Transition
from align.sampling.noise import ImageKey, seeded_noise
from align.sampling.rollout import SamplingPlan, rollout, velocity_fn

PROMPTS = ["a circle"] * 3 + ["three red circles on a blue background"] * 3
REQUESTS = ask(PROMPTS)
KEYS = [ImageKey(0, 4, i // 3, i % 3) for i in range(6)]
PLAN = SamplingPlan(64, 64, num_inference_steps=5, sde_steps=(0, 1, 2, 3, 4), noise_level=0.7, batch_size=6)


def test_noise_is_a_function_of_its_key_and_standard_normal():
    draws = [seeded_noise(key, (2000,)) for key in [(0, 1, 2), (0, 1, 3), (0, 12), (1, 1, 2), (0, "1", 2)]]
    assert torch.equal(draws[0], seeded_noise((0, 1, 2), (2000,)))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(5)
    assert correlation.abs().max() < 0.1  # 4.5 standard errors of 2000 draws
    assert abs(torch.stack(draws).mean()) < 0.04 and abs(torch.stack(draws).std() - 1) < 0.03


def test_images_do_not_depend_on_the_chunk_they_are_sampled_in(tiny):
    whole = rollout(tiny, REQUESTS, KEYS, PLAN)
    chunks = rollout(tiny, REQUESTS, KEYS, replace(PLAN, batch_size=4))
    assert (whole.latents - chunks.latents).abs().max() < 1e-4
    alone = rollout(tiny, REQUESTS[4:5], KEYS[4:5], PLAN)
    assert (whole.latents[4] - alone.latents[0]).abs().max() < 1e-4


def test_every_image_of_a_group_has_noise_of_its_own(tiny):
    drawn = rollout(tiny, REQUESTS, KEYS, PLAN)
    for record in (drawn.transitions[0].latents, drawn.transitions[2].next_latents - drawn.transitions[2].mean):
        flat = record.flatten(1)
        distance = torch.cdist(flat, flat) + 1e9 * torch.eye(6)
        assert distance.min() > 1e-2


def test_no_step_of_an_image_injects_noise_that_it_has_seen_before(tiny):
    """Its initial noise once more, or one noise in every step, would add up: what is explored would be a single direction."""
    drawn = rollout(tiny, REQUESTS[:2], KEYS[:2], PLAN)
    noises = [drawn.transitions[0].latents, *((r.next_latents - r.mean) / r.std for r in drawn.transitions)]
    correlation = torch.corrcoef(torch.cat([noise.flatten(1) for noise in noises])) - torch.eye(12)
    assert correlation.abs().max() < 0.15  # five standard errors of 1024 values


def test_a_shared_start_shares_the_initial_noise_only(tiny):
    keys = [ImageKey(0, 4, i // 3, i % 3, start=0) for i in range(6)]
    drawn = rollout(tiny, REQUESTS, keys, PLAN)
    start, second = drawn.transitions[0].latents, drawn.transitions[1].latents
    assert torch.equal(start[0], start[2]) and torch.equal(start[3], start[5])
    assert not torch.equal(start[0], start[3])
    assert not torch.allclose(second[0], second[2], atol=1e-2)


@pytest.mark.parametrize(
    ("starts", "first", "guidance_scale", "size"),
    [(1, 2, 1.0, 4), (1, 0, 1.0, 4), (2, 2, 1.0, 16), (2, 1, 3.0, 1), (3, 2, 1.0, 2)],
)
def test_velocities_up_to_the_first_noise_are_computed_once_for_images_with_one_start(
    tiny, starts, first, guidance_scale, size
):
    keys = [ImageKey(0, 4, i // 3, i % 3, start=i % starts) for i in range(6)]
    plan = replace(PLAN, sde_steps=(first, first + 1), guidance_scale=guidance_scale, batch_size=size)
    drawn = rollout(tiny, REQUESTS, keys, plan)
    saved = (6 - 2 * starts) * (first + 1)  # prompts x starts, of the steps before the window and its first one
    assert drawn.forwards == (6 * 5 - saved) * (2 if guidance_scale > 1 else 1)
    for row, (prompt, key) in enumerate(zip(PROMPTS, keys, strict=True)):  # a call of its own shares nothing
        alone = rollout(tiny, ask([prompt]), [key], plan)
        assert alone.forwards == 5 * plan.forwards_per_velocity
        assert (drawn.latents[row] - alone.latents[0]).abs().max() < 1e-4
        for together, one in zip(drawn.transitions, alone.transitions, strict=True):
            assert (together.next_latents[row] - one.next_latents[0]).abs().max() < 1e-4
            assert together.log_prob[row] == pytest.approx(one.log_prob[0].item(), abs=1e-4)
    begin = drawn.transitions[0].latents
    assert torch.equal(begin[0], begin[starts % 3]) and not torch.allclose(begin[0], begin[3], atol=1e-2)


def test_images_that_start_alike_and_have_no_noise_are_still_all_drawn(tiny):
    keys = [ImageKey(0, 4, i // 3, i % 3, start=0) for i in range(6)]
    drawn = rollout(tiny, REQUESTS, keys, replace(PLAN, sde_steps=(), noise_level=0.0))
    assert drawn.forwards == 6 * 5 and len(drawn.images) == 6
    given = rollout(tiny, REQUESTS, keys, replace(PLAN, sde_steps=(2,)), initial_latents=drawn.latents)
    assert given.forwards == 6 * 5  # latents that were given are taken as they are


def test_only_the_named_steps_are_stochastic_and_recorded(tiny):
    drawn = rollout(tiny, REQUESTS, KEYS, replace(PLAN, sde_steps=(1, 3)))
    sigmas = tiny.sigmas(5, 64, 64)
    assert drawn.steps == (1, 3) and len(drawn.transitions) == 2
    for step, record in zip(drawn.steps, drawn.transitions, strict=True):
        assert torch.equal(record.sigma, sigmas[step].expand(6))
        assert torch.equal(record.sigma_next, sigmas[step + 1].expand(6))
    # Between the two there is one ODE step from the first record to the second.
    record = drawn.transitions[0]
    velocity = velocity_fn(tiny, PLAN)(record.next_latents, sigmas[2].expand(6), tiny.encode(REQUESTS))
    expected = record.next_latents + (sigmas[3] - sigmas[2]) * velocity
    assert (drawn.transitions[1].latents - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_replaying_a_rollout_in_mixed_micro_batches_gives_ratio_one(tiny, sde_type, guidance_scale):
    tiny.add_lora(LoraConfig(r=4))
    plan = replace(PLAN, sde_type=sde_type, guidance_scale=guidance_scale, sde_steps=(0, 1, 2, 3))
    drawn = rollout(tiny, REQUESTS, KEYS, plan)
    everything = Transition.cat(drawn.transitions)
    prompts = PROMPTS * 4
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    velocity = velocity_fn(tiny, plan)
    for rows in order.split(5):
        old = everything[rows]
        v = velocity(old.latents, old.sigma, tiny.encode(ask(prompts[i] for i in rows)))
        now = drawn.sampler.transition(old.latents, v, old.sigma, old.sigma_next, next_latents=old.next_latents)
        assert (torch.exp(now.log_prob - old.log_prob) - 1).abs().max() < 1e-5
        assert now.log_prob.requires_grad


def test_records_are_float32_on_a_half_precision_model():
    from align.models.families import load_model

    model = load_model("tiny", torch.bfloat16)
    drawn = rollout(model, REQUESTS, KEYS, replace(PLAN, sde_steps=(0, 1)))
    assert {value.dtype for record in drawn.transitions for value in vars(record).values()} == {torch.float32}
    assert not torch.equal(drawn.transitions[0].next_latents, drawn.transitions[0].next_latents.bfloat16().float())


def test_forwards_are_counted_twice_under_guidance(tiny):
    assert rollout(tiny, REQUESTS, KEYS, PLAN).forwards == 6 * 5
    assert rollout(tiny, REQUESTS, KEYS, replace(PLAN, guidance_scale=2.0)).forwards == 2 * 6 * 5


def test_images_are_the_decoded_latents(tiny):
    drawn = rollout(tiny, REQUESTS, KEYS, replace(PLAN, batch_size=4))
    again = tiny.decode_latents(drawn.latents, 64, 64)
    assert len(drawn.images) == 6
    for one, other in zip(drawn.images, again, strict=True):
        assert one.size == (64, 64)
        difference = torch.tensor(list(one.getdata())).float() - torch.tensor(list(other.getdata())).float()
        assert difference.abs().max() <= 1


def test_images_that_are_not_finite_reach_no_reward_and_are_told(tiny):
    starts = torch.stack([seeded_noise(key.initial(), tiny.latent_shape(64, 64)) for key in KEYS])
    starts[3, 0, 0] = float("nan")
    seen: list[slice] = []
    plan = replace(PLAN, sde_steps=(), batch_size=2)
    drawn = rollout(tiny, REQUESTS, KEYS, plan, initial_latents=starts, on_images=lambda chunk, _: seen.append(chunk))
    assert not drawn.finite and seen == [slice(0, 2), slice(4, 6)] and len(drawn.images) == 6


@pytest.mark.parametrize("show_progress", [True, False])
def test_the_bar_ends_with_the_last_velocity(tiny, monkeypatch, show_progress):
    """Of a bar that stops at half, or runs over, nobody can tell how long a rollout will take."""
    bars = []

    class Bar(tqdm):
        def close(self):
            bars.append((self.n, self.total, self.disable))
            super().close()

    monkeypatch.setattr("align.sampling.rollout.tqdm", Bar)
    keys = [ImageKey(0, 4, i // 3, i % 3, start=0) for i in range(6)]
    plan = replace(PLAN, num_inference_steps=3, sde_steps=(0,), batch_size=4)
    rollout(tiny, REQUESTS, keys, plan, show_progress=show_progress)
    assert bars[0] == (
        (5, 5, False) if show_progress else (0, 5, True)
    )  # one for both starts, then two steps of two chunks


def test_the_second_order_solver_comes_nearer_to_a_fine_solution_with_as_many_forwards(tiny):
    plan = replace(PLAN, sde_steps=(), noise_level=0.0, num_inference_steps=6)
    fine = rollout(tiny, REQUESTS, KEYS, replace(plan, num_inference_steps=50)).latents
    euler, second = (rollout(tiny, REQUESTS, KEYS, replace(plan, solver=solver)) for solver in ("euler", "ab2"))
    assert second.forwards == euler.forwards == 6 * 6
    assert (second.latents - fine).norm() < 0.85 * (euler.latents - fine).norm()


@torch.no_grad()
def test_a_rollout_of_the_second_order_solver_is_that_of_the_stock_multistep_scheduler(tiny):
    """From the third step on its images would be those of another method, worse than Euler's."""
    plan = replace(PLAN, sde_steps=(), noise_level=0.0, num_inference_steps=6, solver="ab2")
    stock = LMSDiscreteScheduler()
    stock.set_timesteps(6)
    stock.sigmas = tiny.sigmas(6, 64, 64)
    latents = torch.stack([seeded_noise(key.initial(), (16, 64)) for key in KEYS])
    velocity, conditions = velocity_fn(tiny, plan), tiny.encode(REQUESTS)
    for step, timestep in enumerate(stock.timesteps):
        stock.scale_model_input(latents, timestep)  # of another kind of model: not used, but it warns without
        v = velocity(latents, stock.sigmas[step].expand(6), conditions)
        latents = stock.step(v, timestep, latents, order=2).prev_sample
    assert (rollout(tiny, REQUESTS, KEYS, plan).latents - latents).abs().max() < 1e-4


def test_the_second_order_solver_wants_ode_steps_alone():
    with pytest.raises(ValueError, match=r"solver ab2 needs every step to be an ODE step, found SDE steps \(0, 1\)"):
        SamplingPlan(64, 64, num_inference_steps=5, sde_steps=(0, 1), noise_level=0.7, solver="ab2")
