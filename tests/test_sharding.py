"""FSDP2 by two processes over gloo: the gradient, the student and the resuming of one process.

accelerate shards on GPUs only; here it is told that the two processes have some.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.multiprocessing
from safetensors.torch import load_file
from test_distill_ranks import LORA, weights
from test_trainer import error, slow_gradients
from tiny_distillation import CONFIG, OPTIONS, STEPS, data, held_out, kl_of, rows_of, write_place
from tiny_folders import write_model
from tiny_training import MIX, arguments, pair, start_ranks, tiny_sequences, train
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from regrow.checkpoint import Checkpoint
from regrow.checkpoint.from_config import on_meta
from regrow.config import Options
from regrow.errors import UserError
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import compile_layers
from regrow.training import sharding
from regrow.training.adapters import Adapter
from regrow.training.callbacks import ProgressCallback
from regrow.training.load_once import load_once, send, weights_of
from regrow.training.objective import bind_loss
from regrow.training.trainer import DistillTrainer

SHARDED = OPTIONS.model_copy(update={"sharding": "fsdp"})
OFFLOADED = OPTIONS.model_copy(update={"sharding": "fsdp_offload"})
COMPILED = SHARDED.model_copy(update={"torch_compile": True})
HYBRID = OPTIONS.model_copy(update={"sharding": "hsdp"})
FEW_STEPS = CONFIG.model_copy(update={"tokens": 4 * 128, "eval_tokens": 2 * 128})
CPU = torch.device("cpu")


def full_tensor(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


class Watch(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = dict(given["model"].named_parameters())
        self.sharded = all(isinstance(parameter, DTensor) for parameter in named.values())
        self.gradients = {name: full_tensor(parameter.grad) for name, parameter in named.items()}


def pretend_gpus() -> None:
    """Make accelerate take two processes on the CPU for two with GPUs, and nothing refuse them."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    original = Trainer.create_accelerator_and_postprocess

    def create(self: Trainer) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self)

    Trainer.create_accelerator_and_postprocess = create
    sharding.require = lambda *_: None


@contextmanager
def only_first_reads(rank: int) -> Iterator[None]:
    """Let all processes but the first refuse to load a checkpoint's weights."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this process needs no weights")

    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(Checkpoint, "model", refuse)
        yield


def step_in_shards(file: Path, tied: bool, batch_size: int, options: Options) -> None:
    """One step of two micro-batches; writes the gradients and the weights after it."""
    student, teacher = pair(tie_word_embeddings=tied)
    sharding.share(teacher.model, CPU, in_node=options.sharding == "hsdp")
    weight = next(teacher.model.base_model.layers.parameters())
    assert isinstance(weight, DTensor)
    assert weight.device_mesh.shape == (2,)
    if options.torch_compile:
        compile_layers(student, teacher, "shares")
    training_arguments = arguments(
        file.with_suffix(""),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        activation_checkpointing=tied,
        **sharding.training_fields(options),
    )
    sharding.keep_precision(training_arguments)
    trainer = DistillTrainer(model=student, args=training_arguments, train_dataset=tiny_sequences())
    watch = Watch()
    trainer.add_callback(watch)
    bind_loss(student, teacher, MIX)
    trainer.train()
    assert watch.sharded
    after = {name: full_tensor(p) for name, p in trainer.model.named_parameters()}
    torch.save((watch.gradients, after), file)


def _compiled(rank: int, place: str, folder: str) -> None:
    """A step in float32, and a distillation in bfloat16 that makes its activations again."""
    pretend_gpus()
    step_in_shards(Path(folder) / f"{rank}.pt", True, 2, COMPILED)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] >= 2  # of a student's layer, and of a teacher's
    assert not counted["graph_break"]
    where = Path(place)
    job = (where / "pruned", where / "teacher", data(where))
    again = COMPILED.model_copy(update={"gradient_checkpointing": True})
    distill(*job, Path(folder) / "out", FEW_STEPS, again)
    assert not counted["graph_break"]


@pytest.mark.slow
def test_compiled_layers_in_shards_train_what_one_process_trains(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    start_ranks(2, _compiled, str(place), str(tmp_path))
    exact = slow_gradients(tiny_sequences())
    for rank in range(2):
        assert error(torch.load(tmp_path / f"{rank}.pt")[0], exact) < 1e-5
    single = distill(
        place / "pruned", place / "teacher", data(place), tmp_path / "one", FEW_STEPS, OPTIONS
    )
    # Compiled layers round to bfloat16 less often.
    assert held_out(tmp_path / "out") == pytest.approx(held_out(single), rel=3e-2)


def _work(rank: int, place: str, folder: str) -> None:
    pretend_gpus()
    for tied in (True, False):
        step_in_shards(Path(folder) / f"{rank}-{tied}.pt", tied, 2, SHARDED)
    folder_of_models, out = Path(place), Path(folder) / "out"
    job = (
        folder_of_models / "pruned",
        folder_of_models / "teacher",
        data(folder_of_models),
        out,
        CONFIG,
    )
    began = ProgressCallback.on_step_begin

    def stop(
        self: ProgressCallback, args: object, state: Any, control: object, **_: object
    ) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt

    ProgressCallback.on_step_begin = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        distill(*job, SHARDED)
    ProgressCallback.on_step_begin = began  # type: ignore[method-assign]
    del os.environ["ACCELERATE_USE_FSDP"]  # as it would be in a new process
    with pytest.raises(UserError, match="written with sharding fsdp and cannot continue with none"):
        distill(*job, OPTIONS)
    with only_first_reads(rank):
        distill(*job, SHARDED)


def _offload(rank: int, place: str, folder: str) -> None:
    """A run whose second half has its shards in the host's memory, and one without."""
    pretend_gpus()
    pinned: list[Tensor] = []

    def pin(tensor: Tensor, *_: Any) -> Tensor:  # there is no device to pin memory for
        pinned.append(tensor)
        return tensor

    Tensor.pin_memory = pin
    where = Path(place)
    sharded: list[bool] = []
    began = ProgressCallback.on_step_begin

    def look(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step:  # in the first step, `model` is still the one before sharding
            parameters = list(given["model"].parameters())
            sharded.append(all(isinstance(each, DTensor) for each in parameters))
        began(self, args, state, control, **given)

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    job = (where / "pruned", where / "teacher", data(where))
    ProgressCallback.on_step_begin = look  # type: ignore[method-assign]
    distill(*job, Path(folder) / "shards", FEW_STEPS, SHARDED)
    assert sharded and all(sharded) and not pinned
    ProgressCallback.on_step_begin = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        distill(*job, Path(folder) / "moved", FEW_STEPS, SHARDED)
    ProgressCallback.on_step_begin = began  # type: ignore[method-assign]
    distill(*job, Path(folder) / "moved", FEW_STEPS, OFFLOADED)
    assert pinned


def _hybrid_step(rank: int, folder: str) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    pretend_gpus()
    step_in_shards(Path(folder) / f"{rank}.pt", False, 1, HYBRID)


def _hybrid(rank: int, place: str, folder: str) -> None:
    """Two nodes of two processes each; the run continues with shards over all four."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    pretend_gpus()
    where, out = Path(place), Path(folder) / "out"
    job = (where / "pruned", where / "teacher", data(where), out)
    often = HYBRID.model_copy(update={"save_minutes": 1e-9})
    stops: list[int] = []
    meshes: list[Any] = []
    began = ProgressCallback.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == stops[-1]:
            meshes.extend(each.device_mesh.shape for each in given["model"].parameters())
            raise KeyboardInterrupt

    ProgressCallback.on_step_begin = stop  # type: ignore[method-assign]
    for step in (2, 3):
        stops.append(step)
        with pytest.raises(KeyboardInterrupt):
            distill(*job, FEW_STEPS, often)
    assert set(meshes) == {(2, 2)}
    ProgressCallback.on_step_begin = began  # type: ignore[method-assign]
    distill(*job, FEW_STEPS, SHARDED)


def test_shards_in_each_node_train_what_one_process_trains(tmp_path: Path) -> None:
    start_ranks(4, _hybrid_step, str(tmp_path))
    exact = slow_gradients(tiny_sequences(), tie_word_embeddings=False)
    for rank in range(4):
        gradients, after = torch.load(tmp_path / f"{rank}.pt")
        assert error(gradients, exact) < 1e-5
    student, teacher = pair(tie_word_embeddings=False)
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path / "alone", per_device_train_batch_size=8),
        train_dataset=tiny_sequences(),
    )
    bind_loss(student, teacher, MIX)
    trainer.train()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_shards_in_each_node_continues_with_shards_over_all(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    start_ranks(4, _hybrid, str(place), str(tmp_path))
    job = (place / "pruned", place / "teacher", data(place))
    single = distill(*job, tmp_path / "single", FEW_STEPS, OPTIONS)
    assert held_out(tmp_path / "out") == pytest.approx(held_out(single), rel=1e-2)
    assert held_out(single)[4] < 0.98 * held_out(single)[0]


def wide_model(seed: int | None) -> PreTrainedModel:
    """A model of 27 MB in bfloat16 with a stored buffer; on the meta device without a seed."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=16384,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    if seed is None:
        model = on_meta(config)
    else:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
    model.register_buffer("bias", torch.full((3,), float(seed or 0)))
    return model.eval()


def resident() -> int:
    """Bytes of this process's own memory that the system has provided."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _one_reads(rank: int, folder: str) -> None:
    before = resident()
    model = load_once(partial(wide_model, 7), partial(wide_model, None))
    grown = resident() - before
    assert grown > 20e6 if rank == 0 else grown < 5e6, (rank, grown)
    sent = weights_of(model)
    sharding.share(model, CPU)
    send(sent, model, CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    rotations = dict(model.named_buffers())
    torch.save((state, rotations, model(torch.arange(9)[None]).logits), f"{folder}/{rank}.pt")


def test_one_process_reads_the_weights_and_all_have_them(tmp_path: Path) -> None:
    """The others have memory that the system has not provided; dtypes and buffers are the same."""
    start_ranks(2, _one_reads, str(tmp_path))
    model = wide_model(7)
    logits = model(torch.arange(9)[None]).logits
    for rank in range(2):
        state, buffers, found = torch.load(tmp_path / f"{rank}.pt")
        assert state.keys() == model.state_dict().keys()
        for name, value in {**model.state_dict(), **dict(model.named_buffers())}.items():
            same = {**buffers, **state}[name]
            assert same.dtype == value.dtype
            assert torch.equal(same, value), name
        torch.testing.assert_close(found, logits)


def low_rank_student(folder: Path) -> PreTrainedModel:
    """The pair's student in float32, with adapters whose product is not zero."""
    base = write_model(folder, num_hidden_layers=2, seed=1)
    student = Adapter(3, 6.0, ("q_proj", "down_proj")).model(base, CPU, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
    return student


def train_adapters(base: Path, out: Path, batch_size: int, **fields: Any) -> dict[str, Tensor]:
    """The adapters after three steps, by every rank's share of each step."""
    student, teacher = low_rank_student(base), pair()[1]
    given = arguments(out, max_steps=3, per_device_train_batch_size=batch_size, **fields)
    if given.fsdp:
        sharding.keep_precision(given)
        sharding.share(teacher.model, CPU)
    trainer = DistillTrainer(model=student, args=given, train_dataset=tiny_sequences(24))
    bind_loss(student, teacher, MIX)
    trainer.train()
    named = dict(trainer.model.named_parameters())
    if given.fsdp:
        assert all(isinstance(parameter, DTensor) for parameter in named.values())
    return {name: full_tensor(p) for name, p in named.items() if p.requires_grad}


RECOMPUTED = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}


def _adapters(rank: int, place: str, folder: str) -> None:
    pretend_gpus()
    base, three = Path(folder) / f"base-{rank}", Path(folder) / "three"
    trained = train_adapters(base, three, 4, **RECOMPUTED, **sharding.training_fields(SHARDED))
    torch.save(trained, Path(folder) / f"{rank}.pt")
    where, out = Path(place), Path(folder) / "out"
    job = (where / "pruned", where / "teacher", data(where))
    began = ProgressCallback.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt

    with only_first_reads(rank):
        distill(*job, Path(folder) / "whole", LORA, SHARDED)
    ProgressCallback.on_step_begin = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        distill(*job, out, LORA, SHARDED)
    ProgressCallback.on_step_begin = began  # type: ignore[method-assign]
    distill(*job, out, LORA, SHARDED)


def test_adapters_beside_sharded_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """In float32; and a stopped run in bfloat16 continues exactly, and its result is merged."""
    place = write_place(tmp_path / "place")
    start_ranks(2, _adapters, str(place), str(tmp_path))
    expected = train_adapters(tmp_path / "base", tmp_path / "alone", 8)
    before = dict(low_rank_student(tmp_path / "again").named_parameters())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            assert float((value - before[name]).detach().abs().max()) > 1e-3
    out = tmp_path / "out"
    assert not list(out.rglob("pytorch_model_fsdp*"))  # the frozen weights are in no checkpoint
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(out)[name], value), name
    job = (place / "pruned", place / "teacher", data(place))
    single = distill(*job, tmp_path / "single", LORA, OPTIONS)
    assert held_out(out) == pytest.approx(held_out(single), rel=1e-2)
    model = AutoModelForCausalLM.from_pretrained(str(out))
    best = min(value for step, value in held_out(out).items() if step)
    assert best < 0.95 * held_out(out)[0]
    assert kl_of(out, place) == pytest.approx(best, rel=0.03)
    assert not any("lora" in name for name, _ in model.named_parameters())
    pairs = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in pairs.values()} == {torch.float32}


def _not_finite(rank: int, place: str, out: str) -> None:
    pretend_gpus()
    stock = DistillTrainer.compute_loss

    def spoiled(self: DistillTrainer, *given: Any, **fields: Any) -> Any:
        loss = stock(self, *given, **fields)
        return loss * float("nan") if self.state.global_step == 5 else loss

    DistillTrainer.compute_loss = spoiled  # type: ignore[method-assign]
    where = Path(place)
    with pytest.raises(UserError, match=r"nan at step 6; the last good checkpoint \(checkpoint-4"):
        distill(where / "pruned", where / "teacher", data(where), out, CONFIG, SHARDED)


def test_the_last_checkpoint_of_a_failed_run_in_shards_is_a_stock_model(tmp_path: Path) -> None:
    place, out = write_place(tmp_path / "place"), tmp_path / "out"
    start_ranks(2, _not_finite, str(place), str(out))
    expected = held_out_after(place, tmp_path / "single", 4)
    model, info = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "out-stopped"), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert next(model.parameters()).dtype == torch.float32
    assert kl_of(tmp_path / "out-stopped", place) == pytest.approx(expected, rel=0.03)


def held_out_after(place: Path, out: Path, step: int) -> float:
    """The held-out KL after a step of one process."""
    job = (place / "pruned", place / "teacher", data(place))
    return held_out(distill(*job, out, CONFIG, OPTIONS))[step]


EIGHT_BITS = CONFIG.model_copy(
    update={"optimizer": "adamw_8bit", "tokens": 4 * 128, "eval_tokens": 2 * 128}
)


def _eight_bits(rank: int, place: str, folder: str) -> None:
    """A whole run, and one that stops in step 4 and continues from step 2."""
    pretend_gpus()
    where = Path(place)
    job = (where / "pruned", where / "teacher", data(where))
    save, quantized = DistillTrainer._save_optimizer_and_scheduler, []

    def watch(self: DistillTrainer, output: str) -> None:
        moments = [state["exp_avg"] for state in self.optimizer.optimizer.state.values()]
        kinds = [type(sharding.local(each)).__name__ for each in moments]
        quantized.append(kinds.count("OptimState8bit"))
        save(self, output)

    DistillTrainer._save_optimizer_and_scheduler = watch  # type: ignore[method-assign]
    distill(*job, Path(folder) / "whole", EIGHT_BITS, SHARDED)
    assert all(quantized)
    began = ProgressCallback.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    ProgressCallback.on_step_begin = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        distill(*job, Path(folder) / "cut", EIGHT_BITS, SHARDED)
    ProgressCallback.on_step_begin = began  # type: ignore[method-assign]
    distill(*job, Path(folder) / "cut", EIGHT_BITS, SHARDED)


def test_moments_in_8_bits_are_sharded_and_continue_exactly(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    place = write_place(tmp_path / "place")
    start_ranks(2, _eight_bits, str(place), str(tmp_path))
    expected = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "cut").items():
        assert torch.equal(value, expected[name]), name
    job = (place / "pruned", place / "teacher", data(place))
    single = held_out(distill(*job, tmp_path / "single", EIGHT_BITS, OPTIONS))
    assert held_out(tmp_path / "whole") == pytest.approx(single, rel=2e-2)
    assert single[4] < 0.9 * single[0]


def test_shards_that_cannot_be_divided_anew_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise CheckpointException("misaligned", {})

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", refuse)
    trainer = DistillTrainer(model=pair()[0], args=arguments(tmp_path))
    with pytest.raises(UserError, match="cannot be divided among 1 processes"):
        trainer._load_optimizer_and_scheduler("checkpoint-4")


@pytest.mark.slow
def test_shards_in_the_hosts_memory_train_the_same(tmp_path: Path) -> None:
    """The same student bit for bit, by a run that began without."""
    place = write_place(tmp_path / "place")
    start_ranks(2, _offload, str(place), str(tmp_path))
    expected = weights(tmp_path / "shards")
    for key, value in weights(tmp_path / "moved").items():
        assert torch.equal(value, expected[key]), key


def test_two_sharded_processes_train_what_one_process_trains(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    start_ranks(2, _work, str(place), str(tmp_path))
    exact = {name: value.double() for name, value in slow_gradients(tiny_sequences()).items()}
    alone, _ = train(tmp_path / "alone", 8, 1)
    for rank in range(2):
        gradients, after = torch.load(tmp_path / f"{rank}-True.pt")
        assert error(gradients, exact) < 1e-5
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-5, atol=1e-6)
        gradients, _ = torch.load(tmp_path / f"{rank}-False.pt")
        assert error(gradients, slow_gradients(tiny_sequences(), tie_word_embeddings=False)) < 1e-5
    single, out = tmp_path / "one", tmp_path / "out"
    distill(place / "pruned", place / "teacher", data(place), single, CONFIG, OPTIONS)
    expected, together = held_out(single), held_out(out)
    assert list(together) == list(expected)
    assert [row["step"] for row in rows_of(out) if "loss" in row] == list(range(1, STEPS + 1))
    for step, value in expected.items():
        assert together[step] == pytest.approx(value, rel=1e-2)
    before, single_weights, sharded_weights = (
        weights(place / "pruned"),
        weights(single),
        weights(out),
    )
    assert single_weights.keys() == sharded_weights.keys()
    moved = sum(float((single_weights[name] - before[name]).square().sum()) for name in before)
    distance = sum(
        float((single_weights[name] - sharded_weights[name]).square().sum()) for name in before
    )
    assert distance < 0.2**2 * moved


def test_bad_sharding_settings_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(device: str = "cuda", adapter: str = "none", **fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            sharding.require(Options(**fields), torch.device(device), adapter)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "needs several processes" in refused(sharding="fsdp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "needs GPUs" in refused("cpu", sharding="fsdp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "there are 2 processes, 2 of them on this node" in refused(sharding="hsdp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "sharding hsdp needs several nodes with two or more" in refused(sharding="hsdp")
    assert "set adapter to lora" in refused(adapter="qlora", sharding="fsdp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "needs GPUs" in refused("cpu")  # asked for by accelerate launch
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    path = tmp_path / "ds.json"
    assert "cannot be read as JSON" in refused(deepspeed=str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert "ZeRO stage 3" in refused(deepspeed=str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert "exclude each other" in refused(deepspeed=str(path), sharding="fsdp")
    assert "pip install deepspeed" in refused(deepspeed=str(path))
