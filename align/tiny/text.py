"""Build the tokenizer of the tiny model, a small BPE, and its text encoder, a Qwen2.5-VL that is never trained.

A random encoder is enough: it only has to give different words different features, and the denoiser learns what
they mean. At the usual initial scale of 0.02 its layers would outweigh the token embeddings, and all words would
look alike (cosine 0.6). So the embeddings are scaled to std 1 (cosine 0.1).
"""

from __future__ import annotations

import itertools
import json

import torch
from diffusers import QwenImagePipeline
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from rewards.shapes import COLORS, RELATIONS, SHAPES

WIDTH = 128  # features of each token in the encoder's output
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def prompt_template() -> str:
    """Return the text with which the stock pipeline surrounds a prompt, with "{}" in place of the prompt.

    The pipeline drops the tokens that come before the prompt.
    """
    no_components = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    return QwenImagePipeline(**no_components).prompt_template_encode


def _corpus() -> list[str]:
    """Return texts in which every word of the world and of the template is frequent.

    Each word occurs with a space before it and without. Upper-case words are left out, so that the tokenizer splits
    the words to be painted into single letters.
    """
    template = prompt_template()
    for token in SPECIAL_TOKENS:
        template = template.replace(token, "")
    nouns = [noun for shape in (*SHAPES, "object") for noun in (shape, "crosses" if shape == "cross" else shape + "s")]
    words = [
        *COLORS,
        *nouns,
        *" ".join(RELATIONS).split(),
        "a",
        "an",
        "two",
        "three",
        "on",
        "in",
        "the",
        "word",
        "background",
    ]
    pairs = [f"{first} {second}" for first, second in itertools.product(words, words)]
    return pairs + [template.format("")] * 200


def build_tokenizer() -> Qwen2Tokenizer:
    """Train a byte-level BPE that has one token for each word of the world and of the template's head.

    The head then has 34 tokens, which is the number that the stock pipeline drops.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=1024, min_frequency=2, show_progress=False, initial_alphabet=alphabet)
    )
    trained = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=1024,
    )


def build_text_encoder(tokenizer: Qwen2Tokenizer, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Build a random, frozen Qwen2.5-VL of 0.4 M parameters whose special token ids are the tokenizer's."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text_config = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        # The sections divide the rotary frequencies of one head, so they must sum to half its width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    vision_config = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
        "patch_size": 14,
        "window_size": 112,
        "spatial_merge_size": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    embeddings = encoder.get_input_embeddings().weight
    embeddings.div_(embeddings.std())
    return encoder
