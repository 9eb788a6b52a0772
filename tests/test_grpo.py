"""GRPO on the embedded model, against computations that use none of its code, and its failure paths."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asking import ask
from brightness import score as brightness
from datasets import Dataset
from group_runs import history, prompts_of, some_scored, weights
from peft import LoraConfig
from safetensors.torch import load_file
from scaled import largest_difference, loaded_by_stock

from align.grpo import ConsistencyError, GRPOConfig, GRPOTrainer
from align.models.families import load_model
from preference_data.readers import read_preferences
from rewards import RewardError, load_rewards
from rewards.weights import parse_weight

PROMPTS = Dataset.from_dict(
    {"prompt": ["a circle", "two squares", "red objects", "a blue cross", "three triangles", "green circles"]}
)


def config(folder: Path, **overrides) -> GRPOConfig:
    settings = {
        "output_dir": str(folder),
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "sde_window_size": 2,
        "num_generations": 4,
        "generation_batch_size": 8,
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 16,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "epsilon": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return GRPOConfig(**(settings | overrides))


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian")


def trainer(
    folder: Path, rewards=(brightness,), model=None, peft_config="lora", data=PROMPTS, **overrides
) -> GRPOTrainer:
    model = model or load_model("tiny")
    adapter = lora() if peft_config == "lora" else peft_config
    return GRPOTrainer(model, list(rewards), config(folder, **overrides), data, peft_config=adapter)


# -- the algorithm -----------------------------------------------------------------------------------------------------


def test_first_gradient_is_the_plain_policy_gradient_by_stock_diffusers_calls(tmp_path):
    run = trainer(tmp_path, max_steps=1, max_grad_norm=0.0, advantage_clip=100.0)
    taken = {}
    step = run.create_optimizer().step
    run.optimizer.step = lambda *a, **k: (
        taken.update({n: p.grad.clone() for n, p in run.trained_parameters().items()}),
        step(*a, **k),
    )
    before = weights(run)
    run.train()
    buffer, transformer = run._buffer, run.flow.transformer
    with torch.no_grad():
        for name, parameter in run.trained_parameters().items():
            parameter.copy_(before[name])
            parameter.grad = None
    # d/dw of -mean(A log p), log p written out for the SDE of MATHS section 2 with the pipeline's own encoding.
    pipeline, rewards = (
        run.flow.pipeline,
        torch.tensor(brightness(run.flow.decode_latents(final_latents(run, buffer), 64, 64), prompts_of(buffer))).view(
            2, 4
        ),
    )
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    embeds, mask = pipeline.encode_prompt(prompts_of(buffer))
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.1)
    sigmas, total = pipeline.scheduler.sigmas, 0.0
    for k in range(2):
        x = buffer.transitions.latents[k * 8 : k * 8 + 8]
        drawn = buffer.transitions.next_latents[k * 8 : k * 8 + 8]
        v = transformer(
            hidden_states=x, timestep=sigmas[k].expand(8), encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask, img_shapes=[[(1, 4, 4)]] * 8, return_dict=False,
        )[0]  # fmt: skip
        s, d = sigmas[k].item(), (sigmas[k] - sigmas[k + 1]).item()
        g2 = 0.7**2 * s / (1 - (s if s < 1 else sigmas[1].item()))
        mean = x - d * (v + g2 / (2 * s) * (x + (1 - s) * v))
        log_prob = -((drawn - mean) ** 2).mean((1, 2)) / (2 * g2 * d)
        total = total - (advantages * log_prob).sum() / 16
    total.backward()
    scale = max(p.grad.abs().max() for p in run.trained_parameters().values())
    for name, parameter in run.trained_parameters().items():
        assert (parameter.grad - taken[name]).abs().max() < 2e-4 * scale, name


def final_latents(run: GRPOTrainer, buffer) -> torch.Tensor:
    """The rest of the way by the stock scheduler, from the last recorded step."""
    pipeline = run.flow.pipeline
    embeds, mask = pipeline.encode_prompt(prompts_of(buffer))
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.1)
    x = buffer.transitions.next_latents[8:]
    pipeline.scheduler.set_begin_index(2)
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps[2:]:
            v = run.flow.transformer(
                hidden_states=x, timestep=(t / 1000).expand(8), encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask, img_shapes=[[(1, 4, 4)]] * 8, return_dict=False,
            )[0]  # fmt: skip
            x = pipeline.scheduler.step(v, t, x, return_dict=False)[0]
    return x


def test_first_ratio_is_one_and_the_gate_measures_it(tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1)
    run.train()
    assert history(run, "ratio_deviation_at_start")[0] < 1e-5
    assert abs(history(run, "ratio_min")[0] - 1) < 1e-5
    assert abs(history(run, "ratio_max")[0] - 1) < 1e-5
    assert history(run, "clip_share")[0] == 0


def test_first_ratio_of_a_half_precision_model_does_not_depend_on_the_padding(tmp_path):
    lengths = [
        "a circle",
        "three red circles on a blue background",
        "two objects",
        "a red circle left of a blue square",
    ]
    model = load_model("tiny", torch.bfloat16)
    run = trainer(tmp_path, model=model, data=Dataset.from_dict({"prompt": lengths}), max_steps=1, guidance_scale=4.0,
                  generation_batch_size=16, per_device_train_batch_size=8, gradient_accumulation_steps=4)  # fmt: skip
    run.train()
    assert history(run, "ratio_deviation_at_start")[0] < 1e-5
    assert max(abs(history(run, "ratio_min")[0] - 1), abs(history(run, "ratio_max")[0] - 1)) < 1e-5


def test_gate_stops_a_run_whose_policy_is_not_the_one_that_sampled(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    buffer = run._buffer
    with torch.no_grad():
        for name, parameter in run.trained_parameters().items():
            if "lora_B" in name:
                parameter.add_(0.05)
    run._consistent = False
    with pytest.raises(ConsistencyError, match=r"at denoising step [01], tolerance 1.00e-04"):
        run._check_consistency(buffer)
    assert not run._consistent


def test_dropout_in_the_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        trainer(tmp_path, peft_config=LoraConfig(r=4, lora_dropout=0.1))


@pytest.mark.parametrize(("size", "accumulation"), [(8, 2), (4, 4)])
def test_update_does_not_depend_on_the_micro_batch(tmp_path, size, accumulation):
    whole, parts = (
        trainer(tmp_path / "a"),
        trainer(tmp_path / "b", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation),
    )
    whole.train()
    parts.train()
    assert largest_difference(weights(whole), weights(parts)) < 2e-5  # Adam's first steps are lr-sized: 1e-3
    assert history(whole, "reward") == pytest.approx(history(parts, "reward"), abs=1e-5)


def test_equal_seeds_make_equal_runs_and_others_do_not(tmp_path):
    runs = [trainer(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    for run in runs:
        run.train()
    assert largest_difference(weights(runs[0]), weights(runs[1])) == 0
    assert largest_difference(weights(runs[0]), weights(runs[2])) > 0


def test_every_rollout_draws_other_images_though_the_policy_and_the_prompts_stay(tmp_path):
    """With one noise for all rollouts a run would see the same few images of every prompt for ever."""
    run = trainer(tmp_path, data=PROMPTS.select(range(1)), learning_rate=0.0, generation_batch_size=4, max_steps=3,
                  per_device_train_batch_size=8)  # fmt: skip
    run.train()
    assert len(set(history(run, "reward"))) == 3


def test_the_order_of_the_prompts_is_that_of_data_seed_and_the_rest_that_of_seed(tmp_path):
    """Without it no two seeds could be compared on the same data, or one seed on other data."""
    prompts = {}
    for name, seeds in {"a": {}, "b": {"data_seed": 8}, "c": {"data_seed": 8, "seed": 4}}.items():
        run = trainer(tmp_path / name, max_steps=1, **seeds)
        run.train()
        prompts[name] = (prompts_of(run._buffer), history(run, "reward"))
    assert prompts["a"][0] != prompts["b"][0] == prompts["c"][0]
    assert prompts["b"][1] != prompts["c"][1]


def test_several_passes_move_the_ratio_and_the_clip_holds_it(tmp_path):
    run = trainer(tmp_path, num_iterations=4, max_steps=4, epsilon=1e-6, consistency_tolerance=50.0, learning_rate=5e-3)
    run.train()
    assert len(history(run, "reward")) == 1  # one rollout, four updates
    assert history(run, "clip_share")[0] == 0
    assert history(run, "clip_share")[-1] > 0
    assert history(run, "kl_rollout_total")[-1] > history(run, "kl_rollout_total")[0]


def test_beta_holds_the_policy_at_its_reference(tmp_path):
    free, held = (trainer(tmp_path / str(beta), beta=beta, max_steps=4, learning_rate=5e-3) for beta in (0.0, 100.0))
    free.train()
    held.train()
    assert history(held, "kl_total")[0] == pytest.approx(0, abs=1e-6)
    assert "kl_total" not in free.state.log_history[0]
    assert history(held, "kl_per_dim")[-1] == pytest.approx(history(held, "kl_total")[-1] / (16 * 64), rel=1e-4)

    def distance_from_base(run):  # of the images' latents at one noise level
        latents = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0))
        args = latents, torch.full((4,), 0.6), run.flow.encode(ask(["a circle"] * 4))
        with torch.no_grad():
            now = run.flow.velocity(*args, height=64, width=64)
            with run.flow.reference(run.flow.transformer) as base:
                return (run.flow.velocity(*args, height=64, width=64, transformer=base) - now).abs().mean()

    assert distance_from_base(held) < 0.5 * distance_from_base(free)


def test_forward_equivalents_count_what_was_run(tmp_path):
    run = trainer(tmp_path, max_steps=2, beta=0.1, guidance_scale=2.0)
    run.train()
    # Rollout 8 images x 4 steps; gate 16 once; update 16 transitions x (1 + 2), reference 16; guidance doubles all.
    assert history(run, "forward_equivalents") == [2 * (32 + 16 + 48 + 16), 2 * (2 * (32 + 48 + 16) + 16)]


def test_dead_groups_cost_no_forward_and_do_not_move_the_policy(tmp_path):
    run = trainer(tmp_path, rewards=[lambda images, prompts: [0.5] * len(images)], max_steps=2)
    before = weights(run)
    run.train()
    assert history(run, "dead_groups") == [1.0, 1.0]
    assert history(run, "forward_equivalents") == [32 + 16, 64 + 16]
    assert largest_difference(before, weights(run)) == 0


def test_a_half_dead_rollout_trains_the_live_half_only(tmp_path):
    def only_circles(images, prompts):
        return [b if "circle" in p else 1.0 for b, p in zip(brightness(images, prompts), prompts, strict=True)]

    data = Dataset.from_dict({"prompt": ["a circle", "two squares"]})
    run = trainer(tmp_path, rewards=[only_circles], data=data, max_steps=1)
    run.train()
    assert history(run, "dead_groups") == [0.5]
    assert history(run, "forward_equivalents") == [32 + 16 + 3 * 8]


def test_a_shared_prefix_and_fewer_trained_images_cost_what_they_say(tmp_path):
    window = {"sde_window_range": [2, 3], "sde_window_size": 1, "per_device_train_batch_size": 8}
    run = trainer(tmp_path, max_steps=1, num_prefixes=2, num_trained=2, **window)
    before = weights(run)
    run.train()
    # Two groups of two starts each run the two steps before the window and its own one, all eight images the last; the
    # gate replays the four starts; two images of each group are trained, which may have one start or two.
    trained = len({(i // 4, i % 2) for i in run._buffer.informative.nonzero().flatten().tolist()})
    assert run._buffer.informative.sum() == 4 and 2 <= trained <= 4
    assert history(run, "forward_equivalents") == [2 * 2 * 3 + 8 * 1 + 4 + 3 * trained]
    assert history(run, "dead_groups") == [0.0] and history(run, "ratio_deviation_at_start")[0] < 1e-5
    assert largest_difference(before, weights(run)) > 0


@pytest.mark.parametrize(("first", "size", "prefixes", "saved"), [(0, 1, 1, 6), (1, 2, 2, 4), (0, 2, 1, 6)])
def test_a_velocity_that_images_have_in_common_is_trained_once_with_the_same_gradient(
    tmp_path, first, size, prefixes, saved
):
    run = trainer(
        tmp_path, max_steps=2, num_iterations=2, num_prefixes=prefixes, beta=0.01,
        sde_window_range=[first, first + size], sde_window_size=size, per_device_train_batch_size=8 * size,
    )  # fmt: skip
    run.train()  # one step on: the ratio is no longer 1 and the reference no longer the policy
    buffer, apart = run._buffer, replace(run._buffer, starts=None)
    seen = []
    for source in (buffer, apart):
        batch = source.micro_batch(1)
        run.model.zero_grad()
        loss = run.compute_loss(run.model_wrapped, batch)
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in run.trained_parameters().items()}
        seen.append((loss.item(), gradient, len(batch.distinct), len(batch)))
    (loss, gradient, few, rows), (other_loss, other, many, other_rows) = seen
    assert rows == other_rows == many == 8 * size and few == many - saved
    assert loss == pytest.approx(other_loss, abs=1e-6)
    largest = max(value.abs().max().item() for value in other.values())
    assert largest > 1e-5 and largest_difference(gradient, other) < 1e-4 * largest


def test_unscored_images_carry_no_gradient(tmp_path):
    def not_the_first(images, prompts):
        return [None, *brightness(images, prompts)[1:]]

    run = trainer(tmp_path, rewards=[not_the_first], max_steps=1)
    run.train()
    assert run._buffer.informative.tolist() == [False] + [True] * 7
    assert history(run, "rewards/not_the_first/unscored") == [0.125]
    assert math.isfinite(history(run, "loss")[0])


def test_full_fine_tune_trains_and_exports_a_transformer_that_stock_diffusers_loads(tmp_path):
    run = trainer(tmp_path, peft_config=None, beta=0.01, learning_rate=1e-4)
    run.train()
    assert history(run, "kl_total")[-1] > 0
    run.finish("tiny", "six prompts")
    loaded = type(run.model).from_pretrained(tmp_path / "transformer")
    state = run.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_reward_rises_when_the_reward_is_easy(tmp_path):
    run = trainer(tmp_path, max_steps=8, learning_rate=5e-3, num_generations=8, generation_batch_size=16,
                  per_device_train_batch_size=32, noise_level=1.0)  # fmt: skip
    run.train()
    rewards = history(run, "reward")
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.02


# -- checkpoints -------------------------------------------------------------------------------------------------------


#: Two updates on each rollout.
FOUR = {"num_iterations": 2, "max_steps": 4, "ema_decay": 0.8, "beta": 0.01}
FOUR |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An undisturbed run of four updates."""
    run = trainer(tmp_path_factory.mktemp("straight"), **FOUR)
    run.train()
    return run


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resume_is_bit_exact_between_and_within_rollouts(tmp_path, straight, at):
    resumed = trainer(tmp_path / "resumed", **FOUR)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-{at}")
    assert largest_difference(weights(straight), weights(resumed)) == 0
    assert history(straight, "loss") == history(resumed, "loss")
    # The count goes on too; the resumed process passes the gate of 16 forwards once more, at its first own rollout.
    gate = 16 if at < 3 else 0
    assert history(resumed, "forward_equivalents")[-1] == history(straight, "forward_equivalents")[-1] + gate
    for one, other in zip(*(run.ema.copy.average.shadow_params for run in (straight, resumed)), strict=True):
        assert torch.equal(one, other)


def test_resume_in_a_later_epoch_goes_on_with_its_order_of_prompts(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}  # three rollouts make an epoch here
    straight, resumed = trainer(tmp_path / "straight", **settings), trainer(tmp_path / "resumed", **settings)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert largest_difference(weights(straight), weights(resumed)) == 0
    assert straight._buffer.requests == resumed._buffer.requests
    sampler = straight._get_train_sampler()
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_checkpoint_holds_what_is_trained_and_no_pickled_arguments(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert stored.keys() == run.trained_parameters().keys()
    assert not (tmp_path / "checkpoint-2" / "training_args.bin").exists()


def test_checkpoint_of_another_rank_is_refused_by_name(tmp_path):
    trainer(tmp_path / "a", save_strategy="steps", save_steps=2).train()
    other = trainer(tmp_path / "b", peft_config=LoraConfig(r=8))
    with pytest.raises(
        ValueError, match=r"lora_r is 8 and was 4 when .*checkpoint-2 was written: .*--adapter .*checkpoint-2"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"per_device_train_batch_size": 8},
            r"8 rows an update, and it was 16 when .* resume with --per_device_train_batch_size 16 or --gradient",
        ),
        ({"noise_level": 0.5}, "noise_level is 0.5 and was 0.7"),
        ({"seed": 4}, "seed is 4 and was 3"),
    ],
)
def test_resuming_as_another_run_is_refused(tmp_path, changed, message):
    trainer(tmp_path / "a", save_strategy="steps", save_steps=1, num_iterations=2).train()
    other = trainer(tmp_path / "b", num_iterations=2, **changed)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_moving_average_is_what_is_evaluated_and_exported(tmp_path):
    run = trainer(tmp_path, ema_decay=0.5, max_steps=3)
    run.train()
    raw = weights(run)
    with run.averaged_weights():
        averaged = weights(run)
    assert largest_difference(raw, averaged) > 0
    assert largest_difference(raw, weights(run)) == 0
    run.export()
    exported = loaded_by_stock(tmp_path)
    assert largest_difference(exported, averaged) == 0 < largest_difference(exported, raw)


# -- rewards that fail -------------------------------------------------------------------------------------------------


class FailsAfter:
    """A reward that works for some calls, then raises."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, images, prompts):
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("the scorer went away")
        return brightness(images, prompts)


def test_a_reward_that_raises_stops_the_run_with_a_checkpoint_that_resumes(tmp_path):
    run = trainer(tmp_path / "failing", rewards=[FailsAfter(2)], max_steps=4, ema_decay=0.5)
    with pytest.raises(
        RewardError,
        match=r"'FailsAfter' failed for .* of .* images:.* ConnectionError: the scorer went away \(max_failed_fraction=0.1\)",
    ):
        run.train()
    assert run.state.global_step == 2
    healthy = trainer(tmp_path / "healthy", rewards=[FailsAfter(99)], max_steps=4, ema_decay=0.5)
    healthy.train()
    resumed = trainer(tmp_path / "resumed", rewards=[FailsAfter(99)], max_steps=4, ema_decay=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "failing" / "checkpoint-2"))
    assert largest_difference(weights(resumed), weights(healthy)) == 0


def test_a_failing_reward_within_the_allowance_leaves_its_rollout_unscored(tmp_path):
    run = trainer(tmp_path, rewards=[FailsAfter(1)], max_failed_fraction=1.0)
    run.train()
    assert history(run, "rewards/FailsAfter/unscored") == [0.0, 1.0]
    assert history(run, "dead_groups") == [0.0, 1.0]
    assert history(run, "loss")[1] == 0


def test_a_failure_among_several_rewards_leaves_the_images_unscored_as_a_whole(tmp_path):
    run = trainer(tmp_path, rewards=[FailsAfter(1), brightness], max_failed_fraction=1.0)
    run.train()
    assert history(run, "dead_groups") == [0.0, 1.0]


def test_a_reward_that_says_nothing_for_several_rollouts_raises_an_alarm(tmp_path, caplog):
    def always(images, prompts):
        return [0.0] * len(images)

    def never(images, prompts):
        return [None] * len(images)

    rewards = load_rewards([brightness, always, never])
    rewards = [rewards[0], *(replace(reward, weight=0.0) for reward in rewards[1:])]
    trainer(tmp_path, rewards=rewards, max_steps=6, sde_window_size=1, per_device_train_batch_size=8).train()
    said = [r.getMessage() for r in caplog.records if r.name == "align.online.trainer"]
    assert said == [
        "the last 5 rollouts got one and the same score from reward 'always' for every image",
        "the last 5 rollouts got no score from reward 'never' for any image",
    ]


def test_the_alarm_is_of_rollouts_in_a_row_in_which_every_group_was_dead(tmp_path, caplog):
    """Half of the groups without a difference is usual near the end of a run: it must not cry wolf, nor for two runs."""
    said = "had nothing to learn from"
    some = trainer(tmp_path / "some", [some_scored], data=PROMPTS.select([0, 1]), max_steps=5)
    some.train()
    assert history(some, "dead_groups") == [0.5] * 5 and said not in caplog.text
    none = trainer(tmp_path / "none", [lambda images, prompts: [None] * len(images)], max_steps=3)
    none.train()
    none.train()  # six in all, but three in a row
    assert said not in caplog.text
    trainer(tmp_path / "long", [lambda images, prompts: [None] * len(images)], max_steps=5).train()
    assert caplog.text.count(f"the last 5 rollouts {said}") == 1


def test_weights_that_go_by_a_column_reach_the_advantages(tmp_path):
    """The reward weighs nothing for one of the two prompts of every rollout: that group is dead, the other is not."""
    data = PROMPTS.select(range(2)).map(lambda row, n: {"kind": ["one", "other"][n]}, with_indices=True)
    (reward,) = load_rewards([brightness])
    weight = parse_weight("brightness", {"by": "kind", "one": 1.0, "other": 0.0})
    run = trainer(tmp_path / "a", rewards=[replace(reward, weight=weight)], data=data)
    run.train()
    assert history(run, "dead_groups") == [0.5, 0.5]
    weight = parse_weight("brightness", {"by": "kind", "one": 1.0})
    with pytest.raises(ValueError, match=r"reward 'score', row 1 of the data: kind 'other' has no weight"):
        trainer(tmp_path / "b", rewards=[replace(reward, weight=weight)], data=data)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda images, prompts: [1.0], "returned 1 scores for 8 images"),
        (lambda images, prompts: ["good"] * len(images), "returned 'good'"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_the_run(tmp_path, reward, message):
    with pytest.raises(RewardError, match=message):
        trainer(tmp_path, rewards=[reward]).train()


def test_columns_reach_the_reward_by_name_and_missing_ones_are_named(tmp_path):
    def wants_target(images, prompts, target):
        assert [p.split()[0] for p in prompts] == target
        return brightness(images, prompts)

    data = PROMPTS.map(lambda row: {"target": row["prompt"].split()[0]})
    trainer(tmp_path / "a", rewards=[wants_target], data=data, max_steps=1).train()
    with pytest.raises(ValueError, match="needs the data column 'target'"):
        trainer(tmp_path / "b", rewards=[wants_target])


# -- evaluation and what a run leaves ----------------------------------------------------------------------------------


def test_evaluation_reports_means_and_standard_errors_and_ignores_the_training_noise(tmp_path):
    args = config(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, eval_on_start=True, num_generations_eval=2
    )
    held_out = Dataset.from_dict({"prompt": ["a cross", "two circles", "blue squares"]})
    run = GRPOTrainer(
        load_model("tiny"),
        [brightness],
        args,
        PROMPTS,
        held_out,
        {"guard": held_out},
        peft_config=lora(),
    )
    run.train()
    table = run.finish("tiny", "six prompts")
    first = next(entry for entry in run.state.log_history if "eval_score" in entry)
    assert first["eval_num_prompts"] == 3
    assert first["eval_score"] == first["eval_reward"] == first["eval_guard_score"]
    assert 0 < first["eval_score_se"] < 0.5
    assert run.evaluate()["eval_score"] == history(run, "eval_score")[-1] != first["eval_score"]
    stored = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [e["eval_reward"] for e in stored["log_history"] if "eval_reward" in e] == history(run, "eval_reward")[:2]
    assert "| reward |" in table and "| guard_score |" in table
    for name in ("before_after.png", "reward_curve.png", "README.md", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / name).stat().st_size > 1000
    steps = [f"step-{step:06d}" for step in (0, 2)]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        s + e for s in steps for e in (".jsonl", ".png")
    ]
    rows = [json.loads(line) for line in (tmp_path / "samples/step-000000.jsonl").read_text().splitlines()]
    assert [(row["data"], row["prompt"]) for row in rows] == [
        (data, prompt) for data in ("eval", "eval_guard") for prompt in held_out["prompt"]
    ]
    assert sum(row["score"] for row in rows[:3]) / 3 == pytest.approx(first["eval_score"])


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers_work_without_a_network(tmp_path, tracker, monkeypatch, offline_wandb):
    monkeypatch.chdir(tmp_path)
    trainer(tmp_path / "run", report_to=tracker, max_steps=1).train()
    offline_wandb.finish()  # it writes in the background
    written = {"wandb": "wandb/offline-run-*/*.wandb", "tensorboard": "**/events.out.tfevents.*"}[tracker]
    assert sum(path.stat().st_size for path in tmp_path.glob(written)) > 0


def test_a_run_keeps_its_rollouts_as_a_ranked_data_set(tmp_path):
    run = trainer(tmp_path, save_rollouts=True, max_steps=2, overwrite_output_dir=True)
    run.train()  # which the next one overwrites
    run.train()
    rows = list(read_preferences(tmp_path / "rollouts"))
    assert [len(row.images) for row in rows] == [4, 4, 4, 4]  # two rollouts of two groups
    for row in rows:
        assert row.prompt in PROMPTS["prompt"]
        assert row.scores == pytest.approx(brightness([image.open() for image in row.images], []))
    stored = [score for row in rows for score in row.scores]
    assert sum(stored[:8]) / 8 == pytest.approx(history(run, "reward")[0])
    groups = [row.scores for row in rows[:2]]
    assert history(run, "reward_std")[0] == pytest.approx(sum(map(statistics.stdev, groups)) / 2)
    assert history(run, "rewards/score/std")[0] == pytest.approx(statistics.stdev(stored[:8]))


def test_a_rollout_that_is_drawn_again_after_a_resume_is_kept_once(tmp_path):
    """DPO on what was kept would count the images of every interrupted rollout twice."""
    settings = {"save_rollouts": True, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **settings).train()
    kept = list(read_preferences(tmp_path / "rollouts"))
    again = trainer(tmp_path, **settings, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    rows = list(read_preferences(tmp_path / "rollouts"))
    assert len(kept) == 4 and len(rows) == 6 and [row.scores for row in rows[:4]] == [row.scores for row in kept]
