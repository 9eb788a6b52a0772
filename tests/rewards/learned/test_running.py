"""Learned rewards on random weights of a small architecture, each read from its checkpoint's own format.

What a score must be is computed from plain torch modules that carry the original code's names
(tests/helpers/reward_checkpoints.py), or by transformers called as its documentation calls it.
"""

import html
import logging
import math

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from reward_checkpoints import PICTURES, PROMPTS, RewardWorld, normalized, picture
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

NAMES = ["hpsv2", "imagereward", "pickscore", "clipscore", "aesthetic"]
READ_PROMPTS = NAMES[:4]


# --- What the scores are ---


def clip_ids(world: RewardWorld, prompts: list[str]) -> torch.Tensor:
    """As open_clip: the cleaned text between its two tokens, zeros up to 77."""
    words = CLIPTokenizer.from_pretrained(world.words)
    rows = torch.zeros(len(prompts), 77, dtype=torch.int64)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = words(html.unescape(html.unescape(ftfy.fix_text(prompt))).strip())["input_ids"]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def test_hpsv2_is_the_cosine_of_open_clips_towers(world):
    squares = [picture(28, 28, seed) for seed in range(4)]
    with torch.no_grad():
        expected = world.hps(torch.stack([normalized(p) for p in squares]), clip_ids(world, PROMPTS))
    assert world.make("hpsv2")(squares, PROMPTS) == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.01  # the towers tell the pairs apart
    assert clip_ids(world, PROMPTS)[3].tolist() != clip_ids(world, ["quick & cafe 3.14!!"])[0].tolist()


@pytest.mark.parametrize(("width", "height"), [(28, 14), (14, 28), (56, 27)])
def test_hpsv2_sees_the_whole_picture_on_black(world, width, height):
    from rewards.learned.hpsv2 import pixels

    plain = pixels(Image.new("RGB", (width, height), (255, 0, 0)), 28, True)
    inside = normalized(Image.new("RGB", (1, 1), (255, 0, 0)))
    outside = normalized(Image.new("RGB", (1, 1), (0, 0, 0)))
    tall, wide = round(height * 28 / max(width, height)), round(width * 28 / max(width, height))
    top, left = (28 - tall) // 2, (28 - wide) // 2
    expected = outside.expand(3, 28, 28).clone()
    expected[:, top : top + tall, left : left + wide] = inside
    assert plain.shape == (3, 28, 28) and torch.allclose(plain, expected, atol=1e-5)


def test_hpsv2_smooths_what_it_makes_smaller_unless_told_not_to(world):
    from rewards.learned.hpsv2 import pixels

    fine = Image.fromarray(np.random.default_rng(0).integers(0, 256, (280, 280, 3), dtype=np.uint8))
    smooth, rough = (pixels(fine, 28, antialias) for antialias in (True, False))
    assert 3 * smooth.std() < rough.std() < 1.5  # the noise is 1.1
    assert world.make("hpsv2")([fine], ["a"]) != world.make("hpsv2", antialias=False)([fine], ["a"])


def bert_ids(world: RewardWorld, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    words = BertTokenizer.from_pretrained(world.bert)
    words.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    found = words(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def test_imagereward_is_blips_reading_of_the_picture(world):
    squares = [picture(32, 32, seed) for seed in range(4)]
    prompts = [*PROMPTS[:3], "a [ENC] cat " + "red " * 50]  # a special token, and a prompt that is cut
    with torch.no_grad():
        expected = world.blip(torch.stack([normalized(p) for p in squares]), *bert_ids(world, prompts))
    reward = world.make("imagereward")
    assert reward(squares, prompts) == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.01 and reward.truncated == 1


def test_imagereward_sees_the_middle_square(world):
    from rewards.learned.imagereward import pixels

    wide = picture(96, 32, 5)
    assert torch.allclose(pixels(wide, 32), normalized(wide.crop((32, 0, 64, 32))), atol=1e-6)
    tall = picture(50, 151, 6)
    scaled = tall.resize((32, 96), Image.Resampling.BICUBIC)
    assert torch.allclose(pixels(tall, 32), normalized(scaled.crop((0, 32, 32, 64))), atol=1e-6)


@pytest.fixture(scope="module")
def logits(world) -> torch.Tensor:
    """exp(logit scale) x cosine of each picture and its prompt, by transformers called plainly."""
    model = CLIPModel.from_pretrained(world.clip).eval()
    words, images = CLIPTokenizer.from_pretrained(world.clip), CLIPImageProcessorPil.from_pretrained(world.clip)
    text = words(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**text, **images(PICTURES, return_tensors="pt")).logits_per_image.diagonal()


def test_clipscore_is_a_hundred_cosines(world, logits):
    scores = world.make("clipscore")(PICTURES, PROMPTS)
    assert scores == pytest.approx((100 * logits / math.exp(3.0)).tolist(), abs=1e-3)
    assert np.std(scores) > 1


def test_pickscore_is_the_scaled_cosine_divided(world, logits):
    assert world.make("pickscore")(PICTURES, PROMPTS) == pytest.approx((logits / 26).tolist(), abs=1e-5)
    raw = world.make("pickscore", divide_by=1)
    assert raw(PICTURES, PROMPTS) == pytest.approx(logits.tolist(), abs=1e-4)
    assert world.make("pickscore", processor=str(world.clip))(PICTURES, PROMPTS)[0] == pytest.approx(logits[0] / 26)


def test_aesthetic_is_the_head_on_the_unit_embedding_and_reads_no_prompt(world):
    model, images = CLIPModel.from_pretrained(world.clip).eval(), CLIPImageProcessorPil.from_pretrained(world.clip)
    with torch.no_grad():
        seen = model.get_image_features(**images(PICTURES, return_tensors="pt")).pooler_output
        expected = world.head(seen / seen.norm(dim=-1, keepdim=True))[:, 0].tolist()
    reward = world.make("aesthetic")
    assert reward(PICTURES, PROMPTS) == pytest.approx(expected, abs=1e-5)
    assert reward(PICTURES, PROMPTS) == reward(PICTURES, ["x"] * 4)


# --- What holds for all of them ---


@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_is_batched_in_any_order(world, name):
    reward = world.make(name)
    together = reward(PICTURES, PROMPTS)
    assert [type(score) for score in together] == [float] * 4 and len(set(together)) == 4
    alone = [reward([image], [prompt])[0] for image, prompt in zip(PICTURES, PROMPTS, strict=True)]
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
    assert reward(PICTURES[::-1], PROMPTS[::-1]) == pytest.approx(together[::-1], rel=1e-5, abs=1e-5)
    assert world.make(name, batch_size=3)(PICTURES, PROMPTS) == pytest.approx(together, rel=1e-5, abs=1e-5)
    assert world.make(name, dtype="bfloat16")(PICTURES, PROMPTS) == pytest.approx(together, abs=0.1 * np.ptp(together))
    assert reward([], []) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_size_and_mode_of_image_is_scored(world, name):
    reward = world.make(name)
    images = [Image.new("L", (8000, 8000), 90), Image.new("RGB", (1, 1), "red"), picture(1, 6000), picture(6000, 1)]
    scores = reward(images, ["a cat"] * 4)
    assert all(math.isfinite(score) for score in scores)
    red = [Image.new("RGB", (30, 30), "red"), Image.new("P", (30, 30)), Image.new("RGBA", (30, 30), (255, 0, 0, 255))]
    red[1].putpalette([255, 0, 0])
    assert len(set(reward(red, ["a cat"] * 3))) == 1
    white, clear = Image.new("L", (30, 30), 255), Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    assert len(set(reward([white, clear, Image.new("1", (30, 30), 1)], ["a cat"] * 3))) == 1


@pytest.mark.parametrize("name", READ_PROMPTS)
def test_a_long_prompt_is_scored_by_its_beginning_warned_of_once_and_counted(world, name, caplog):
    reward, (red, blue) = world.make(name), (" ".join(["a red cat"] * 40 + end) for end in (["hat"], ["dog"]))
    with caplog.at_level(logging.WARNING):
        scores = reward(PICTURES[:1] * 3, [red, blue, "a cat"])
        assert reward(PICTURES[:1], [red])[0] == pytest.approx(scores[0], abs=1e-5)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[0] - scores[2]) > 1e-4
    limit = 35 if name == "imagereward" else 77
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and f"reward '{name}' reads only {limit} tokens" in said[0] and "this one has 123" in said[0]
    assert reward.truncated == 3


@pytest.mark.parametrize("name", READ_PROMPTS)
def test_an_empty_prompt_is_scored_and_one_that_is_no_text_or_too_many_are_refused(world, name):
    reward = world.make(name)
    assert math.isfinite(reward(PICTURES[:1], [""])[0])
    with pytest.raises(TypeError, match="prompt 1 is NoneType, not text"):
        reward(PICTURES[:2], ["a", None])
    with pytest.raises(ValueError, match="3 images and 1 prompts"):
        reward(PICTURES[:3], ["a"])


def test_nan_stays_nan(world, tmp_path):
    state = torch.load(world.folder / "ImageReward.pt", weights_only=True)
    state["mlp.layers.7.bias"][:] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    assert all(
        math.isnan(score) for score in world.make("imagereward", checkpoint=str(tmp_path / "nan.pt"))(PICTURES, PROMPTS)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_an_offloaded_model_is_off_the_accelerator_between_calls(world, name):
    on_cpu = world.make(name, device="cpu")(PICTURES, PROMPTS)
    reward, kept = world.make(name, offload=True), world.make(name)
    scores = reward(PICTURES, PROMPTS)
    assert scores == pytest.approx(on_cpu, abs=2e-3, rel=1e-3)

    def devices(reward) -> set[str]:
        return {
            p.device.type
            for part in vars(part_of(reward)).values()
            if hasattr(part, "parameters")
            for p in part.parameters()
        }

    assert devices(reward) == {"cpu"}
    before = torch.cuda.memory_allocated()
    kept(PICTURES, PROMPTS)
    assert devices(kept) == {"cuda"} and torch.cuda.memory_allocated() > before


def part_of(reward):
    """What holds the modules: of the CLIP family its `clip`."""
    return getattr(reward, "clip", reward)
