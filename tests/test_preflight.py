"""Memory of a training step: kept tensors against a real pass, parts by hand, and advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cost import LLAMA_8B, QWEN3_8B
from tiny_job import LENGTH, call, refused, write_model, write_text
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from regrow.config import Options
from regrow.cost.activations import Numbers, activations
from regrow.cost.memory import TrainingSetup, adapter_parameters, training_memory
from regrow.cost.model import ModelSize
from regrow.data.config import DataConfig
from regrow.runtime.memory import is_out_of_memory
from regrow.stages.distill import preflight, training_lines
from regrow.stages.distill.config import DistillConfig
from regrow.training.trainer import DistillTrainer

TINY = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 80, "vocab_size": 96}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")


@pytest.mark.parametrize("numbers", ["mixed", "half", "float32"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_kept_bytes_are_those_of_a_real_pass(model_type: str, numbers: Numbers) -> None:
    """The sum over the tensors that autograd really keeps, for packed documents with data."""
    fields = {**TINY, "model_type": model_type, "pad_token_id": 0, "tie_word_embeddings": True}
    stock = CONFIG_MAPPING[model_type].from_dict(fields)
    dtype = torch.bfloat16 if numbers == "half" else torch.float32
    model = AutoModelForCausalLM.from_config(stock, dtype=dtype).train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch, length = 2, 24
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=numbers != "float32"):
        positions = torch.arange(length // 2).repeat(batch, 2)  # two documents in each sequence
        states = model.base_model(
            torch.zeros(batch, length, dtype=torch.long), position_ids=positions, use_cache=False
        )
    assert states.last_hidden_state.requires_grad
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    found = activations(ModelSize(fields), batch, length, numbers=numbers)
    assert found.base + 3 * (found.layer + found.copies) == pytest.approx(real, rel=0.02)
    matrices = sum(w.numel() for w in model.base_model.layers[0].parameters() if w.ndim == 2)
    assert found.copies == (2 * matrices if numbers == "mixed" else 0)


def test_experts_are_estimated() -> None:
    fields = {**TINY, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    fields |= {"moe_intermediate_size": 16, "mlp_only_layers": [], "decoder_sparse_step": 1}
    two, four = (activations(ModelSize(fields), n, 24).layer for n in (2, 4))
    assert 0 < 2 * two == four


def test_state_by_hand() -> None:
    """16 bytes for each trained parameter in all; the teacher's 2."""
    teacher = ModelSize(QWEN3_8B)
    student = teacher.resized(layers=24)
    memory = training_memory(student, teacher, TrainingSetup(1, 512, accumulation=2))
    parts, count = memory.parts, student.parameters
    assert parts["weights"] + parts["optimizer"] + parts["gradients"] == 16 * count
    assert parts["teacher"] == 2 * teacher.parameters
    assert memory.moment == "loss"
    layers = count - 2 * student.table
    assert parts["half-precision weights"] == pytest.approx(2 * layers, rel=1e-3)
    assert memory.total == sum(parts.values())


def test_a_device_that_computes_in_float32() -> None:
    """The teacher takes twice the memory, and there are no copies of weights."""
    teacher = ModelSize(QWEN3_8B)
    student = teacher.resized(layers=24)
    mixed, wide = (
        training_memory(student, teacher, TrainingSetup(16, 512, compute_bytes=size)).parts
        for size in (2, 4)
    )
    assert wide["teacher"] == 2 * mixed["teacher"] == 4 * teacher.parameters
    assert wide["weights"] == mixed["weights"]
    assert "half-precision weights" not in wide
    assert wide["activations"] > 1.3 * mixed["activations"]


def test_settings_take_less() -> None:
    teacher = ModelSize(QWEN3_8B)
    student = teacher.resized(layers=24)

    def total(**fields: Any) -> float:
        base: dict[str, Any] = {"batch": 4, "length": 512, "accumulation": 2, **fields}
        return training_memory(student, teacher, TrainingSetup(**base)).total

    plain = total()
    assert 120e9 < plain < 155e9  # does not fit a GPU of 80 GB
    copies = total(sharding="ddp", devices=8)
    assert copies == plain + 4 * student.parameters  # the buckets of gradients
    once = training_memory(student, teacher, TrainingSetup(1, 512, sharding="ddp", devices=8))
    assert "gradients" not in once.parts  # they are views of the buckets
    shards = total(sharding="fsdp", devices=8, teacher="shares")
    assert 30e9 < shards < 50e9
    assert shards == total(sharding="hsdp", devices=8, teacher="node_shares")
    assert total(sharding="fsdp", devices=64, teacher="shares") < shards
    assert shards == total(sharding="hsdp", devices=64, teacher="node_shares")
    fours = total(sharding="fsdp", devices=4, teacher="shares")
    assert fours == total(sharding="hsdp", devices=64, node=4, teacher="node_shares")
    off = TrainingSetup(4, 512, 2, sharding="fsdp", devices=8, teacher="shares", cpu_offload=True)
    offloaded = training_memory(student, teacher, off)
    assert offloaded.total < shards
    assert offloaded.host == pytest.approx(16 * student.parameters / 8)
    assert total(adapter_rank=16) < plain / 2
    assert total(checkpointing=True) < plain
    assert total(teacher="int8") < total() > total(teacher="disk") > total(teacher="cache")
    layer = (2 * teacher.parameters - 4 * teacher.table) / 36
    held = [
        training_memory(student, teacher, TrainingSetup(4, 512, teacher="disk", device=device))
        for device in ("cpu", "cuda")
    ]
    assert held[1].parts["teacher"] == pytest.approx(held[0].parts["teacher"] + layer)
    assert total(moment_bytes=2.0) == plain - 6 * student.parameters
    half = TrainingSetup(4, 512, 2, master_bytes=2.0, moment_bytes=2.0)
    parts = training_memory(student, teacher, half).parts
    state = parts["weights"] + parts["optimizer"] + parts["gradients"]
    assert state == 6 * student.parameters
    assert "half-precision weights" not in {name for name, size in parts.items() if size}


def test_adapters_are_counted() -> None:
    """Rank · (rows + columns) of seven matrices in 32 layers, as peft's 41.9 M for rank 16."""
    assert adapter_parameters(ModelSize(LLAMA_8B), 16) == 41_943_040


def test_what_would_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with too little memory: the first settings that fit, which change no result."""
    student = {**QWEN3_8B, "num_hidden_layers": 24}
    data = DataConfig.model_validate({"sources": ["x.txt"], "sequence_length": 512})
    config, options = DistillConfig(batch_tokens=4 * 512), Options(device="cpu", batch_size=4)
    given = (student, [QWEN3_8B], config, data, options)
    monkeypatch.setattr(preflight, "device_bytes", lambda device: int(400e9))
    assert "it fits: this cpu can give 400.00 GB" in preflight.memory_lines(*given)[1]
    monkeypatch.setattr(preflight, "device_bytes", lambda device: int(113.5e9))
    lines = preflight.memory_lines(*given)
    assert "it does not fit" in lines[1]
    flags = [line.split(":")[0].strip() for line in lines[3:]]
    assert flags[0] == "--gradient-checkpointing"  # a smaller batch keeps gradients: it takes more
    assert flags[-1] == "--gradient-checkpointing --offload-teacher"
    monkeypatch.setattr(preflight, "device_bytes", lambda device: int(1e9))
    assert "no setting here makes it fit; the least is" in preflight.memory_lines(*given)[2]


def test_all_weights_of_6b_under_an_8b_teacher_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 GB: AdamW needs 116.4, and the two smaller optimizers can fit; parts by hand."""
    monkeypatch.setattr(preflight, "device_bytes", lambda device: int(80e9))
    monkeypatch.setattr(Options, "torch_device", lambda options: torch.device("cuda"))
    student, teacher = {**QWEN3_8B, "num_hidden_layers": 24}, [QWEN3_8B]
    data = DataConfig.model_validate({"sources": ["x.txt"], "sequence_length": 512})

    def lines(**fields: Any) -> list[str]:
        config = DistillConfig(batch_tokens=4 * 512, **fields)
        return preflight.memory_lines(student, teacher, config, data, Options(batch_size=4))

    plain = lines()
    assert plain[0].startswith("  memory of each device: 116.42 GB")
    assert plain[1:] == [
        "  it does not fit: this cuda has 80.00 GB",
        "  these settings would fit:",
        "    --gradient-checkpointing --optimizer adamw_8bit: 76.35 GB",
        "    --optimizer adamw_bf16: 57.06 GB",
        "    --gradient-checkpointing --optimizer adamw_bf16: 52.85 GB",
        "    --gradient-checkpointing --sharding fsdp on 2 GPUs: 60.35 GB",
    ]
    half = lines(optimizer="adamw_bf16")
    assert half[0].startswith("  memory of each device: 57.06 GB")
    count, teachers = 5_875_378_176, 8_190_735_360
    assert ModelSize(student).parameters == count
    for name, size in (
        ("weights", 2 * count),
        ("optimizer", (2 + 8 / 256) * count),
        ("teacher", 2 * teachers),
        ("loss", 4 * 151_936 * 4_096 + 4 * 2_048 * 4_096),  # the head's gradient; a stream
    ):
        assert f"{name} {size / 1e9:.2f}" in half[0]
    assert half[1] == "  it fits: this cuda has 80.00 GB"
    assert "--optimizer" not in preflight.advice(
        student, teacher, DistillConfig(batch_tokens=4 * 512), data, Options(batch_size=4)
    )  # a run cannot continue with another optimizer


@pytest.mark.parametrize(
    ("tokens", "batch", "usual"),
    [
        (200_000, 512, None),
        (1_000_000, 512, 2048),
        (1_000_000, 2048, None),
        (10_000_000, 2048, 16384),
        (100_000_000, 131072, None),
    ],
)
def test_short_steps_on_a_gpu_are_named(
    tokens: int, batch: int, usual: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dry run, with the usual number of tokens of a step; a CPU is busy in any step."""
    data = DataConfig.model_validate({"sources": ["x.txt"], "sequence_length": 512})
    config, options = DistillConfig(tokens=tokens, batch_tokens=batch), Options(device="cpu")
    assert len(training_lines(10**9, 10**9, data, config, options)) == 2
    monkeypatch.setattr(Options, "torch_device", lambda options: torch.device("cuda"))
    more = training_lines(10**9, 10**9, data, config, options)[2:]
    if usual is None:
        assert more == []
    else:
        assert f"--batch-tokens {usual} is usual for {tokens:,} tokens" in more[0]
        assert tokens / usual > 200


def test_shards_may_go_to_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice after out-of-memory: the same checkpoints, with the shards in the host's memory."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    student, teacher = {**QWEN3_8B, "num_hidden_layers": 24}, [QWEN3_8B]
    data = DataConfig.model_validate({"sources": ["x.txt"], "sequence_length": 512})
    config = DistillConfig(batch_tokens=8 * 512)

    def advice(sharding: Any) -> str:
        options = Options(device="cpu", batch_size=1, sharding=sharding)
        return preflight.advice(student, teacher, config, data, options)

    assert "--sharding fsdp_offload (" in advice("fsdp")
    assert "fsdp_offload" not in advice("fsdp_offload")
    assert "--sharding fsdp (" in advice("hsdp")
    setup = preflight.setup_of(config, data, Options(batch_size=1, sharding="fsdp"))
    names = [name for name, _ in preflight.changes(setup, lambda each: 1.0)]
    assert "--optimizer adamw_8bit" in names
    assert "--optimizer adamw_bf16" not in names
    hybrid = Options(batch_size=1, sharding="hsdp")
    inside = preflight.setup_of(config, data, hybrid)
    assert (inside.shards, inside.teacher, inside.devices) == (4, "node_shares", 8)
    assert "fsdp_offload" not in advice("none")
    for kind, shown in (("lora", True), ("qlora", False)):  # 4-bit weights are not sharded
        one = DistillConfig(batch_tokens=8 * 512, adapter=kind)
        monkeypatch.setenv("WORLD_SIZE", "1")
        setup = preflight.setup_of(one, data, Options(batch_size=1))
        names = [name for name, _ in preflight.changes(setup, lambda each: 1.0)]
        assert any("--sharding fsdp" in name for name in names) == shown


def test_a_family_without_a_table_has_no_estimate() -> None:
    data = DataConfig.model_validate({"sources": ["x.txt"]})
    given = (DistillConfig(), data, Options(device="cpu"))
    assert preflight.memory_lines({"model_type": "opt"}, [QWEN3_8B], *given) == []


def test_a_derived_table_has_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoder: the lists of a config that has one entry for each layer are shortened."""
    monkeypatch.setattr(preflight, "device_bytes", lambda device: int(400e9))
    fields = {**TINY, "num_hidden_layers": 6, "pad_token_id": None, "bos_token_id": None}
    config = CONFIG_MAPPING["smollm3"](**fields, eos_token_id=None).to_dict()
    assert len(config["no_rope_layers"]) == 6
    data = DataConfig.model_validate({"sources": ["x.txt"]})
    given = (DistillConfig(), data, Options(device="cpu"))
    (first, second) = preflight.memory_lines(config, [config], *given)
    assert "memory of each device: " in first and "it fits" in second


def test_errors_of_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_out_of_memory_ends_in_advice_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with settings; the same command with one of them continues from its checkpoint."""
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    command = [
        *("distill", model, "--teacher", model, "--data", text, "--sequence-length", LENGTH),
        *("--tokens", 512, "--batch-tokens", 128, "--eval-tokens", 256),
        *("--heldout-sequences", 2, "--out", tmp_path / "out"),
    ]
    step = DistillTrainer.training_step

    def full(self: DistillTrainer, *arguments: Any, **named: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            torch.empty(1 << 50)
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", full)
        said = refused(capsys, *command, "--batch-size", 4, at_once=False)
    assert said.startswith("memory ran out: a step needs about 0.0")
    assert "give --batch-size 2 (0.0" in said
    assert "the same command then continues from checkpoint-2" in said
    call(*command, "--batch-size", 2)
    assert "continues from checkpoint-2" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_out_of_memory_in_another_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    monkeypatch.setattr(
        "regrow.stages.profile.stage.profile", lambda *_, **__: torch.empty(1 << 50)
    )
    command = ("profile", model, "--data", text, "--out", tmp_path / "out")
    said = refused(capsys, *command)
    assert said == "memory ran out: lower --batch-size, or give --order layer, and run again"
