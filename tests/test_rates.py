"""Learning rates of attention and of the embedding, as shares of one that follows the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_training import arguments, tiny_sequences

from regrow.checkpoint import Checkpoint
from regrow.training.rates import is_attention, scale_rates, usual_rate
from regrow.training.trainer import DistillTrainer


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "qwen3_moe"])
def test_attention_and_vectors_are_told_from_matrices_of_mlps(family: str) -> None:
    layer = tiny_model(family).model.layers[0]
    parameters = dict(layer.named_parameters())
    ours = {name for name, parameter in parameters.items() if is_attention(name, parameter)}
    matrices = {name for name in parameters if name.startswith("mlp.")}
    assert ours == set(parameters) - matrices
    assert matrices


def test_each_part_moves_at_its_rate() -> None:
    model = tiny_model("llama", torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [own]}], lr=0.5)
    scale_rates(optimizer, model, attention=0.1, embeddings=0.01)
    for parameter in (*model.parameters(), own):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        ends = "embed_tokens" in name or "lm_head" in name
        attention = "self_attn" in name or "norm" in name
        rate = 0.01 if ends else 0.1 if attention else 1.0
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, 0.5 * rate))
    torch.testing.assert_close(own.detach(), torch.full_like(own, -0.5))


def test_the_schedule_keeps_the_shares(tmp_path: Path) -> None:
    trainer = DistillTrainer(
        model=tiny_model("llama"),
        args=arguments(
            tmp_path,
            max_steps=10,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.0},
            warmup_steps=2,
        ),
        train_dataset=tiny_sequences(),
        attention_rate=0.1,
        embedding_rate=0.25,
    )
    trainer.create_optimizer_and_scheduler(10)
    rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
    half = 0.05 / 2  # the first of two warm-up steps
    assert rates == pytest.approx([0.1 * half, 0.25 * half, half])


def test_the_usual_rate_follows_the_size_of_the_weights(tmp_path: Path) -> None:
    """5e-4 times the root mean square of the middle layer's matrices, in float64."""
    for factor in (1.0, 0.1):
        model = tiny_model("llama", torch.float32, num_hidden_layers=3)
        matrices = [p for n, p in model.model.layers[1].named_parameters() if p.ndim == 2]
        with torch.no_grad():
            for matrix in matrices:
                matrix.mul_(factor)
        values = torch.cat([matrix.detach().double().flatten() for matrix in matrices])
        folder = tmp_path / str(factor)
        model.save_pretrained(str(folder))
        expected = 5e-4 * float(values.square().mean().sqrt())
        assert usual_rate(Checkpoint(folder)) == pytest.approx(expected, rel=0.05)
