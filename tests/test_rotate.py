"""Rotation: the same function on other channels, by the principal directions, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_folders import data_of, write_model, write_text
from tiny_models import float64_norms, tiny_ids, tiny_model
from tiny_pruning import OPTIONS, kl_between, write_trained
from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.data.sequences import Sequences, build_sequences
from regrow.errors import UserError
from regrow.layerwise import Spill
from regrow.pruning.cut import cut_model
from regrow.recipe.recipe import Recipe
from regrow.recipe.recipe import run as run_recipe
from regrow.stages.rotate import RotateConfig
from regrow.stages.rotate.basis import layout, principal, rotated_config, rotated_tensors
from regrow.stages.rotate.stage import rotate, second_moment

NAMES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def orthonormal(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_model_computes_the_same_function(name: str, tied: bool) -> None:
    """Any orthonormal basis gives the same logits, with biases, experts and fused tensors."""
    biases = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
    model = tiny_model(name, tie_word_embeddings=tied, **biases)
    family, config = families.get(name), model.config.to_dict()
    state = dict(families.as_on_disk(family, model.state_dict()))
    names, basis_HH = list(state), orthonormal(48)
    new = dict(rotated_tensors(names, state.__getitem__, family, config, basis_HH))
    expected = layout(names, lambda n: state[n].to("meta"), family, config)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    other = type(model.config).from_dict(rotated_config(config))
    turned_model = type(model).from_pretrained(
        None,
        config=other,
        state_dict=new,
        dtype=torch.float64,
        experts_implementation=model.config._experts_implementation,
    )
    ids = tiny_ids()
    with torch.no_grad():
        rotated_logits, logits = (
            float64_norms(m.eval())(ids).logits for m in (turned_model, model)
        )
    torch.testing.assert_close(rotated_logits, logits, rtol=1e-9, atol=1e-9)
    norm = turned_model.state_dict()["model.layers.0.input_layernorm.weight"]
    assert bool((norm == 1).all())


def test_principal_directions_come_first() -> None:
    values = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([1.0, 5, 2, 4, 3, 6])
    moment = values.T @ values
    basis = principal(moment)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    rotated_moment = basis.T @ moment @ basis
    assert bool((rotated_moment.diagonal().diff() < 0).all())
    torch.testing.assert_close(
        rotated_moment,
        rotated_moment.diagonal().diag(),
        atol=1e-9 * float(rotated_moment[0, 0]),
        rtol=0,
    )


def test_the_second_moment_equals_the_slow_version(tmp_path: Path, text: Path) -> None:
    """Against hooks on the whole model, token by token, without padding."""
    checkpoint = write_model(tmp_path / "model", "qwen3", torch.float64)
    sequences = build_sequences(data_of(text), checkpoint.tokenizer(), "calibration", 5)
    real = sequences.real.clone()
    real[-1, 20:] = False
    sequences = Sequences(sequences.input_ids, sequences.position_ids, sequences.labels, real)
    measured = second_moment(checkpoint, sequences, OPTIONS, Spill(tmp_path / "spill"))
    model, recorded = checkpoint.model(torch.float64), list[Tensor]()
    for name, module in model.named_modules():
        if name.endswith(("input_layernorm", "post_attention_layernorm", "model.norm")):
            module.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    with torch.no_grad():
        inputs = {"input_ids": sequences.input_ids, "position_ids": sequences.position_ids}
        model(**inputs, use_cache=False)
    assert len(recorded) == 7  # 3 layers
    x = torch.cat([stream[sequences.real] for stream in recorded])
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(measured, x.T @ x / len(x), rtol=1e-6, atol=1e-9)


def test_a_cut_of_rotated_channels_loses_less(tmp_path: Path, text: Path) -> None:
    """A model that has learnt something, cut to the first channels of the stage's basis."""
    from tiny_models import random_plan

    dense = write_trained(tmp_path / "model", text)
    folder = rotate(dense, data_of(text), tmp_path / "turned", RotateConfig(samples=16), OPTIONS)
    turned_to = Checkpoint(folder)
    assert not turned_to.config["tie_word_embeddings"]
    sequences = build_sequences(data_of(text), dense.tokenizer(), "heldout", 8)
    dense_model = dense.model(torch.float32)
    assert kl_between(dense_model, turned_to.model(torch.float32), sequences) < 1e-6
    losses = []
    for checkpoint, hidden in ((turned_to, 30), (dense, 30)):
        plan = random_plan(checkpoint.config, hidden=hidden).model_copy(
            update={"hidden": list(range(hidden))}
        )
        student = cut_model(checkpoint.model(torch.float32), plan)
        losses.append(kl_between(dense_model, student, sequences))
    assert losses[0] < 0.5 * losses[1]


def test_a_second_rotation_is_skipped(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_model(tmp_path / "model", tie_word_embeddings=True)
    for _ in range(2):
        rotate(checkpoint, data_of(text), tmp_path / "out", RotateConfig(samples=2), OPTIONS)
    output = capsys.readouterr().err
    assert "is complete and unchanged" in output
    assert "the output head is no longer tied" in output


def test_gemma_is_refused(tmp_path: Path, text: Path) -> None:
    checkpoint = write_model(tmp_path / "model", "gemma3_text")
    with pytest.raises(UserError, match=r"gemma3_text has norms after .* cannot be rotated"):
        rotate(checkpoint, data_of(text), tmp_path / "out", None, OPTIONS)
    data = data_of(text).model_dump(mode="json")
    recipe = Recipe.model_validate(
        {"model": str(tmp_path / "model"), "data": data, "stages": ["rotate", "profile"]}
    )
    with pytest.raises(UserError, match="cannot be rotated"):
        run_recipe(recipe, tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run").exists()
