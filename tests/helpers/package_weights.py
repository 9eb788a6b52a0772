"""Runs in the environment of a reward's PyPI package: a checkpoint with random weights, from the package's own classes.

    python package_weights.py NAME FOLDER

Writes the checkpoint and the tokenizer into FOLDER, and the args that name them into FOLDER/args.json.
"""

import gzip
import json
import sys
from pathlib import Path

import torch


def write_hpsv2(folder: Path) -> dict:
    from rewards.learned import package_hpsv2

    package_hpsv2._install_vocabulary()
    from hpsv2.src.open_clip import create_model_and_transforms, tokenizer

    model = create_model_and_transforms("ViT-H-14", None, precision="amp", device="cpu", output_dict=True)[0]
    shake(model)
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    made = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {made.get(token, token): row for token, row in tokenizer._tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = gzip.decompress(Path(tokenizer.default_bpe()).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return {"checkpoint": str(folder)}


def write_imagereward(folder: Path) -> dict:
    from rewards.learned import package_imagereward

    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    args = {"tokenizer": str(folder), "med_config": str(folder / "med_config.json")}
    model = package_imagereward.build(**args, device=torch.device("cpu"))
    shake(model)
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return {**args, "checkpoint": str(folder / "ImageReward.pt")}


def shake(model: torch.nn.Module) -> None:
    """Weights at which pictures and prompts differ, biases and norms that are not their first 0 and 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "mlp.layers" in name or "attn" in name or "attention" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def main(name: str, folder: Path) -> None:
    args = {"hpsv2": write_hpsv2, "imagereward": write_imagereward}[name](folder)
    (folder / "args.json").write_text(json.dumps(args))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
