"""What every family shares: its adapter or full fine-tune, the reference, the export, and what a checkpoint belongs to."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.training_utils import cast_training_params
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from align.models.adapters import check_plain, find_adapter, from_tensors, read_adapter, write_adapter
from align.models.loading import EMBEDDED, digest_file, nearest
from align.parallel.memory import Counts

#: Names of the adapters on the transformer.
TRAINED, REFERENCE = "default", "reference"
#: diffusers' own name of a transformer's files.
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"


class TrainedTransformer:
    """The transformer of a diffusers pipeline, and what of it is trained: one half of a FlowModel.

    A family adds the frozen modules, the geometry and the velocity, and says which modules no gradient reaches.

    Args:
        pipeline: loaded; all its modules are frozen and set to evaluation.
        description: tells the transformer from another, see :func:`align.models.loading.describe_transformer`.
    """

    def __init__(self, pipeline: Any, description: dict[str, Any] | None = None) -> None:
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.device = self.transformer.device
        self.dtype = self.transformer.dtype
        self.adapter = False
        self._reference_copy: nn.Module | None = None
        self._adapter_path: str | Path | None = None
        self._adapter_digest: str | None = None
        linear = [(name, m) for name, m in self.transformer.named_modules() if isinstance(m, nn.Linear)]
        self._linear = {name: (module.out_features, module.in_features) for name, module in linear}
        settings = {key: value for key, value in self.transformer.config.items() if key[0] != "_"}
        self._description = description or {"name": "a pipeline"} | settings
        for module in (self.transformer, *self.frozen_modules()):
            module.eval().requires_grad_(False)
        name_as_transformers_does(self.transformer)

    # -- what a family says ----------------------------------------------------------------------------------------

    def frozen_modules(self) -> list[nn.Module]:
        """Return the text encoders and the VAE."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's repeated blocks, in order."""
        raise NotImplementedError

    def dead_modules(self) -> list[str]:
        """Return the names of the transformer's modules that no gradient can reach."""
        raise NotImplementedError

    #: Linear layers that a LoRA adapts where it names none, by the ends of their names.
    lora_targets: tuple[str, ...] = ()
    #: Values that the backward of one block needs, per token and channel: of a full fine-tune, and of a LoRA.
    kept_by_block: ClassVar[dict[str, float]] = {"full": 0.0, "LoRA": 0.0}

    @property
    def width(self) -> int:
        """Channels of a token between the transformer's blocks."""
        raise NotImplementedError

    # -- numbers ---------------------------------------------------------------------------------------------------

    def parameter_counts(self) -> Counts:
        parameters, blocks = list(self.transformer.parameters()), self.blocks()
        return Counts(
            transformer=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
            encoders=sum(p.numel() for module in self.frozen_modules() for p in module.parameters()),
            layers=len(blocks),
            width=self.width,
            kept_by_block=self.kept_by_block["LoRA" if self.adapter else "full"],
            adapter=self.adapter,
        )

    def identity(self) -> dict[str, dict[str, Any]]:
        trained: dict[str, Any] = {"tuning": "full"}
        if self.adapter:
            trained = {"tuning": "LoRA", "adapter": self._adapter_digest}
        if TRAINED in getattr(self.transformer, "peft_config", {}):
            config = self.transformer.peft_config[TRAINED]
            targets = config.target_modules
            trained |= {
                "lora_r": config.r,
                "lora_alpha": config.lora_alpha,
                "lora_dropout": config.lora_dropout,
                "lora_target_modules": targets if isinstance(targets, str) else sorted(targets),
            }
        return {"model": self._description, "trained": trained}

    # -- adapter or full fine-tune ---------------------------------------------------------------------------------

    def _is_dead(self, name: str) -> bool:
        return any(name == dead or name.startswith(dead + ".") for dead in self.dead_modules())

    def add_lora(self, config: LoraConfig) -> list[str]:
        check_plain(config.to_dict())
        config = copy.deepcopy(config)
        matched = match_targets(config, list(self._linear), self.lora_targets)
        dead = [n for n in matched if self._is_dead(n)]
        if len(dead) == len(matched):
            raise ValueError(
                f"LoRA targets {config.target_modules!r} match only layers that never get a gradient: {dead}"
            )
        # Full names, so that the saved metadata says exactly what was adapted and the loader need not guess.
        config.target_modules, config.exclude_modules = sorted(set(matched) - set(dead)), None
        self.transformer.requires_grad_(False)
        self.transformer.add_adapter(config)
        cast_training_params(self.transformer, dtype=torch.float32)
        self.adapter = True
        return dead

    def load_adapter(self, path: str | Path) -> None:
        """Load the LoRA in ``path``, to train it further, at the strength that it says."""
        self.expect_adapter(path)
        self._load_lora(path, TRAINED)
        self.transformer.requires_grad_(False)
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(f".{TRAINED}." in name and not self._is_dead(name))

    def _load_lora(self, path: str | Path, adapter: str) -> None:
        """Load the LoRA in ``path`` in float32, as it is in the file, whatever the precision of the frozen weights."""
        lora = read_adapter(path, self._linear)
        self.transformer.load_lora_adapter(
            lora.state(), prefix=None, adapter_name=adapter, metadata=lora.settings(), low_cpu_mem_usage=True
        )
        for name, parameter in self.transformer.named_parameters():
            if f".{adapter}." in name:
                parameter.data = parameter.data.float()
        # Once more: what was loaded has been through the precision of the frozen weights.
        set_peft_model_state_dict(self.transformer, lora.state(), adapter_name=adapter)

    def expect_adapter(self, path: str | Path) -> None:
        """Say that what is trained is the adapter in ``path``; its weights may come later.

        Raises:
            FileNotFoundError, ValueError: see :func:`align.models.adapters.read_adapter`.
        """
        read_adapter(path, self._linear)
        self.adapter, self._adapter_path = True, path
        self._adapter_digest = digest_file(find_adapter(path))

    def unfreeze(self) -> list[str]:
        if self.adapter:
            raise ValueError(
                "an adapter is attached: train the adapter, or load the model without it for a full fine-tune"
            )
        dead = []
        for name, parameter in self.transformer.named_parameters():
            parameter.requires_grad_(not self._is_dead(name))
            if self._is_dead(name):
                dead.append(name)
        return dead

    # -- reference -------------------------------------------------------------------------------------------------

    def keep_reference(self) -> None:
        if not self.adapter:
            self._reference_copy = copy.deepcopy(self.transformer).eval().requires_grad_(False)
        elif self._adapter_path is not None:  # the policy started from this adapter: so does the reference
            self._load_lora(self._adapter_path, REFERENCE)
            self._activate(TRAINED)

    def share_reference(self, share: Callable[[nn.Module], nn.Module]) -> None:
        if self._reference_copy is not None:
            self._reference_copy = share(self._reference_copy)

    def _activate(self, adapter: str) -> None:
        self.transformer.set_adapter(adapter)
        for name, parameter in self.transformer.named_parameters():  # peft makes the active adapter trainable
            if "lora_" in name:
                parameter.requires_grad_(f".{TRAINED}." in name and not self._is_dead(name))

    @contextmanager
    def reference(self, transformer: nn.Module) -> Iterator[nn.Module]:
        if self._reference_copy is not None:
            yield self._reference_copy.to(self.device)
        elif REFERENCE in getattr(self.transformer, "peft_config", {}):
            self._activate(REFERENCE)
            try:
                with without_dropout(self.transformer):
                    yield transformer
            finally:
                self._activate(TRAINED)
        elif self.adapter:
            self.transformer.disable_adapters()
            try:
                yield transformer
            finally:
                self.transformer.enable_adapters()
        else:
            raise RuntimeError("no reference: attach an adapter, or call keep_reference() before training")

    # -- export ----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, state_dict: dict[str, Tensor]) -> None:
        if self.adapter:
            trained = get_peft_model_state_dict(self.transformer, state_dict=state_dict)
            write_adapter(folder, from_tensors(trained, self.transformer.peft_config[TRAINED].to_dict(), self._linear))
        else:
            # Not by save_pretrained: it writes the module's own tensors, which are empty where ZeRO-3 shares them out.
            self.transformer.save_config(Path(folder) / "transformer")
            save_torch_state_dict(state_dict, Path(folder) / "transformer", filename_pattern=WEIGHTS)

    def loading_code(self, base_model: str, folder: str) -> str:
        pipeline, transformer = type(self.pipeline).__name__, type(self.transformer).__name__
        classes = pipeline if self.adapter else f"{pipeline}, {transformer}"
        imports, base = ["import torch", f"from diffusers import {classes}"], repr(base_model)
        if base_model in EMBEDDED:  # not a name that diffusers knows
            imports.append("from align.tiny import CHECKPOINT")
            base = "CHECKPOINT"
        weights = f'{transformer}.from_pretrained("{folder}", subfolder="transformer", dtype=torch.bfloat16)'
        loading = f'pipe.load_lora_weights("{folder}")' if self.adapter else f"pipe.transformer = {weights}"
        return "\n".join([*imports, "", f"pipe = {pipeline}.from_pretrained({base}, dtype=torch.bfloat16)", loading])


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Enter a context in which a module drops nothing at random, whatever mode training has left it in."""
    dropping = [part for part in module.modules() if isinstance(part, nn.Dropout) and part.p and part.training]
    for part in dropping:
        part.eval()
    try:
        yield
    finally:
        for part in dropping:
            part.train()


def name_as_transformers_does(transformer: Any) -> None:
    """Give a diffusers model the two methods that ``transformers.Trainer`` calls by other names than diffusers has.

    The Trainer calls them on the model itself, whose class is diffusers' own: no subclass and no argument reaches them.
    """
    transformer.activation_checkpointing_enable = partial(_checkpoint_activations, transformer)
    transformer.config.to_json_string = transformer.to_json_string


def _checkpoint_activations(transformer: Any, **_: Any) -> None:
    transformer.enable_gradient_checkpointing()


def match_targets(config: LoraConfig, linear: list[str], default: Sequence[str]) -> list[str]:
    """Return the full names of the ``linear`` layers that ``config.target_modules`` matches.

    Where it names none, it is set to ``default``.

    Raises:
        ValueError: where a target, or all of them together, match no layer; it names the nearest.
    """
    if config.target_modules is None:
        config.target_modules = set(default)
    if isinstance(config.target_modules, (list, set)):
        for target in config.target_modules:
            if not any(n == target or n.endswith("." + target) for n in linear):
                suffixes = {re.sub(r"^\w+\.\d+\.(attn\.)?", "", n) for n in linear}
                raise ValueError(
                    f"LoRA target {target!r} matches no linear layer of the transformer.{nearest(target, suffixes)}"
                )
    matched = [n for n in linear if config.target_modules == "all-linear" or check_target_module_exists(config, n)]
    if not matched:
        raise ValueError(f"LoRA targets {config.target_modules!r} match no linear layer of the transformer")
    return matched
