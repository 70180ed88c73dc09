"""The choice of units, and candidate shapes of tiny and of real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NAMES, tiny_config
from tiny_pruning import chosen, write_place

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.profile_folder import Profile
from regrow.pruning.choose import best, best_heads
from regrow.search.shapes import Shape, candidates, free_dims, grid

SMOLLM2 = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}

QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}

GEMMA3 = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 26,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "sliding_window": 512,
}

QWEN3_MOE: dict[str, Any] = {  # Qwen3-30B-A3B
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
MIXTRAL: dict[str, Any] = {  # Mixtral 8x7B
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
REAL = {"smollm2": SMOLLM2, "qwen3-8b": QWEN3, "gemma3-1b": GEMMA3, "qwen3-30b": QWEN3_MOE}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def test_best_keeps_the_old_order_and_breaks_ties_by_id() -> None:
    assert best(torch.tensor([1.0, 9.0, 3.0, 9.0, 2.0]), 3) == [1, 2, 3]
    assert best(torch.tensor([5.0, 5.0, 5.0, 5.0]), 2) == [0, 1]
    assert best(torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), 2) == [1, 2]
    tied = torch.zeros(1000)
    tied[::2] = 1
    assert best(tied, 400) == list(range(0, 800, 2))


def test_heads_are_ranked_inside_their_group() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0, 6.0, 5.0, 4.0])
    assert best_heads(scores, [0, 1, 2], group=3, keep=2) == [0, 1, 4, 5, 6, 7]
    assert best_heads(scores, [1, 2], group=3, keep=1) == [4, 6]


def test_a_plan_keeps_the_best_scored_units(place: Path) -> None:
    """Against the scores themselves, for every dimension at once."""
    profile = Profile(place / "profile")
    plan = chosen(place, layers=3, hidden=36, mlp=20, heads=2, kv_heads=1)
    plan.check(families.get("llama").sizes(Checkpoint(place / "model").config))
    influence = profile.scores("block_influence", "layers")["all"]
    assert plan.layers == sorted(set(range(4)) - {int(influence.argmin())})
    hidden = profile.scores("activation_l2", "hidden")["all"]
    assert plan.hidden is not None
    dropped = set(range(48)) - set(plan.hidden)
    assert hidden[plan.hidden].min() >= hidden[sorted(dropped)].max()
    assert plan.mlp is not None
    assert plan.heads is not None
    assert plan.kv_heads is not None
    assert set(plan.mlp) == set(plan.heads) == set(plan.kv_heads) == set(plan.layers)
    for layer in plan.layers:
        scores = profile.scores("activation_l2", "mlp")[str(layer)]
        assert plan.mlp[layer] == sorted(scores.argsort(descending=True)[:20].tolist())
        groups = profile.scores("activation_l2", "kv_heads")[str(layer)]
        (kv,) = plan.kv_heads[layer]
        assert kv == int(groups.argmax())
        heads = profile.scores("activation_l2", "heads")[str(layer)][3 * kv : 3 * kv + 3]
        assert sorted(plan.heads[layer]) == plan.heads[layer]
        assert set(plan.heads[layer]) == {3 * kv + int(n) for n in heads.argsort()[1:]}


def test_kv_heads_take_their_query_heads_along(place: Path) -> None:
    plan = chosen(place, kv_heads=1)
    assert plan.after["heads"] == 3
    assert plan.heads is not None
    assert plan.kv_heads is not None
    for layer, (kv,) in plan.kv_heads.items():
        assert plan.heads[layer] == [3 * kv, 3 * kv + 1, 3 * kv + 2]


def check_candidates(config: dict[str, Any], keep: float, multiple: int) -> list[Shape]:
    family = families.get(config["model_type"])
    full, total = family.sizes(config), family.count(config)
    shapes = candidates(family, config, keep, multiple)
    for shape in shapes:
        assert shape.sizes
        assert abs(shape.parameters / total - keep) <= 0.01
        shapes_of = family.expected(config, shape.sizes)
        tied = family.value(config, "tie_word_embeddings")
        assert family.head not in shapes_of or not tied
        assert shape.parameters == sum(torch.Size(size).numel() for size in shapes_of.values())
        families.check_sizes(family, config, shape.sizes, multiple)
        for dim, size in shape.sizes.items():
            assert 0 < size < full[dim]
            rows = size * (full["head_dim"] if dim in ("heads", "kv_heads") else 1)
            if dim not in ("layers", "kv_heads", "experts"):
                assert rows % multiple == 0, (dim, size)
    assert len({tuple(sorted(shape.sizes.items())) for shape in shapes}) == len(shapes)
    return shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.6])
def test_candidates_of_tiny_models(name: str, keep: float) -> None:
    wide = {"moe_intermediate_size": 1024, "decoder_sparse_step": 1} if name == "qwen3_moe" else {}
    config = tiny_config(name, intermediate_size=512, vocab_size=64, **wide).to_dict()
    shapes = check_candidates(config, keep, 4)
    free = "expert_mlp" if "experts" in families.get(name).config_keys else "mlp"
    assert any(free in shape.sizes for shape in shapes), shapes


@pytest.mark.parametrize("config", REAL.values(), ids=REAL.keys())
@pytest.mark.parametrize("multiple", [32, 128])
@pytest.mark.parametrize("keep", [0.8, 0.7])
def test_candidates_of_real_models(config: dict[str, Any], keep: float, multiple: int) -> None:
    shapes = check_candidates(config, keep, multiple)
    kinds = {dim for shape in shapes for dim in shape.sizes}
    free = free_dims(families.get(config["model_type"]))
    assert {"layers", free[0]} <= kinds


def test_experts_are_the_first_thing_to_cut() -> None:
    """30,532,122,624 parameters, as published; an expert takes 3 · 768 · 2048 + 2048 of a layer."""
    family = families.get("qwen3_moe")
    assert family.count(QWEN3_MOE) == 30_532_122_624
    assert family.active(QWEN3_MOE) == 30_532_122_624 - 48 * 120 * 3 * 768 * 2048
    first, *others = candidates(family, QWEN3_MOE, 0.75, 16)
    assert first.name == "experts"
    assert first.sizes == {"experts": 94}
    assert first.parameters == 30_532_122_624 - 34 * 48 * (3 * 768 + 1) * 2048
    assert others[0].sizes == {"experts": 112, "expert_mlp": 640}
    # Eight experts are too few to meet a target with their number alone.
    coarse = candidates(families.get("mixtral"), MIXTRAL, 0.8, 32)
    assert all(shape.sizes.keys() != {"experts"} for shape in coarse)
    assert any("experts" in shape.sizes for shape in coarse)
    assert families.get("mixtral").count(MIXTRAL) == 46_702_792_704


def test_many_shapes_of_a_mixture_cut_experts_and_their_width() -> None:
    config = {**QWEN3_MOE, "num_hidden_layers": 12}
    shapes = grid(families.get("qwen3_moe"), config, 0.75, 8, 60)
    assert len(shapes) == 60
    assert sum("experts" in shape.sizes for shape in shapes) > 10
    assert sum("expert_mlp" in shape.sizes for shape in shapes) > 10


def test_candidate_shapes_of_smollm2_equal_hand_computed_ones() -> None:
    """134,515,008 parameters; an MLP channel takes 3 · 576 in each of 30 layers."""
    assert families.get("llama").count(SMOLLM2) == 134_515_008
    (mlp,) = (s for s in candidates(families.get("llama"), SMOLLM2, 0.8, 32) if s.name == "mlp")
    width = mlp.sizes["mlp"]
    assert mlp.sizes == {"mlp": width}
    assert width % 32 == 0
    assert mlp.parameters == 134_515_008 - (1536 - width) * 3 * 576 * 30


def test_a_share_that_no_shape_meets_is_refused() -> None:
    family = families.get("llama")
    with pytest.raises(UserError, match=r"keep_params 0\.05: no shape"):
        candidates(family, SMOLLM2, 0.05, 32)
    with pytest.raises(UserError, match="multiples of 512"):
        candidates(family, SMOLLM2, 0.985, 512)
    # All of it is nearest to 0.999; that is no cut.
    with pytest.raises(UserError, match=r"keep_params 0\.999"):
        candidates(family, SMOLLM2, 0.999, 512)
