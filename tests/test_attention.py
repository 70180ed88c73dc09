"""Attention over packed documents by flex_attention: as by sdpa with a mask, in all numbers.

torch's kernel runs here as plain operations, without its compiler, and with gradients on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import CONFIG, OPTIONS, data, held_out, write_place
from tiny_models import tiny_model
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel, masking_utils

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.errors import UserError
from regrow.stages.distill import student as student_module
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import Student, check_attention
from regrow.training.attention import set_attention
from regrow.training.teacher import hidden_states

pytestmark = pytest.mark.filterwarnings("ignore")  # flex_attention warns that it is not compiled

FLEX = OPTIONS.model_copy(update={"attention": "flex_attention"})
LENGTHS = ([7, 9, 8], [24], [1, 15, 8])
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
IDS = torch.randint(5, 300, POSITIONS.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries in each call of the kernel."""
    calls: list[torch.Size] = []
    kernel = flex_attention.flex_attention

    def note(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Any:
        assert more["block_mask"] is not None
        calls.append(query.shape)
        return kernel(query, key, value, **more)

    wrapper = "transformers.integrations.flex_attention.WrappedFlexAttention"
    monkeypatch.setattr(f"{wrapper}.__call__", lambda _: note)
    return calls


def results(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Final hidden states, and the gradients of all weights from a random direction of them."""
    model.zero_grad()
    states = hidden_states(model, {"input_ids": IDS, "position_ids": POSITIONS}).final.float()
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * direction).sum().backward()
    return states.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "gemma3_text", "mistral"])
def test_states_and_gradients_are_those_of_the_mask(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with several documents in a sequence; also where layers have a window."""
    model = tiny_model(name, torch.float32).train()
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if name in ("qwen2", "gemma3_text"):
        assert kinds == {"full_attention", "sliding_attention"}
        assert model.config.sliding_window < 15  # shorter than the longest documents
    expected = results(model)
    calls = used(monkeypatch)
    set_attention(model, "flex_attention")
    calls.clear()
    found = results(model)
    assert len(calls) == model.config.num_hidden_layers
    for actual, right in zip(found, expected, strict=True):
        assert float((actual - right).norm() / right.norm()) < 1e-5
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_half_precision_is_as_near_as_with_the_mask(name: str) -> None:
    """Under the autocast of a training, against float32."""
    model = tiny_model(name, torch.float32).train()
    exact = results(model)
    with torch.autocast("cpu", torch.bfloat16):
        masked = results(model)
        set_attention(model, "flex_attention")
        flexible = results(model)
    for one, other, right in zip(masked, flexible, exact, strict=True):
        assert 0 < float((other - right).norm()) < 1.3 * float((one - right).norm())


def test_a_torch_whose_kernel_wants_one_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions cast nothing under autocast, where rotary embeddings make queries float32."""
    kernel = flex_attention.flex_attention

    def strict(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Any:
        if query.dtype != value.dtype:
            raise ValueError("Expected query, key, and value to have the same dtype\nmore")
        return kernel(query, key, value, **more)

    wrapper = "transformers.integrations.flex_attention.WrappedFlexAttention"
    monkeypatch.setattr(f"{wrapper}.__call__", lambda _: strict)
    set_attention(tiny_model("llama", torch.bfloat16), "flex_attention")
    with pytest.raises(UserError, match=r"cannot run with it here \(Expected query.*dtype\)"):
        set_attention(tiny_model("llama", torch.float32), "flex_attention")


def test_a_model_that_mixes_documents_with_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    with pytest.raises(UserError, match="attention flex_attention: llama lets the documents"):
        set_attention(model, "flex_attention")


def test_a_model_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    monkeypatch.setattr(type(model), "_supports_flex_attn", False)
    with pytest.raises(UserError, match="attention flex_attention: llama cannot run with it here"):
        set_attention(model, "flex_attention")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def test_a_distillation_with_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly the held-out KL as with the mask, and the same file but for its weights.

    In bfloat16 eager attention differs from sdpa by 1.4 % on these models.
    """
    arguments = (place / "pruned", place / "teacher", data(place))
    masked = distill(*arguments, place / "masked", CONFIG, OPTIONS)
    monkeypatch.setattr(student_module, "check_attention", lambda *_: None)  # it refuses a CPU
    calls = used(monkeypatch)
    flexible = distill(*arguments, place / "flexible", CONFIG, FLEX)
    assert calls
    assert held_out(flexible) == pytest.approx(held_out(masked), rel=0.025)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (masked, flexible)]
    assert configs[0] == configs[1]
    one, other = (load_file(folder / "model.safetensors") for folder in (masked, flexible))
    before = load_file(place / "pruned" / "model.safetensors")
    for name, weight in one.items():
        moved = (weight.float() - before[name].float()).norm()
        assert (other[name].float() - weight.float()).norm() <= 0.5 * moved + 1e-3, name


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"device": "cpu"}, "needs a CUDA device, and this is cpu"),
        ({"feature_losses": {"attention": 1.0}}, {}, "with the attention feature loss"),
        ({"on_policy_share": 0.5}, {}, r"with on_policy_share 0\.5"),
        ({}, {"torch_compile": True}, "with torch_compile"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    fields: dict[str, Any],
    options: dict[str, Any],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not options.get("device"):
        monkeypatch.setattr(Options, "torch_device", lambda _: torch.device("cuda"))
    asked = Options.model_validate({**options, "attention": "flex_attention"})
    student = Student(Checkpoint(place / "pruned"))
    with pytest.raises(UserError, match=f"attention flex_attention {message}"):
        check_attention(student, DistillConfig.model_validate(fields), asked)
    plain = asked.model_copy(update={"attention": "sdpa"})
    check_attention(student, DistillConfig.model_validate(fields), plain)


def test_dropout_of_attention_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Options, "torch_device", lambda _: torch.device("cuda"))
    checkpoint = Checkpoint(place / "pruned")
    config = checkpoint.stock_config()
    config.attention_dropout = 0.1
    with pytest.raises(UserError, match="with attention_dropout in the student"):
        check_attention(Student(checkpoint, config), DistillConfig(), FLEX)
