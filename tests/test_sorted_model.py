"""Cuts of one sorted model: equal to cut_model, and to a dense model with masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_families import logits, zero
from tiny_models import float64_norms, tiny_model
from torch import Tensor

from regrow import families, plugins
from regrow.plan import Plan
from regrow.pruning.choose import choose
from regrow.pruning.cut import cut_model
from regrow.pruning.sorted_model import SortedModel, order_by

NAMES = [n for n in plugins.names("regrow.families") if not families.get(n).memory]
ALL = {"hidden", "mlp", "heads", "kv_heads"}
SHAPES: list[dict[str, int]] = [
    {"layers": 2},
    {"mlp": 20},
    {"heads": 2},
    {"kv_heads": 1},
    {"kv_heads": 1, "heads": 2},
    {"hidden": 24, "heads": 2},
    {"layers": 2, "hidden": 36, "mlp": 12, "kv_heads": 1},
]


class Scores:
    """A profile of random scores; with ties, of which the lower id is the better."""

    def __init__(self, sizes: dict[str, int]) -> None:
        draw = torch.Generator().manual_seed(1)
        counts = {dim: sizes[dim] for dim in ("layers", *ALL)}
        layers = {dim: range(sizes["layers"]) for dim in ("mlp", "heads", "kv_heads")}
        self.by_key = {
            dim: {
                str(layer): torch.randint(0, 9, (count,), generator=draw).double()
                for layer in layers.get(dim, ["all"])
            }
            for dim, count in counts.items()
        }

    def scores(self, criterion: str, dim: str) -> dict[str, Tensor]:
        return self.by_key[dim]


def setting(name: str, sizes: dict[str, int]) -> tuple[Any, Plan, Plan]:
    """A float64 model, a plan by random scores, and the order by them."""
    model = tiny_model(name)
    config = model.config.to_dict()
    family = families.get(name)
    profile: Any = Scores(family.sizes(config))
    checkpoint: Any = SimpleNamespace(config=config, fingerprint="")
    plan = choose(checkpoint, family, profile, sizes, "x", "x")
    return model, plan, order_by(family, config, profile, "x", ALL)


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_masked_sliced_and_gathered_models_agree(name: str, sizes: dict[str, int]) -> None:
    """In float64: the gather's logits = cut_model's = those of the dense model with zeros."""
    model, plan, order = setting(name, sizes)
    masked = zero(float64_norms(model), plan)
    expected = logits(masked)
    sliced = logits(float64_norms(cut_model(masked, plan)))
    gathered = logits(float64_norms(SortedModel(masked, families.get(name), order).cut(plan)))
    scale = expected.abs().max()
    assert (sliced - expected).abs().max() / scale < 1e-12
    assert (gathered - sliced).abs().max() / scale < 1e-12
    # the order is no identity: sorted, the model computes the same with other weights
    assert (logits(masked) - expected).abs().max() / scale < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_without_sorting_a_cut_equals_cut_model_bit_for_bit(name: str) -> None:
    model, plan, order = setting(name, SHAPES[-1])
    expected = cut_model(model, plan)
    cut = SortedModel(model, families.get(name)).cut(plan)
    expected.config._name_or_path = cut.config._name_or_path
    assert cut.config.to_dict() == expected.config.to_dict()
    assert dict(cut.state_dict()).keys() == dict(expected.state_dict()).keys()
    for key, value in cut.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key
    assert torch.equal(logits(cut), logits(expected))
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    SortedModel(model, families.get(name), order)
    assert not torch.equal(before, model.model.layers[0].mlp.down_proj.weight)


def test_the_best_units_come_first_and_are_views() -> None:
    model, plan, order = setting("llama", {"hidden": 24, "mlp": 20, "kv_heads": 1})
    sorted_model = SortedModel(model, families.get("llama"), order)
    sorted_plan = sorted_model.positions(plan)
    assert sorted_plan.hidden == list(range(24))
    assert sorted_plan.mlp == {layer: list(range(20)) for layer in range(3)}
    assert sorted_plan.kv_heads == {layer: [0] for layer in range(3)}
    assert sorted_plan.heads == {layer: [0, 1, 2] for layer in range(3)}
    storage = model.get_input_embeddings().weight.untyped_storage().data_ptr()
    view, copy = sorted_model.cut(plan), sorted_model.cut(plan, copied=True)
    assert view.get_input_embeddings().weight.untyped_storage().data_ptr() == storage
    assert copy.get_input_embeddings().weight.untyped_storage().data_ptr() != storage
    assert copy.get_input_embeddings().weight.is_contiguous()
    assert torch.equal(logits(view), logits(copy))


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3_text"])
def test_replaced_weights_find_their_places(name: str) -> None:
    """What repair gives by the plan's ids computes the same in the sorted model."""
    model, plan, order = setting(name, SHAPES[-1])

    def other(name: str, kept: Tensor) -> Tensor:
        if not name.endswith(("down_proj.weight", "o_proj.weight")):
            return kept
        draw = torch.Generator().manual_seed(len(name) + kept.shape[1])
        return torch.randn(kept.shape, generator=draw, dtype=kept.dtype)

    float64_norms(model)
    expected = logits(float64_norms(cut_model(model, plan, other)))
    plain = logits(cut_model(model, plan))
    cut_logits = logits(
        float64_norms(SortedModel(model, families.get(name), order).cut(plan, other))
    )
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(cut_logits, expected, rtol=1e-11, atol=1e-11)
