"""LoRA files: the layouts that are common, read to one form, and the one that is written, which all tools read alike.

What is read: the names of diffusers, PEFT, DiffSynth-Studio, ComfyUI, kohya and musubi-tuner, see :data:`_KEY`.

What is written has no alpha that a tool would have to know of. diffusers reads it from the metadata and not from a tensor,
ComfyUI from a tensor and not from the metadata; all of them take the rank where they find none. So alpha is folded into B.
The alpha that it was trained with, at which the optimizer's steps have their size, is in metadata of our own.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

#: The name that diffusers gives a LoRA's file, and the one that PEFT does.
LORA_FILE = "pytorch_lora_weights.safetensors"
_NAMED = (LORA_FILE, "adapter_model.safetensors")
#: Where a LoRA says its alpha: diffusers in the file, PEFT beside it, kohya in a tensor for each layer.
_DIFFUSERS, _PEFT = "lora_adapter_metadata", "adapter_config.json"
#: Our key in a file's metadata: the alphas that are folded into B, and the dropout.
_OURS = "flow_align_lora"
#: Before a layer's name in the files that we write: diffusers' own "transformer." is none to DiffSynth-Studio.
_WRITTEN = "diffusion_model."
#: Before a layer's name: of PEFT, DiffSynth-Studio, ComfyUI and diffusers.
_PREFIXES = ("base_model.model.", "pipe.dit.", "diffusion_model.", "transformer.")
#: Before a layer's name with underscores for dots: of kohya and musubi-tuner, OneTrainer, LyCORIS.
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_KEY = re.compile(r"(?P<layer>.+?)\.(?:lora[_.](?P<side>A|B|down|up)(?:\.default)?\.weight|alpha)")
_SIDES = {"A": "A", "down": "A", "B": "B", "up": "B", None: "alpha"}
#: Ways to begin that leave the frozen weights as they were: with another, A and B alone do not say what was learnt.
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Lora:
    """A LoRA: for each adapted layer W + (alpha / rank) B @ A.

    down: A of each layer, (rank, in). up: B of each layer, (out, rank). alphas: alpha of each layer.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    alphas: dict[str, float]
    dropout: float = 0.0

    def state(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's names for them."""
        down = {f"{layer}.lora_A.weight": tensor for layer, tensor in self.down.items()}
        return down | {f"{layer}.lora_B.weight": tensor for layer, tensor in self.up.items()}

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the ``LoraConfig`` that adapts these layers at this strength."""
        ranks = {layer: len(tensor) for layer, tensor in self.down.items()}
        rank, alpha = _most_common(ranks), _most_common(self.alphas)
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(n)}": a for n, a in self.alphas.items() if a != alpha},
            "lora_dropout": self.dropout,
            "target_modules": sorted(self.down),  # full names: nothing is left to guess
        }

    def written(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata of a file that every tool reads as this LoRA, see the module."""
        tensors = {}
        for layer, down in self.down.items():
            tensors[f"{_WRITTEN}{layer}.lora_A.weight"] = down.detach().contiguous()
            tensors[f"{_WRITTEN}{layer}.lora_B.weight"] = self.up[layer].detach() * (self.alphas[layer] / len(down))
        settings = self.settings()
        kept = {name: settings[name] for name in ("lora_alpha", "alpha_pattern", "lora_dropout")}
        return tensors, {"format": "pt", _OURS: json.dumps({"folded": True} | kept, sort_keys=True)}


def _most_common(numbers: Mapping[str, Any]) -> Any:
    return Counter(numbers.values()).most_common(1)[0][0]


def check_plain(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a variant of LoRA that is more than two matrices and a scale."""
    for name in ("use_dora", "use_qalora", "lora_bias", "modules_to_save", "layer_replication"):
        if settings.get(name):
            raise ValueError(f"{name} is not supported: a LoRA here is two matrices and an alpha for each layer")
    if settings.get("bias") not in (None, "none"):
        raise ValueError(f"bias {settings['bias']!r} is not supported: a LoRA here trains no bias")
    if settings.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights {settings['init_lora_weights']!r} changes the frozen weights too: use true or 'gaussian'"
        )


def effective_alphas(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return for each layer the alpha with which alpha / rank is PEFT's scale; without a word of it, the rank."""
    pattern, alphas = settings.get("alpha_pattern") or {}, dict[str, float]()
    for layer, rank in ranks.items():
        alpha = pattern.get(get_pattern_key(pattern, layer), settings.get("lora_alpha", rank))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"the alpha of {layer} is stored as {alpha!r}, which is no number")
        alphas[layer] = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    return alphas


def write_adapter(folder: str | Path, lora: Lora) -> None:
    """Write a LoRA under diffusers' name for its file."""
    tensors, metadata = lora.written()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / LORA_FILE, metadata=metadata)


# -- reading -----------------------------------------------------------------------------------------------------------


def find_adapter(name: str | Path) -> Path:
    """Return the file of a LoRA, from its path or that of its folder.

    Raises:
        FileNotFoundError: there is none. ValueError: a file of another kind, or a folder that leaves the choice open.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"adapter {name} is no .safetensors file")
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"adapter {name} does not exist here: give a .safetensors file, or its folder. A hub name is not taken: "
            f"`hf download {name} --local-dir FOLDER` gets it, where it is one"
        )
    files = sorted(file.name for file in path.glob("*.safetensors"))
    candidates = [file for file in _NAMED if file in files] or files
    if not candidates:
        raise FileNotFoundError(f"adapter folder {name} has no {LORA_FILE}, nor any other .safetensors file")
    if len(candidates) > 1:
        raise ValueError(
            f"adapter folder {name} has several files: {', '.join(candidates)}. Name the one that is wanted, "
            f"as in --adapter {path / candidates[0]}"
        )
    return path / candidates[0]


def read_adapter(name: str | Path, layers: Mapping[str, tuple[int, int]]) -> Lora:
    """Read a LoRA in any of the layouts.

    Args:
        layers: (out, in) of each linear layer of the model, by its name.

    Raises:
        FileNotFoundError: see :func:`find_adapter`.
        ValueError: a tensor that belongs to no layer, or does not fit it, or a variant of LoRA that is not known.
    """
    file = find_adapter(name)
    try:
        with safe_open(file, "pt") as stored:
            tensors = {key: stored.get_tensor(key).float() for key in stored.keys()}  # noqa: SIM118 - it is no mapping
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"adapter {file} cannot be read: {error}") from error
    beside = file.with_name(_PEFT)
    try:
        settings = stored_settings(metadata, beside.read_text() if beside.is_file() else None)
        if settings is None and any(key.startswith(_PREFIXES[0]) for key in tensors):
            logger.warning(
                "adapter %s has no %s beside it, which says its alpha: it is taken to be the rank", file, _PEFT
            )
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{key} holds numbers that are NaN or infinite")
        return from_tensors(tensors, settings or {}, layers)
    except ValueError as error:
        raise ValueError(f"adapter {file}: {error}") from None


def stored_settings(metadata: Mapping[str, str], beside: str | None) -> dict[str, Any] | None:
    """Return what a file's metadata, or the text of PEFT's config beside it, say of a LoRA; None where there is nothing."""
    if _OURS in metadata:
        return _mapping(metadata[_OURS], _OURS)
    if _DIFFUSERS in metadata:
        stored = _mapping(metadata[_DIFFUSERS], _DIFFUSERS)
        return {key.removeprefix("transformer."): value for key, value in stored.items()}
    return None if beside is None else _mapping(beside, _PEFT)


def _mapping(text: str, what: str) -> dict[str, Any]:
    """Read a mapping, as JSON, and raise ValueError for anything else."""
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise ValueError(f"its {what} is not JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"its {what} is no mapping")
    return mapping


def from_tensors(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], layers: Mapping[str, tuple[int, int]]
) -> Lora:
    """Return the LoRA that a file's tensors are, with what was stored about it.

    Raises:
        ValueError: see :func:`read_adapter`.
    """
    check_plain(settings)
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}, "alpha": {}}
    names: dict[tuple[str, str], str] = {}
    flat, strange = {layer.replace(".", "_"): layer for layer in layers}, []
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        layer = found and _layer(found["layer"], layers, flat)
        if found is None or layer is None:
            strange.append(key)
            continue
        side = _SIDES[found["side"]]
        if tensor.numel() == 0 or (tensor.numel() != 1 if side == "alpha" else tensor.ndim != 2):
            raise ValueError(
                f"{key} has the shape {tuple(tensor.shape)}: A and B are matrices, and alpha is one number"
            )
        if layer in sides[side]:
            raise ValueError(f"{key} and {names[layer, side]} are for the same layer")
        sides[side][layer], names[layer, side] = tensor, key
    if strange or not sides["A"]:
        raise ValueError(_strange(strange, len(tensors), layers))
    down, up = sides["A"], sides["B"]
    for layer in sorted(down.keys() | up.keys() | sides["alpha"].keys()):
        if layer not in down or layer not in up:
            raise ValueError(f"{layer} has only one of its two matrices, A and B (down and up)")
        (out, into), rank = layers[layer], len(down[layer])
        if down[layer].shape != (rank, into) or up[layer].shape != (out, rank):
            raise ValueError(
                f"{layer} has matrices of shapes {tuple(down[layer].shape)} and {tuple(up[layer].shape)}, and the model's "
                f"layer needs ({rank}, {into}) and ({out}, {rank}): it is the LoRA of another model"
            )
    ranks = {layer: len(tensor) for layer, tensor in down.items()}
    alphas = effective_alphas(settings, ranks)
    in_file: dict[str, float] = {layer: alpha.item() for layer, alpha in sides["alpha"].items()}
    if settings.get("folded"):  # take out of B what goes beyond the file's own alpha: converters add one, the rank
        up = {layer: tensor / (alphas[layer] / in_file.get(layer, ranks[layer])) for layer, tensor in up.items()}
    else:
        alphas |= in_file
    return Lora(down, up, alphas, settings.get("lora_dropout") or 0.0)


def _layer(name: str, layers: Mapping[str, Any], flat: Mapping[str, str]) -> str | None:
    """Return the layer that a file means by a name, or None."""
    for prefix in _FLAT:
        if name.startswith(prefix):
            return flat.get(name.removeprefix(prefix))
    while name not in layers:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        if not prefix:
            return None
        name = name.removeprefix(prefix)
    return name


def _strange(keys: list[str], count: int, layers: Iterable[str]) -> str:
    """Say which keys belong to no layer, and what keys that do look like."""
    if not count:
        return "it holds no tensor"
    wanted = [f"transformer.{layer}.lora_A.weight" for layer in layers]
    near = get_close_matches(keys[0] if keys else "", wanted, n=2, cutoff=0)
    return (
        f"{len(keys)} of its {count} tensors belong to no linear layer of the model: {', '.join(keys[:3])}"
        f"{', ...' if len(keys) > 3 else ''}. Names that do are like {', '.join(near)}"
    )
