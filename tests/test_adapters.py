"""LoRA students: what trains, what is merged, resuming, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import CONFIG, OPTIONS, data, figures, held_out, kl_of, write_place
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from regrow import families, plugins
from regrow.checkpoint import Checkpoint, save
from regrow.errors import UserError
from regrow.stages.distill import setup
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.training import adapters
from regrow.training.callbacks import ProgressCallback

LORA = CONFIG.model_copy(
    update={
        "adapter": "lora",
        "lora_rank": 3,
        "lora_alpha": 12.0,
        "learning_rate": 5e-3,
        "keep_adapters": True,
    }
)

PROJECTION = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    out = place / "out" / "lora"
    return distill(place / "pruned", place / "teacher", data(place), out, LORA, OPTIONS)


def kept(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", plugins.names(families.__name__))
def test_all_linear_projections_of_the_sequences_are_targets(name: str) -> None:
    """By the family's table: matrices of a layer, but none that is stacked or routes."""
    family = families.get(name)
    stacked = {row for rows in family.memory.values() for row in rows}
    expected = {
        template.split(".")[-2]
        for template, row in family.tensors.items()
        if "{layer}" in template
        and len(row.axes) == 2
        and template not in stacked
        and "experts" not in row.axes
    }
    model = tiny_model(name)
    assert set(adapters.targets_in(model)) == expected
    adapter = adapters.Adapter(2, 4.0, tuple(sorted(expected)))
    shapes = [
        layer.weight.shape
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "layers." in path
    ]
    assert adapter.parameters(model) == sum(2 * (rows + columns) for rows, columns in shapes)


def test_a_rank_above_the_smaller_side_is_refused(place: Path) -> None:
    fields = {**LORA.model_dump(), "lora_rank": 25}
    with pytest.raises(UserError, match=r"lora_rank 25: the smaller side of .* is 20; give at"):
        distill(
            place / "pruned",
            place / "teacher",
            data(place),
            place / "out" / "rank",
            DistillConfig.model_validate(fields),
            OPTIONS,
        )
    assert not (place / "out" / "rank").exists()


def test_the_student_learns_and_is_a_plain_model(done: Path, place: Path) -> None:
    losses = held_out(done)
    assert losses[12] < 0.85 * losses[0]
    model, info = AutoModelForCausalLM.from_pretrained(
        str(done), dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not (done / "adapter_config.json").exists()
    best = min(value for step, value in losses.items() if step)
    assert kl_of(done, place) == pytest.approx(best, rel=0.03)
    assert figures(done)["held-out KL"] == best


def test_merged_is_base_plus_scaled_product(done: Path, place: Path) -> None:
    """Summed in float32 and rounded once; every weight without an adapter is as it was."""
    before, after, pairs = Checkpoint(place / "pruned"), Checkpoint(done), kept(done)
    num_merged = 0
    for name in before.names():
        base, merged = before.tensor(name), after.tensor(name)
        a = pairs.get(f"base_model.model.{name.replace('.weight', '.lora_A.weight')}")
        if a is None:
            assert torch.equal(merged, base), name
            continue
        b = pairs[f"base_model.model.{name.replace('.weight', '.lora_B.weight')}"]
        assert (a.dtype, a.shape[0], b.shape[1]) == (torch.float32, 3, 3)
        expected = base.double() + 12.0 / 3 * (b.double() @ a.double())
        assert float((b @ a).norm()) > 0
        # The nearest bfloat16 but where float32 rounds over the middle between two of them.
        assert (merged == expected.float().bfloat16()).double().mean() > 0.999
        torch.testing.assert_close(merged.double(), expected, rtol=2**-8, atol=0)
        num_merged += 1
    assert 2 * num_merged == len(pairs) == 2 * 7 * 2


def test_float16_weights_are_not_rounded_to_bfloat16(place: Path, tmp_path: Path) -> None:
    """A learning rate of almost 0 leaves each weight as it was."""
    student = Checkpoint(place / "pruned").model(torch.float32).half()
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.01)  # no multiples of bfloat16's steps
    before = save(student, tmp_path / "student", Checkpoint(place / "pruned"))
    config = LORA.model_copy(update={"learning_rate": 1e-9})
    out = distill(before, place / "teacher", data(place), tmp_path / "out", config, OPTIONS)
    old, new = Checkpoint(before), Checkpoint(out)
    assert not torch.equal(old.tensor(PROJECTION), old.tensor(PROJECTION).bfloat16().half())
    for name in old.names():
        assert new.dtype(name) == "float16"
        assert torch.equal(old.tensor(name), new.tensor(name)), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_reads_the_adapters_beside_the_model(done: Path, place: Path) -> None:
    from peft import PeftModel

    ids = torch.arange(4, 24)[None]
    stock = AutoModelForCausalLM.from_pretrained(str(place / "pruned"), dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, str(done / "adapter")).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(str(done), dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(str(place / "pruned"), dtype=torch.float32)
    with torch.no_grad():
        merged_logits, peft_logits, before = (m(ids).logits for m in (merged, model, first))
    assert float((peft_logits - merged_logits).norm()) < 0.1 * float(
        (before - merged_logits).norm()
    )


def test_a_killed_run_resumes_from_checkpoints_that_hold_only_adapters(
    done: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(
        self: ProgressCallback, args: object, state: object, control: object, **_: object
    ) -> None:
        if state.global_step == 6:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    arguments = (place / "pruned", place / "teacher", data(place), tmp_path / "out", LORA, OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(*arguments)
    last = tmp_path / ".out.partial" / "trainer" / "checkpoint-4"
    assert (last / "adapter_model.safetensors").exists()
    assert not (last / "model.safetensors").exists()
    out = distill(*arguments)
    assert held_out(out) == held_out(done)
    for name, tensor in kept(done).items():
        assert torch.equal(kept(out)[name], tensor), name


def test_bad_lora_settings_are_refused_before_any_slow_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "text_for", lambda *_: pytest.fail("reads text"))

    def refused(student: str, **fields: object) -> str:
        config = DistillConfig.model_validate({**LORA.model_dump(), **fields})
        with pytest.raises(UserError) as caught:
            distill(
                place / student, place / "teacher", data(place), tmp_path / "out", config, OPTIONS
            )
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "the student is a config.json" in refused("config.json")
    message = refused("pruned", lora_targets=["q_prj"])
    assert message.startswith("lora_targets 'q_prj' is not a linear projection")
    assert "did you mean 'q_proj'" in message
    find_spec = importlib.util.find_spec
    for missing, kind in (("peft", "lora"), ("bitsandbytes", "qlora")):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, missing=missing: None if name == missing else find_spec(name),
            )
            message = refused("pruned", adapter=kind)
            assert message.startswith(f"adapter {kind} needs {missing}, which is not installed")
            assert f"'regrow[{kind}]'" in message
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda *_: True)
        assert "qlora needs a CUDA GPU, not cpu" in refused("pruned", adapter="qlora")
    assert not (tmp_path / "out").exists()
    assert json.loads(LORA.model_dump_json())["lora_targets"] == []
