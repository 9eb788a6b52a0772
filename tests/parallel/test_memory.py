"""The sums that are made before a model is loaded: by hand, by real models, and by DeepSpeed's own."""

from pathlib import Path

import pytest
import torch
import true_size
from diffusers import QwenImageTransformer2DModel
from launched import GLOO, ROOT, TWO, here, start
from peft import LoraConfig

from align.cli.arguments import ModelArguments
from align.cli.launch import defer_model
from align.dpo import DPOConfig
from align.engine import checks
from align.engine.checks import check_memory, setup_of
from align.grpo import GRPOConfig
from align.models.families import Deferred, outline
from align.models.qwen_image import QwenImage
from align.parallel.memory import (
    GIB,
    LAUNCHERS,
    Counts,
    Setup,
    check_fits,
    memory_use,
)
from align.sft import SFTConfig, SFTTrainer
from align.tiny import CHECKPOINT

#: Numbers that are easy to reckon with: 1000 parameters, all or 10 of them trained.
FULL = Counts(
    transformer=1000, trained=1000, block=100, encoders=300, layers=10, width=8, kept_by_block=28.2, adapter=False
)
LORA = Counts(
    transformer=1010, trained=10, block=101, encoders=300, layers=10, width=8, kept_by_block=17.3, adapter=True
)


@pytest.fixture(scope="module")
def true_folder(tmp_path_factory) -> Path:
    return true_size.write_configs(tmp_path_factory.mktemp("true") / "model")


@pytest.fixture(scope="module")
def true_full(true_folder) -> Counts:
    return outline(true_folder).parameter_counts()


# --- The sums, by hand ---


@pytest.mark.parametrize(
    ("counts", "setup", "weights", "gradients", "optimizer"),
    [
        (FULL, Setup(half=False), 4000, 4000, 8000),
        (FULL, Setup(), 6000, 4000, 8000),  # autocast's copies
        (FULL, Setup(moments=0), 6000, 4000, 0),
        (FULL, Setup(processes=4), 6000, 8000, 8000),  # DDP's buckets
        (FULL, Setup(stage=1, processes=4), 2000, 2000 + 1000, 3000),
        (FULL, Setup(stage=2, processes=4), 2000, 500 + 1000, 3000),
        (FULL, Setup(stage=3, processes=4), 500 + 400, 500 + 1000, 3000),
        (FULL, Setup(stage=3, processes=4, half=False), 1000 + 800, 1000, 3000),
        (FULL, Setup(stage=3, processes=4, to_host=True), 400, 0, 0),
        (LORA, Setup(dtype=2, half=False), 2040, 40, 80),
        (LORA, Setup(dtype=2), 2060, 40, 80),
        (LORA, Setup(dtype=2, stage=2, processes=2), 2020, 10 + 20, 60),
    ],
)
def test_weights_gradients_and_optimizer(counts, setup, weights, gradients, optimizer):
    found = memory_use(counts, setup)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    assert found.encoders == 300 * setup.dtype and found.copies == found.activations == 0
    assert found.host == (500 + 1500 + 3000 if setup.to_host else 0)


def test_what_is_beside_them():
    assert memory_use(FULL, Setup(reference=True)).copies == 4000
    assert memory_use(LORA, Setup(reference=True)).copies == 0  # the adapter is switched off
    assert memory_use(LORA, Setup(average=True)).copies == 40
    away = memory_use(FULL, Setup(offload=True))
    assert (away.encoders, away.host) == (0, 1200)
    kept = memory_use(FULL, Setup(tokens=5))
    assert kept.activations == pytest.approx(5 * 8 * 2 * (10 + 28.2)) and kept.total == kept.lasting + kept.activations
    assert memory_use(LORA, Setup(tokens=5, checkpointing=False)).activations == pytest.approx(5 * 8 * 2 * 10 * 17.3)


def test_the_sums_are_deepspeeds_own(true_full):
    """Its estimators know nothing of parts that are not trained, so here everything is."""
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    total = true_full.transformer
    counts = Counts(total, total, true_full.block, 0, 60, 3072, 28.2, adapter=False)
    for gpus in (8, 64):
        nodes = gpus // 8
        _, theirs = stage2.estimate_zero2_model_states_mem_needs(total, 8, nodes, cpu_offload=False)
        ours = memory_use(counts, Setup(stage=2, processes=gpus)).total
        assert theirs == pytest.approx(ours, rel=1e-9)
        _, theirs, _ = estimate_zero3_model_states_mem_needs(total, counts.block, 8, nodes, cpu_offload=False)
        assert memory_use(counts, Setup(stage=3, processes=gpus)).total == pytest.approx(theirs, rel=0.12)
        _, theirs, _ = estimate_zero3_model_states_mem_needs(
            total, counts.block, 8, nodes, cpu_offload=True, cpu_offload_params=True
        )
        assert memory_use(counts, Setup(stage=3, processes=gpus, to_host=True)).total == theirs


# --- The numbers, of real models ---


def test_an_outline_has_the_numbers_of_the_model_with_its_weights(tiny, tmp_path):
    whole, adapted = outline(CHECKPOINT).parameter_counts(), outline(CHECKPOINT, LoraConfig(r=4)).parameter_counts()
    tiny.unfreeze()
    assert tiny.parameter_counts() == whole
    assert whole.transformer > whole.trained > 0.9 * whole.transformer  # less what no gradient reaches
    tiny.transformer.requires_grad_(False)
    tiny.add_lora(LoraConfig(r=4))
    assert tiny.parameter_counts() == adapted and adapted.transformer == whole.transformer + adapted.trained
    tiny.save(tmp_path, {name: p.detach() for name, p in tiny.transformer.named_parameters() if p.requires_grad})
    assert outline(CHECKPOINT, adapter=tmp_path).parameter_counts().trained == 0


def test_adam_keeps_what_the_sum_says(tiny):
    tiny.add_lora(LoraConfig(r=4))
    trained = [p for p in tiny.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()
    optimizer.step()
    found = memory_use(tiny.parameter_counts(), Setup(half=False))
    states = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    assert found.optimizer == sum(v.nbytes for v in states)
    assert found.gradients == sum(p.grad.nbytes for p in trained)
    assert found.weights == sum(p.nbytes for p in tiny.transformer.parameters())


def test_the_published_model_is_the_one_that_is_outlined(true_folder, true_full):
    """20.43e9 parameters; the text encoder's 8.29e9 and the VAE's 0.127e9 are those of the published files."""
    assert (true_full.transformer, true_full.encoders) == (20_430_401_088, 8_292_166_656 + 126_892_531)
    assert true_full.layers == 60 and true_full.width == 3072 and true_full.block == 339_831_296
    assert (
        outline(true_folder, LoraConfig(r=32)).parameter_counts().trained == (16 * 60 - 4) * 32 * 3072
    )  # A and B of 8 a block


@pytest.mark.parametrize("tuning", ["full", "LoRA"])
def test_what_a_block_keeps_for_its_backward(tuning):
    """Per token and channel, by autograd's own hooks on the real block; and checkpointed, no more than its input."""

    def kept(blocks: int, checkpointing: bool) -> float:
        model = QwenImageTransformer2DModel(num_layers=blocks, num_attention_heads=4, joint_attention_dim=64)
        if tuning == "LoRA":
            model.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
            model.add_adapter(LoraConfig(r=8, target_modules=targets))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.to(torch.bfloat16)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage  # held, so that no other gets its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(
                hidden_states=torch.randn(1, 256, 64, dtype=torch.bfloat16),
                timestep=torch.full((1,), 0.5, dtype=torch.bfloat16),
                encoder_hidden_states=torch.randn(1, 32, 64, dtype=torch.bfloat16),
                img_shapes=[[(1, 16, 16)]],
                return_dict=False,
            )
        return sum(s.nbytes() for s in storages.values()) / (2 * (256 + 32) * model.inner_dim)

    assert kept(3, False) - kept(2, False) == pytest.approx(QwenImage.kept_by_block[tuning], abs=0.2)
    assert kept(3, True) - kept(2, True) == pytest.approx(1, abs=0.01)


# --- Stopping a run that cannot fit ---


def test_what_does_not_fit_is_told_with_what_would(true_full):
    check_fits(true_full, Setup(stage=3, processes=8, offload=True), 80 * GIB)
    with pytest.raises(
        ValueError, match=r"too little memory: a full fine-tune of .*20\.4e9.* on each of 8 GPUs"
    ) as told:
        check_fits(true_full, Setup(processes=8), 80 * GIB)
    message = str(told.value)
    assert (
        "80.0 GiB are available" in message
        and "--check_memory false" in message
        and "copies of the model" not in message
    )
    assert "What would fit: --config_file configs/accelerate/zero3.yaml --offload true, or a LoRA: " in message
    with pytest.raises(ValueError, match=r"copies of the model 76\.1.*What would fit: --config_file .*zero3\.yaml"):
        check_fits(true_full, Setup(processes=8, reference=True), 80 * GIB)  # ZeRO-3 shares out a reference
    with pytest.raises(ValueError, match=r"copies of the model 75\.8.*What would fit: a LoRA"):
        check_fits(true_full, Setup(processes=8, average=True), 80 * GIB)  # and no moving average
    with pytest.raises(ValueError, match=r"this machine, for 2 processes .* A machine with more memory is needed"):
        check_fits(true_full, Setup(processes=2), 20 * GIB, processes_sharing=2)
    with pytest.raises(ValueError, match=r"What would fit: --config_file configs/accelerate/zero3_offload.yaml --off"):
        check_fits(true_full, Setup(stage=3, processes=16, offload=True), 20 * GIB)


def test_what_is_said_to_fit_does(true_full):
    for name, stage in LAUNCHERS.items():
        setup = Setup(processes=8, offload=True, **stage)
        fits = memory_use(true_full, setup).lasting <= 80 * GIB
        assert fits == (name in ("zero3", "zero3_offload"))
        if fits:
            check_fits(true_full, setup, 80 * GIB)
        else:
            with pytest.raises(ValueError, match="too little memory"):
                check_fits(true_full, setup, 80 * GIB)


def test_processes_of_one_machine_share_what_they_do_not_train():
    check_fits(LORA, Setup(half=False), 1300 * 4 + 2 * 160, processes_sharing=2)
    with pytest.raises(ValueError, match="for 3 processes"):
        check_fits(LORA, Setup(half=False), 1300 * 4 + 2 * 160, processes_sharing=3)


def test_the_setup_is_read_from_the_arguments(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    full = defer_model(ModelArguments(use_peft=False, offload=True))
    lora = defer_model(ModelArguments(dtype="bfloat16"))
    found = setup_of(full, DPOConfig(**common, ema_decay=0.9))
    assert found == Setup(half=False, reference=True, average=True, offload=True)
    assert setup_of(lora, GRPOConfig(**common)) == Setup(dtype=2, half=False)
    assert setup_of(lora, GRPOConfig(**common, beta=0.1)).reference
    assert setup_of(lora, SFTConfig(**common, optim="adafactor")).moments == 0
    assert Deferred.of("tiny", ModelArguments().peft_config()).outline.adapter


def test_the_tiny_model_fits_and_the_check_can_be_left_out(tmp_path, true_folder, monkeypatch):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    check_memory(defer_model(ModelArguments()), SFTConfig(**common))
    large = defer_model(ModelArguments(model=str(true_folder)))
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: type("Little", (), {"available": GIB}))
    with pytest.raises(ValueError, match=r"a LoRA of this transformer of 20\.5e9 .* on this machine"):
        check_memory(large, SFTConfig(**common))
    with pytest.raises(
        ValueError, match=r"a LoRA of this transformer of 20\.5e9 .* on this machine"
    ):  # and from Python
        SFTTrainer(str(true_folder), SFTConfig(**common), [], peft_config=ModelArguments().peft_config())
    check_memory(large, SFTConfig(**common, check_memory=False))
    check_memory(Deferred.of(large.outline), SFTConfig(**common))  # what is loaded has had its memory


WITHOUT_WEIGHTS = [
    *(ROOT / "align/grpo.py", "--config", ROOT / "configs/tiny/grpo.yaml", "--use_cpu", "true", "--use_peft", "false"),
    *("--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "2", "--output_dir", "out", "--model"),
]


def test_a_run_that_cannot_fit_ends_before_weights_are_looked_for(tmp_path, true_folder):
    """There are none: without the sum it would end at the first file it misses."""
    with pytest.raises(SystemExit, match="error: too little memory: a full fine-tune of this transformer"):
        here(tmp_path, *WITHOUT_WEIGHTS, true_folder)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=r"error: model folder .* has no weights \(\*\.safetensors\) in text_encoder"):
        here(tmp_path, *WITHOUT_WEIGHTS, true_folder, "--check_memory", "false")


@pytest.mark.slow
def test_two_processes_that_cannot_fit_end_before_weights_are_looked_for(tmp_path, true_folder):
    output, _ = start(tmp_path, *TWO, *WITHOUT_WEIGHTS, true_folder, *GLOO).communicate(timeout=120)
    assert "error: too little memory: a full fine-tune of this transformer" in output
    assert "safetensors" not in output and "Loading pipeline" not in output and not (tmp_path / "out").exists()
