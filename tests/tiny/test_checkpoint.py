"""Test the committed checkpoint: stock diffusers loads it, it is small and safe, and it follows its prompts."""

import json

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open

from align.tiny import CHECKPOINT, PROMPTS, denoiser, text, vae, world
from rewards import shapes


@pytest.fixture(scope="module")
def pipeline():
    loaded = QwenImagePipeline.from_pretrained(CHECKPOINT)  # as a stock user would: no dtype
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline, prompts, seed=0, **options):
    options = {"height": 64, "width": 64, "num_inference_steps": 6, "true_cfg_scale": 1.0} | options
    return pipeline(prompts, generator=torch.Generator().manual_seed(seed), **options).images


def first_rows(name, number):
    """Return the first rows of the test file of a prompt set."""
    return [json.loads(line) for line in (PROMPTS / name / "test.jsonl").read_text().splitlines()[:number]]


def exact(pipeline, rows):
    """Return the share of exactly right images, and what each image shows."""
    prompts = [row["prompt"] for row in rows]
    images = draw(pipeline, prompts)
    scores = shapes.shapes_exact(images, prompts, spec=[row["spec"] for row in rows])
    return np.mean(scores), [shapes.measure(image) for image in images]


def test_it_is_a_qwen_image(pipeline):
    index = json.loads((CHECKPOINT / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline"
    assert {name: origin[1] for name, origin in index.items() if not name.startswith("_")} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
    }


def test_it_is_small_and_contains_no_pickle():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}
    assert (CHECKPOINT / "README.md").exists()
    for path in files:
        if path.suffix == ".json":
            assert not str(json.loads(path.read_text()).get("_name_or_path", "")).startswith("/"), path


def test_weights_are_half_precision_and_finite():
    weights = list(CHECKPOINT.rglob("*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                assert tensor.dtype == torch.bfloat16, key
                assert tensor.isfinite().all(), key


def test_head_of_the_template_is_34_tokens(pipeline):
    """The stock pipeline drops 34 tokens. With a head of another length it would cut into the prompt or leave text."""
    assert pipeline.prompt_template_encode_start_idx == 34
    head = text.prompt_template().split("{}")[0]
    for tokenizer in (pipeline.tokenizer, text.build_tokenizer()):
        assert len(tokenizer(head).input_ids) == 34
        ids = tokenizer(text.prompt_template().format("three red circles on a blue background")).input_ids
        assert tokenizer.decode(ids[34:]).startswith("three red circles on a blue background<|im_end|>")


def test_words_are_tokens_and_painted_words_are_letters(pipeline):
    def tokens(prompt):
        return [token.lstrip("Ġ") for token in pipeline.tokenizer.tokenize(prompt) if token != "Ġ"]

    for prompt in (
        "three red crosses on a blue background",
        "a cyan circle left of a white square on a purple background",
        "an object",
        "yellow triangles above black objects",
    ):
        assert tokens(prompt) == prompt.split()
    assert tokens("the word CAT in red on white") == ["the", "word", "C", "A", "T", "in", "red", "on", "white"]


def test_committed_tokenizer_and_text_encoder_are_what_the_recipe_makes(pipeline):
    tokenizer = text.build_tokenizer()
    assert tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    encoder = text.build_text_encoder(tokenizer, seed=0)
    for name, weight in pipeline.text_encoder.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name].bfloat16().float()), name


def test_text_encoder_tells_words_apart(pipeline):
    features, _ = pipeline.encode_prompt([f"{color} circles" for color in shapes.COLORS])
    words = torch.nn.functional.normalize(features[:, 0], dim=-1)
    similarity = words @ words.T - torch.eye(len(words))
    assert similarity.max() < 0.5


def test_untrained_components_have_the_configuration_of_the_checkpoint(pipeline):
    def settings(config):
        public = {key: value for key, value in config.items() if not key.startswith(("_", "latents_"))}
        return json.loads(json.dumps(public))  # JSON turns the tuples into lists, as in the file

    assert settings(denoiser.build_denoiser().config) == settings(pipeline.transformer.config)
    assert settings(vae.build_vae().config) == settings(pipeline.vae.config)
    assert settings(denoiser.build_scheduler().config) == settings(pipeline.scheduler.config)


def test_one_frame_path_is_exact(pipeline):
    """The recipe's 2-D convolutions give the results of the causal 3-D ones, and leave the VAE unchanged."""
    specs = [world.parse("a red cross on a white background"), world.parse("the word CAT in red on white")]
    images = [world.render(spec, world.random.Random(0)) for spec in specs]
    pixels = vae.to_pixels(images)
    with torch.no_grad():
        expected = pipeline.vae.encode(pixels).latent_dist.mode()
        latents = vae.encode(pipeline.vae, images)
        assert torch.allclose(latents, expected, atol=1e-4)
        decoded = vae.to_pixels(vae.decode(pipeline.vae, latents))
        assert (decoded - pipeline.vae.decode(latents).sample.clamp(-1, 1)).abs().max() < 0.01
        assert torch.equal(pipeline.vae.encode(pixels).latent_dist.mode(), expected)


def test_vae_reconstructs_pictures():
    pipeline = QwenImagePipeline.from_pretrained(CHECKPOINT)  # as a stock user would: no dtype
    rng = world.random.Random(0)
    specs = [world.sample(rng, kind, "held-out")[1] for kind in ("count", "pair", "word") for _ in range(12)]
    images = [world.render(spec, rng) for spec in specs]
    reconstructions = vae.decode(pipeline.vae, vae.encode(pipeline.vae, images))
    assert vae.psnr(images, reconstructions) > 26
    assert vae.psnr(images, images[1:] + images[:1]) < 15
    assert np.mean(shapes.shapes_exact(reconstructions, [""] * len(images), spec=specs)) > 0.85


def test_latents_are_normalised(pipeline):
    rng = world.random.Random(0)
    images = [world.render(world.sample(rng, kind)[1], rng) for kind in ("count", "pair", "word") for _ in range(32)]
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents = (vae.encode(pipeline.vae, images) - mean) / std
    spread = latents.std((0, 2, 3, 4))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.3
    assert spread.max() < 1.4 and spread.median() > 0.02


def test_a_seed_gives_the_same_picture_and_another_seed_another(pipeline):
    first, repeated, other_seed = (np.asarray(draw(pipeline, ["two squares"], seed)[0]) for seed in (0, 0, 1))
    assert first.shape == (64, 64, 3)
    assert (first == repeated).all() and (first != other_seed).any()


def test_prompts_are_followed(pipeline):
    """The thresholds are far below the figures of the model card, and far above chance (0.00 for complete prompts)."""
    share, scenes = exact(pipeline, first_rows("background", 32))
    assert share > 0.5
    assert len({scene.background for scene in scenes}) >= 5  # the prompts do not mention the background
    assert exact(pipeline, first_rows("counts", 24))[0] > 0.5
    rows = first_rows("words", 24)
    images = draw(pipeline, [row["prompt"] for row in rows])
    letters = shapes.shapes_word(images, [], spec=[row["spec"] for row in rows])
    assert np.mean(letters) > 0.35


def test_guidance_works(pipeline):
    """Classifier-free guidance works with the empty prompt that the model was trained with."""
    prompts = ["a red circle on a blue background"] * 4
    guided = draw(pipeline, prompts, true_cfg_scale=2.0, negative_prompt=denoiser.UNPROMPTED)
    unguided = draw(pipeline, prompts)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(guided, unguided, strict=True))
    assert all(shapes.measure(image).background == "blue" for image in guided)
