"""Placements of a frozen teacher: in 8 bits, or on disk with one layer in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from pretend_cuda import FakeCuda
from pretend_streams import FakeStreams
from safetensors.torch import load_file
from tiny_distillation import CONFIG, OPTIONS, data, held_out, write_place
from tiny_folders import write_model
from torch import Tensor, nn
from torch.nn import functional

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.errors import UserError
from regrow.recipe.check import check_steps
from regrow.runtime import prefetch
from regrow.stage import parse_step
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.teacher import teacher_placement
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import Int8Linear, Teacher, place_teacher

CPU = torch.device("cpu")
FAMILIES = plugins.names(families.__name__)
IDS = torch.arange(4, 40).reshape(2, 18)
POSITIONS = torch.arange(18).expand(2, -1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return write_model(tmp_path_factory.mktemp(request.param), request.param, torch.bfloat16)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_in_int8_is_close_to_the_original(bias: bool) -> None:
    """In float64, row by row: whole steps of 2 max|w| / 255, each the nearest to its weight."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 30, bias=bias, dtype=torch.float64)
    layer.weight.data[3] = 0
    rounded = Int8Linear(layer, CPU)
    assert (rounded.codes_RC.dtype, rounded.scale_R.shape) == (torch.int8, (30,))
    rows = []
    for weight, codes, step in zip(
        layer.weight.detach(), rounded.codes_RC, rounded.scale_R, strict=True
    ):
        row = codes.double() * step
        assert (row - weight).abs().max() <= 0.5001 * step
        if weight.any():
            assert float(step) == pytest.approx(float(2 * weight.abs().max() / 255), rel=1e-6)
        rows.append(row)
    x = torch.randn(2, 5, 40, dtype=torch.float64)
    expected = functional.linear(x, torch.stack(rows), layer.bias)
    torch.testing.assert_close(rounded(x), expected, rtol=1e-12, atol=1e-12)


def test_an_int8_teacher_gives_almost_the_same_logits(checkpoint: Checkpoint) -> None:
    exact, rounded = (place_teacher(checkpoint, placement, CPU) for placement in ("whole", "int8"))
    log_p, log_q = (logits_of(model).double().log_softmax(-1) for model in (exact, rounded))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    assert 0 < kl < 0.01 * entropy
    head = rounded.get_output_embeddings()
    assert [m for m in rounded.modules() if isinstance(m, nn.Linear)] == [head]
    for name, module in exact.named_modules():
        if isinstance(module, nn.Linear) and module is not exact.get_output_embeddings():
            codes = rounded.get_submodule(name).get_buffer("codes_RC")
            assert (codes.shape, codes.itemsize) == (module.weight.shape, 1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_an_int8_teacher_is_rounded_on_its_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the CPU, to the bit, some rows at a time; little more is there than stays there."""
    checkpoint = write_model(tmp_path, name, torch.bfloat16, num_hidden_layers=4)
    expected = place_teacher(checkpoint, "int8", CPU)
    monkeypatch.setattr("regrow.training.teacher.ROUNDED_ELEMENTS", 7 * 24)
    with FakeCuda() as fake:
        model = place_teacher(checkpoint, "int8", torch.device("cuda"))
        beside = fake.peak - fake.allocated()
        for operation in ("sort", "round", "round_", "amax"):
            assert fake.where[operation] == {"cuda"}
        assert all(fake.is_there(tensor) for tensor in model.state_dict().values())
        logits = model(IDS.to("cuda"), position_ids=POSITIONS.to("cuda"), use_cache=False).logits
        assert fake.is_there(logits)
    largest = max(m.codes_RC.numel() for m in model.modules() if isinstance(m, Int8Linear))
    assert beside < 2 * largest + 40 * 7 * 24  # bytes of a linear layer in bfloat16, and of rows
    assert torch.equal(logits, logits_of(expected))
    found = model.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(found[key], value), key


def test_a_teacher_on_disk_gives_the_same_logits_with_one_layer_in_memory(
    checkpoint: Checkpoint,
) -> None:
    """To the bit, in every pass, and never with more than one block there."""
    resident, streamed = (
        place_teacher(checkpoint, placement, CPU) for placement in ("whole", "disk")
    )
    layers = list(streamed.base_model.layers)
    loaded = []

    def count(*_: object) -> None:
        loaded.append([n for n, layer in enumerate(layers) if not on_meta(layer)])

    for layer in layers:
        layer.register_forward_pre_hook(count)
    for _ in range(2):
        assert torch.equal(logits_of(streamed), logits_of(resident))
    assert loaded == [[n] for n in range(len(layers))] * 2
    assert all(map(on_meta, layers))
    assert streamed.device == CPU


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text"])
def test_a_gpu_gets_the_next_layer_while_one_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit as the whole teacher, also after a pass that was stopped in the middle."""
    checkpoint = write_model(tmp_path, name, torch.bfloat16)
    expected = logits_of(place_teacher(checkpoint, "whole", CPU))
    with FakeCuda() as fake, FakeStreams(0, at_once=True).install(monkeypatch) as streams:
        monkeypatch.setattr(torch.cuda, "device", lambda *_: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(prefetch, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
        model = place_teacher(checkpoint, "disk", torch.device("cuda"))
        layers, stays = list(model.base_model.layers), fake.allocated()
        inputs = {"input_ids": IDS.to("cuda"), "position_ids": POSITIONS.to("cuda")}
        for _ in range(2):
            with pytest.raises(RuntimeError, match="stopped"), stop_in(layers[2].mlp):
                model(**inputs, use_cache=False)
            for _ in range(2):
                assert torch.equal(model(**inputs, use_cache=False).logits.cpu(), expected)
            assert all(map(on_meta, layers))
        assert streams.copies == 2 * (3 + 2 * len(layers)) + 1  # the last one is of the next pass
        largest = max(sum(t.nbytes for t in layer.parameters()) for layer in layers)
        assert fake.allocated() - stays < 2 * (largest + 40 * prefetch.ALIGNMENT)


@contextmanager
def stop_in(module: nn.Module) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def on_meta(module: nn.Module) -> bool:
    flags = {parameter.is_meta for parameter in module.parameters()}
    assert len(flags) == 1
    return flags.pop()


@pytest.mark.parametrize("placement", ["int8", "disk"])
def test_a_student_learns_from_a_placed_teacher(place: Path, placement: str) -> None:
    """As from the whole teacher: the same gradient from disk, and nearly that from int8."""
    batch = {"input_ids": IDS, "position_ids": POSITIONS, "labels": IDS}
    losses = []
    for hold in ("whole", placement):
        student = Checkpoint(place / "pruned").model(torch.float32)
        bind_loss(
            student,
            Teacher(place_teacher(Checkpoint(place / "teacher"), hold, CPU)),  # type: ignore[arg-type]
            LossWeights({"forward_kl": 1.0}),
        )
        student.train()(**batch)["loss"].backward()
        losses.append(
            torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        )
    error = float((losses[1] - losses[0]).norm() / losses[0].norm())
    assert error == 0 if placement == "disk" else 0 < error < 0.1


def test_each_placement_trains_a_student(place: Path) -> None:
    int8 = CONFIG.model_copy(update={"teacher_dtype": "int8"})
    on_disk = OPTIONS.model_copy(update={"offload_teacher": True})
    out = {}
    for name, config, options in (
        ("whole", CONFIG, OPTIONS),
        ("disk", CONFIG, on_disk),
        ("int8", int8, OPTIONS),
    ):
        arguments = (place / "pruned", place / "teacher", data(place), place / "out" / name)
        out[name] = distill(*arguments, config, options)
    weights = {name: load_file(folder / "model.safetensors") for name, folder in out.items()}
    assert all(torch.equal(weights["disk"][n], value) for n, value in weights["whole"].items())
    assert any(not torch.equal(weights["int8"][n], v) for n, v in weights["whole"].items())
    first, last = (held_out(out["int8"])[step] for step in (0, 12))
    assert last < first
    assert last == pytest.approx(held_out(out["whole"])[12], rel=0.05)


INT8, DISK = {"teacher_dtype": "int8"}, {"offload_teacher": True}


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (INT8, DISK, "teacher_dtype int8 and offload_teacher: both place the teacher"),
        ({}, {**DISK, "sharding": "fsdp"}, "sharding fsdp and offload_teacher: both place"),
        (
            {**INT8, "cache": "c"},
            {},
            "teacher_dtype int8: a cache replaces the",
        ),
        ({"cache": "c"}, DISK, "offload_teacher: a cache replaces"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    fields: dict[str, str], options: dict[str, bool | str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        teacher_placement(DistillConfig.model_validate(fields), Options.model_validate(options))


def test_a_recipe_is_refused_before_it_begins(place: Path) -> None:
    entries = ["cache", {"distill": {"tokens": 256, "batch_tokens": 128, **INT8}}]
    steps = [parse_step(entry, number) for number, entry in enumerate(entries)]
    with pytest.raises(UserError, match=r"stages\.1\.distill: teacher_dtype int8: a cache"):
        check_steps(str(place / "teacher"), data(place), steps, OPTIONS)
