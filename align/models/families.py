"""The families of models: from a pipeline's class to its adapter, imported only when it is used.

A new family is one file and one row of :data:`FAMILIES`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from align.models.contract import FlowModel
from align.models.loading import check_weights, describe_transformer, nearest, resolve_folder

#: The pipeline's class, as ``model_index.json`` says it, to its adapter: a class with ``load`` and ``outline``.
FAMILIES = {"QwenImagePipeline": "align.models.qwen_image:QwenImage"}


def family(folder: Path) -> Any:
    """Import the adapter of the model in ``folder``.

    Raises:
        ValueError: no family has the pipeline's class; it names the nearest that one has.
    """
    name = json.loads((folder / "model_index.json").read_text()).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}, which no family here knows." + nearest(str(name), set(FAMILIES)))
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(import_module(module), attribute)


def load_model(name: str | Path, dtype: torch.dtype = torch.float32, offload: bool = False) -> FlowModel:
    """Load a model with its weights.

    Args:
        name: a folder in the layout of a diffusers pipeline, a hub name, or ``tiny``.
        dtype: of the weights.
        offload: keep the text encoder and the VAE on the CPU while they are not in use.

    Raises:
        FileNotFoundError: naming what a folder lacks, or what to download and where to put it.
        ValueError: no family has this kind of pipeline.
    """
    folder = resolve_folder(name)
    adapter = family(folder)
    check_weights(folder)
    return adapter.load(folder, dtype, offload, describe_transformer(str(name), folder))


def outline(name: str | Path, lora: LoraConfig | None = None, adapter: str | Path | None = None) -> FlowModel:
    """Build a model without its weights, its trained parameters made ready, holding no memory.

    Args:
        name: as for :func:`load_model`; the folder's weights may be missing.
        lora: the fresh adapter to attach.
        adapter: the file, or its folder, of the adapter that will be trained; with neither the whole transformer is.
    """
    folder = resolve_folder(name)
    model = family(folder).outline(folder, describe_transformer(str(name), folder))
    if lora is not None:
        model.add_lora(lora)
    elif adapter is not None:
        model.expect_adapter(adapter)
    else:
        model.unfreeze()
    return model


@dataclass(frozen=True)
class Deferred:
    """A model that is loaded when everything has been checked against its outline.

    dtype: of the weights that will be read; None for a model that is loaded already. offload: see :func:`load_model`.
    """

    outline: FlowModel
    load: Callable[[], FlowModel]
    dtype: torch.dtype | None = None
    offload: bool = False

    @classmethod
    def of(cls, model: "FlowModel | str | Deferred", lora: LoraConfig | None = None) -> "Deferred":
        """Defer a model by its name, on which ``lora`` will be trained; a loaded one is its own outline."""
        if isinstance(model, Deferred):
            return model
        if isinstance(model, str):
            return cls(outline(model, lora), lambda: load_model(model), torch.float32)
        return cls(model, lambda: model)
