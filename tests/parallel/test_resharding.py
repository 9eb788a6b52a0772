"""What an optimizer knows, read from a checkpoint and given to another optimizer, on one process."""

from pathlib import Path

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from align.parallel.resharding import MASTER, read_state, reshard
from align.parallel.sharding import Sharding

PLAIN = Sharding(0, 1)


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (5,), "c": (2, 2, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def stepped(weights: dict[str, torch.nn.Parameter], optimizer, scheduler, updates: int) -> None:
    for update in range(updates):
        for weight in weights.values():
            weight.grad = torch.sin(weight.detach() + update)
        optimizer.step()
        scheduler.step()


def made(weights, groups: int = 1, kind=torch.optim.AdamW):
    """An optimizer over ``weights`` and a rate that falls; further groups are empty, as transformers makes them."""
    lists = [list(weights.values()), *([] for _ in range(groups - 1))]
    optimizer = kind([{"params": params} for params in lists], lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))


@pytest.fixture
def written(tmp_path):
    """A checkpoint after three updates by Adam, the weights then and the weights two updates later."""
    weights = parameters()
    optimizer, scheduler = made(weights)
    stepped(weights, optimizer, scheduler, 3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    then = {name: weight.detach().clone() for name, weight in weights.items()}
    stepped(weights, optimizer, scheduler, 2)
    return tmp_path, then, weights


@pytest.mark.parametrize("groups", [1, 2])
def test_an_optimizer_goes_on_from_what_is_read(written, groups):
    folder, then, later = written
    weights = {name: torch.nn.Parameter(value) for name, value in then.items()}
    optimizer, scheduler = made(weights, groups)
    reshard(folder, PLAIN, weights, optimizer, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1 / 4] * groups == scheduler.get_last_lr()
    stepped(weights, optimizer, scheduler, 2)
    assert all(torch.equal(weights[name], later[name]) for name in weights)


def test_moments_and_steps_are_read_by_name(written):
    folder, _, weights = written
    state = read_state(folder, PLAIN, list(weights))
    assert state.step == 3 and set(state.values["b"]) == {"exp_avg", "exp_avg_sq"}
    assert state.flat("c", 8)["exp_avg"].shape == (8,) and MASTER not in state.values["c"]
    with pytest.raises(ValueError, match="the checkpoint has 5 elements of b's exp_avg, and there are 6"):
        state.flat("b", 6)


def split_by_zero(folder: Path, stage: int, then: dict[str, torch.Tensor]) -> None:
    """Lay the optimizer's files out anew, as DeepSpeed does for two processes: half of every weight each, or of them all."""
    moments = read_state(folder, PLAIN, list(then)).values
    values = {"fp32": then} | {key: {n: moments[n][key][0] for n in then} for key in ("exp_avg", "exp_avg_sq")}
    (folder / "latest").write_text("global_step3")
    step = folder / "global_step3"
    step.mkdir()
    for rank in (0, 1):
        flat = {}
        for key, of_names in values.items():
            lists = [value.flatten() for value in of_names.values()]
            # Padded to be shared evenly, each weight or the whole, with what would be noticed among the weights.
            lists = lists if stage == 3 else [torch.cat(lists)]
            flat[key] = torch.cat([torch.cat([v, torch.full((len(v) % 2,), 99.0)]).chunk(2)[rank] for v in lists])
        master = flat.pop("fp32")
        state = {0: flat | {"step": torch.tensor(3.0)}}
        if stage == 3:
            stored = {"fp32_flat_groups": [master], "optimizer_state_dict": {"state": state}}
            shapes = {"param_shapes": [{name: value.shape for name, value in then.items()}]}
            torch.save(shapes, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:  # of 6, 5 and 8 elements the first process has 10: all of a and 4 of b
            pieces = [{"a": (0, 6), "b": (6, 4)}, {"b": (0, 1), "c": (1, 8)}][rank]
            pieces = {name: fragment_address(numel=numel, start=start) for name, (start, numel) in pieces.items()}
            stored = {"single_partition_of_fp32_groups": [master], "base_optimizer_state": {"state": state}}
            stored["param_slice_mappings"] = [pieces]
        torch.save({"optimizer_state_dict": stored}, step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.mark.parametrize("stage", [1, 3])
def test_what_two_processes_shared_goes_on_as_it_was_on_one(written, stage):
    """Weights and moments would be those of other elements, padding among them: the run goes on, but as another one."""
    folder, then, later = written
    split_by_zero(folder, stage, then)
    weights = {name: torch.nn.Parameter(torch.zeros_like(value)) for name, value in then.items()}
    optimizer, scheduler = made(weights)
    reshard(folder, Sharding(stage, 2), weights, optimizer, scheduler)
    assert all(torch.equal(weights[name], then[name]) for name in weights)  # from the optimizer's float32
    stepped(weights, optimizer, scheduler, 2)
    assert all(torch.equal(weights[name], later[name]) for name in weights)


def test_what_is_not_kept_element_by_element_is_refused_with_what_would_do(tmp_path):
    weights = parameters()
    optimizer, scheduler = made(weights, kind=torch.optim.Adafactor)
    stepped(weights, optimizer, scheduler, 1)
    stored = optimizer.state_dict()
    stored["state"][0]["RMS"] = 0.5  # as transformers' own Adafactor keeps it
    torch.save(stored, tmp_path / "optimizer.pt")
    message = (
        r"the optimizer keeps 'RMS', which .* resume with configs/accelerate/ddp.yaml or single.yaml, or train with"
    )
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path, PLAIN, list(weights))
