"""Sharding an optimizer's state anew: a checkpoint under other processes, or another ZeRO stage, than wrote it.

DeepSpeed's own way, its universal checkpoints, is for Adam alone and writes the whole state to the disk once more; here
each process reads the old files, mapped into memory, and keeps its part. What is kept element by element (moments,
float32 weights) moves with its elements; beside that an optimizer may only count its steps.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.parallel.sharding import Sharding, tensors_only

#: Among the values of a parameter: its weights as the optimizer keeps them, in float32.
MASTER = "float32 weights"
STEP = "step"


def reshard(
    folder: Path,
    written: Sharding,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: Any,
    scheduler: Any,
    engine: Any = None,
) -> None:
    """Load optimizer and schedule of a checkpoint that was written under ``written``; to be called on every process.

    ``parameters``: what is trained, in the order in which the optimizer was made. ``engine``: DeepSpeed's, where there is one.

    Raises:
        ValueError: for an optimizer whose state cannot be sharded anew.
    """
    state = read_state(folder, written, list(parameters))
    if engine is None:
        _load_optimizer(optimizer, parameters, state)
    else:
        _load_engine(engine, parameters, state)
        engine.global_steps = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        engine.global_samples = engine.global_steps * engine.train_batch_size()
    _load_scheduler(scheduler, optimizer, folder)


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class OptimizerState:
    """What an optimizer keeps of each parameter.

    values: name to key to the pieces, in order, that the flat value is made of. step: updates so far, if it counts.
    """

    values: dict[str, dict[str, list[Tensor]]]
    step: float | None = None

    def add(self, name: str, key: str, value: Any, start: int, numel: int) -> None:
        """Append one more piece of a parameter's value, ``numel`` of ``value`` from ``start``."""
        self.values.setdefault(name, {}).setdefault(key, []).append(value.flatten()[start : start + numel])

    def flat(self, name: str, numel: int) -> dict[str, Tensor]:
        """Return key to the (numel,) value of a parameter; raises ValueError when it has another size."""
        flat = {key: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for key, pieces in self.values[name].items()}
        for key, value in flat.items():
            if value.numel() < numel:  # ZeRO-3 pads the pieces at the end
                raise ValueError(
                    f"the checkpoint has {value.numel()} elements of {name}'s {key}, and there are {numel}"
                )
        return {key: value[:numel] for key, value in flat.items()}


def read_state(folder: Path, written: Sharding, names: list[str]) -> OptimizerState:
    """Read the optimizer's state in a checkpoint that was written under ``written``; ``names``: in the optimizer's order.

    Raises:
        ValueError: for an optimizer that keeps more than steps and element by element values.
    """
    state = OptimizerState({name: {} for name in names})
    if not written.zero_stage:
        stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        for index, values in stored["state"].items():
            for key, value in _values(state, values, written).items():
                state.add(names[index], key, value, 0, value.numel())
        return state
    for rank in range(written.processes):
        for values, layout in _groups(folder / (folder / "latest").read_text().strip(), rank, written):
            for key, value in _values(state, values, written, values[MASTER].numel()).items():
                for name, start, numel in layout:
                    state.add(name, key, value, start, numel)
    return state


def _values(state: OptimizerState, values: dict[str, Any], written: Sharding, numel: int = 0) -> dict[str, Tensor]:
    """Return those of an optimizer's values that are kept element by element; the count of steps goes to ``state``."""
    found = {}
    for key, value in values.items():
        if key == STEP:
            state.step = float(value)
        elif torch.is_tensor(value) and value.dim() and value.is_floating_point() and value.numel() >= numel:
            found[key] = value
        elif value is not None:
            raise ValueError(
                f"the optimizer keeps {key!r}, which is not one value per element of a weight and cannot be "
                f"resharded: resume {written.launch_command()}, or train with adamw_torch or sgd"
            )
    return found


def _groups(folder: Path, rank: int, written: Sharding) -> Iterator[tuple[dict[str, Any], list[tuple[str, int, int]]]]:
    """Read the flat groups of one process: key to flat value, and (name, start, numel) of what lies in them."""
    stored = _load(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    if written.zero_stage < 3:
        flats, states = stored["single_partition_of_fp32_groups"], stored["base_optimizer_state"]["state"]
        layouts = [[(n, a.start, a.numel) for n, a in group.items()] for group in stored["param_slice_mappings"]]
    else:
        flats, states = stored["fp32_flat_groups"], stored["optimizer_state_dict"]["state"]
        shapes = _load(folder, f"*zero_pp_rank_{rank}_mp_rank_00_model_states.pt")["param_shapes"]
        layouts = [_equal_shares(group, written.processes) for group in shapes]
    for index, (flat, layout) in enumerate(zip(flats, layouts, strict=True)):
        yield {MASTER: flat} | states.get(index, {}), layout


def _equal_shares(shapes: dict[str, torch.Size], processes: int) -> list[tuple[str, int, int]]:
    """Return where the shares of one process lie: ZeRO-3 gives each process as much of every parameter."""
    layout, start = [], 0
    for name, shape in shapes.items():
        numel = -(-shape.numel() // processes)
        layout.append((name, start, numel))
        start += numel
    return layout


def _load(folder: Path, pattern: str) -> dict[str, Any]:
    """Load one of the engine's files, mapped into memory; nothing in it is run."""
    (file,) = folder.glob(pattern)
    with tensors_only():
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


# -- into an optimizer ------------------------------------------------------------------------------------------------


@torch.no_grad()
def _load_optimizer(optimizer: Any, parameters: dict[str, torch.nn.Parameter], state: OptimizerState) -> None:
    """Set an optimizer over unsharded ``parameters``, which are in its order, to ``state``."""
    stored: dict[int, dict[str, Any]] = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        values = {k: v.view(parameter.shape).clone() for k, v in state.flat(name, parameter.numel()).items()}
        master = values.pop(MASTER, None)
        if master is not None:
            parameter.copy_(master)
        stored[index] = values | _step(optimizer, state) if values else {}
    optimizer.load_state_dict({"state": stored, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _load_engine(engine: Any, parameters: dict[str, torch.nn.Parameter], state: OptimizerState) -> None:
    """Set the ZeRO optimizer of an engine to ``state``; every process takes its own share."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    stored: dict[int, dict[str, Any]] = {index: {} for index in range(len(flats))}
    for name, parameter in parameters.items():
        group, start, first, numel = _place(zero, stage, parameter)
        if not numel:
            continue
        for key, value in state.flat(name, getattr(parameter, "ds_numel", parameter.numel())).items():
            flat = flats[group]
            into = flat.data if key == MASTER else stored[group].setdefault(key, torch.zeros_like(flat))
            into[start : start + numel].copy_(value[first : first + numel])
    for values in stored.values():
        if values:
            values.update(_step(zero.optimizer, state))
    if stage == 3:  # it keeps them out of the optimizer but for a step
        zero._set_fp32_optimizer_param_groups()
    zero.optimizer.load_state_dict({"state": stored, "param_groups": zero.optimizer.state_dict()["param_groups"]})
    if stage == 3:
        zero._clear_fp32_optimizer_param_groups()


def _place(zero: Any, stage: int, parameter: Any) -> tuple[int, int, int, int]:
    """Return where this process keeps its share: (flat group, start in it, first element of the parameter, how many)."""
    if stage == 3:
        group, start, numel = zero.grad_position[zero.get_param_id(parameter)]
        first = numel * zero._get_param_partition_rank(parameter)
        return group, start, first, max(0, min(numel, parameter.ds_numel - first))
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, 0, 0, 0
    of_parameter, of_group = mapping.lp_fragment_address, mapping.hp_fragment_address
    return mapping.param_group_index, of_group.start, of_parameter.start, of_parameter.numel


def _step(optimizer: Any, state: OptimizerState) -> dict[str, Any]:
    if state.step is None:
        return {}
    # DeepSpeed's own optimizers count in a number, torch's in a tensor.
    is_deepspeeds = type(optimizer).__module__.startswith("deepspeed")
    return {STEP: int(state.step) if is_deepspeeds else torch.tensor(state.step, dtype=torch.float32)}


# -- the schedule -----------------------------------------------------------------------------------------------------


def _load_scheduler(scheduler: Any, optimizer: Any, folder: Path) -> None:
    """Set the learning-rate schedule to a checkpoint's, and the optimizer to its present rate.

    DeepSpeed drops groups without parameters; the groups differ in weight decay alone, and have one rate.
    """
    stored, groups = torch.load(folder / "scheduler.pt", weights_only=True), len(optimizer.param_groups)
    for key, values in stored.items():
        if isinstance(values, list) and values and len(values) != groups:
            stored[key] = values[:1] * groups
    scheduler.load_state_dict(stored)
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
