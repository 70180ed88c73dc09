"""The contract of every criterion: a unit that does nothing comes last, scores are reproducible."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_folders import data_of, write_model
from tiny_models import MIXTURES, NAMES
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.errors import UserError
from regrow.profile_folder import Profile, scores_for
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.collect import GRADIENTS, PAIRS, REMOVALS
from regrow.stages.profile.importance.obs import removal_order
from regrow.stages.profile.stage import profile

FOLDER = "regrow.stages.profile.importance"
CRITERIA = plugins.names(FOLDER)
DIMS = {"layers", "hidden", "mlp", "heads", "kv_heads", "experts", "expert_mlp"}
STATISTICS = {"sum", "square_sum", "mean_abs_square_sum", "input_output_distance", "gram"}
STATISTICS |= REMOVALS.keys() | PAIRS | {"token_count"}
BLIND = ("random", "last_layers")  # to what a unit does
STATISTICS |= {"routed_norm_sum", "routed_tokens"}
ORDINARY = DIMS - {"experts", "expert_mlp"}
CASES = [(name, dim) for name in CRITERIA for dim in sorted(plugins.load(FOLDER, name).DIMS & DIMS)]
DENSE = [case for case in CASES if case[1] in ORDINARY]
USELESS = {"layers": 1, "hidden": 17, "mlp": 5, "heads": 4, "kv_heads": 1}
USELESS |= {"experts": 2, "expert_mlp": 11}
LAYER = 1
EXPERT = 3
OPTIONS = Options(device="cpu", batch_size=4, order="resident")
HEAD_DIM = 8


def kill(model: PreTrainedModel, dim: str) -> None:
    """Set to zero whatever writes or reads one unit, so that the model never uses it."""
    unit = USELESS[dim]
    rows = slice(unit * HEAD_DIM, (unit + 1) * HEAD_DIM)
    weights = dict(model.named_parameters())
    prefix = f"model.layers.{LAYER}."
    if dim == "mlp":
        weights[prefix + "mlp.gate_proj.weight"][unit] = 0
        weights[prefix + "mlp.up_proj.weight"][unit] = 0
        weights[prefix + "mlp.down_proj.weight"][:, unit] = 0
    elif dim == "heads":
        weights[prefix + "self_attn.q_proj.weight"][rows] = 0
        weights[prefix + "self_attn.v_proj.weight"][rows] = 0
        weights[prefix + "self_attn.o_proj.weight"][:, rows] = 0
    elif dim == "kv_heads":
        weights[prefix + "self_attn.k_proj.weight"][rows] = 0
        weights[prefix + "self_attn.v_proj.weight"][rows] = 0
        group = slice(3 * unit * HEAD_DIM, 3 * (unit + 1) * HEAD_DIM)
        weights[prefix + "self_attn.o_proj.weight"][:, group] = 0
    elif dim == "experts":
        kill_expert(weights, prefix)
    elif dim == "expert_mlp":
        weights[prefix + "mlp.experts.gate_up_proj"][EXPERT].unflatten(0, (2, -1))[:, unit] = 0
        weights[prefix + "mlp.experts.down_proj"][EXPERT][:, unit] = 0
    elif dim == "layers":
        weights[prefix + "self_attn.o_proj.weight"].zero_()
        weights[prefix + "mlp.down_proj.weight"].zero_()
    else:
        for name, weight in weights.items():
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight"))
            (weight if writes else weight.T)[unit] = 0


def kill_expert(weights: dict[str, Tensor], prefix: str) -> None:
    """Zero all of an expert, and let the router prefer the others for a channel always there."""
    unit, always = USELESS["experts"], 0
    weights["model.embed_tokens.weight"][:, always] = 30
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[always] = 0
        elif name.endswith("experts.down_proj"):
            weight[:, always] = 0
    weights[prefix + "post_attention_layernorm.weight"][always] = 1
    router = weights[prefix + "mlp.gate.weight"]
    router[:, always] = 20
    for weight in (
        router,
        *(weights[f"{prefix}mlp.experts.{n}_proj"] for n in ("gate_up", "down")),
    ):
        weight[unit] = 0


@pytest.fixture(scope="module")
def mixtures(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    """Per family and dimension of experts a profile of a model with one useless unit in it."""
    profiles = {}
    for model_type in MIXTURES:
        for dim in ("experts", "expert_mlp"):
            folder = tmp_path_factory.mktemp(dim)
            checkpoint = write_model(folder / "model", model_type, num_hidden_layers=2)
            model = checkpoint.model(torch.float32)
            with torch.no_grad():
                kill(model, dim)
            model.save_pretrained(str(checkpoint.folder))
            profiles[f"{model_type} {dim}"] = scored(
                Checkpoint(checkpoint.folder), text, folder / "profile"
            )
    return profiles


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize(("name", "dim"), [case for case in CASES if "expert" in case[1]])
def test_a_useless_expert_or_channel_of_one_comes_last(
    mixtures: dict[str, Profile], name: str, dim: str, model_type: str
) -> None:
    profile = mixtures[f"{model_type} {dim}"]
    checkpoint = Checkpoint(profile.folder.parent / "model")
    family = families.of(checkpoint)
    sizes, scores = family.sizes(checkpoint.config), profile.scores(name, dim)
    assert set(scores) == set(map(str, family.layers_of("experts", checkpoint.config)))
    layer_scores = scores[str(LAYER)]
    assert layer_scores.dtype == torch.float32 and bool(layer_scores.isfinite().all())
    if dim == "expert_mlp":
        assert layer_scores.shape == (sizes["experts"], sizes["expert_mlp"])
        layer_scores = layer_scores[EXPERT]
    assert layer_scores.shape == (sizes[dim],) and len(layer_scores.unique()) > 1
    if name != "random":
        others = torch.cat([layer_scores[: USELESS[dim]], layer_scores[USELESS[dim] + 1 :]])
        assert int(layer_scores.argmin()) == USELESS[dim]
        assert abs(float(layer_scores[USELESS[dim]])) < 1e-3 * float(others.min())


@pytest.fixture(scope="module")
def every_family(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    """Per family a profile by every criterion."""
    folder = tmp_path_factory.mktemp("every")
    small = {"num_hidden_layers": 2, "layer_types": None}
    profiles = {}
    for name in NAMES:
        fields = small if name == "gemma3_text" else {"num_hidden_layers": 2}
        checkpoint = write_model(folder / name / "model", name, **fields)
        profiles[name] = scored(checkpoint, text, folder / name / "profile")
    return profiles


@pytest.mark.parametrize("model_type", NAMES)
def test_every_criterion_scores_every_axis_of_every_family(
    every_family: dict[str, Profile], model_type: str
) -> None:
    profile = every_family[model_type]
    checkpoint = Checkpoint(profile.folder.parent / "model")
    family = families.of(checkpoint)
    sizes = family.sizes(checkpoint.config)
    for name, dim in CASES:
        layers = (
            ["all"] if dim in ("hidden", "layers") else family.layers_of(dim, checkpoint.config)
        )
        if not layers:
            with pytest.raises(UserError, match="has no"):
                profile.scores(name, dim)
            continue
        scores = profile.scores(name, dim)
        assert set(scores) == set(map(str, layers)), (name, dim)
        for value in scores.values():
            assert value.shape[-1] == sizes[dim] and bool(value.isfinite().all()), (name, dim)


@pytest.fixture(scope="module")
def planted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Profile]:
    """Per dimension a profile, by every criterion, of a model with one useless unit in it."""
    profiles = {}
    for dim in sorted(ORDINARY):
        folder = tmp_path_factory.mktemp(dim)
        # Query heads share their group's values, so that only without groups can one do nothing.
        kv_heads = {"num_key_value_heads": 6} if dim == "heads" else {}
        checkpoint = write_model(folder / "model", head_dim=HEAD_DIM, **kv_heads)
        model = checkpoint.model(torch.float32)
        with torch.no_grad():
            kill(model, dim)
        model.save_pretrained(str(checkpoint.folder))
        profiles[dim] = scored(Checkpoint(checkpoint.folder), text, folder / "profile")
    return profiles


def scored(checkpoint: Checkpoint, text: Path, out: Path, seed: int = 0) -> Profile:
    config = ProfileConfig(criteria=tuple(CRITERIA), samples=8, gram_tokens=8 * 32, seed=seed)
    return profile(checkpoint, data_of(text), out, config, OPTIONS)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_declares_its_dimensions_and_needs(name: str) -> None:
    module = plugins.load(FOLDER, name)
    assert module.DIMS
    assert module.DIMS - {"vocab"} <= DIMS
    assert module.NEEDS <= STATISTICS | GRADIENTS
    assert module.__doc__


@pytest.mark.parametrize(("name", "dim"), DENSE)
def test_scores_of_every_unit_are_finite_numbers(
    planted: dict[str, Profile], name: str, dim: str
) -> None:
    profile = planted[dim]
    checkpoint = Checkpoint(profile.folder.parent / "model")
    sizes = families.of(checkpoint).sizes(checkpoint.config)
    scores = profile.scores(name, dim)
    layers = {"all"} if dim in ("hidden", "layers") else set(map(str, range(sizes["layers"])))
    assert set(scores) == layers
    for value in scores.values():
        assert value.shape in ((sizes[dim],), (sizes[dim], sizes[dim]))
        assert value.dtype == torch.float32
        assert bool(value.isfinite().all())
        assert len(value.unique()) > 1


@pytest.mark.parametrize(("name", "dim"), [case for case in DENSE if case[0] not in BLIND])
def test_a_useless_unit_comes_last(planted: dict[str, Profile], name: str, dim: str) -> None:
    scores = planted[dim].scores(name, dim)
    unit_scores = scores_for(scores["all" if "all" in scores else str(LAYER)], 1)
    others = torch.cat([unit_scores[: USELESS[dim]], unit_scores[USELESS[dim] + 1 :]])
    assert int(unit_scores.argmin()) == USELESS[dim]
    assert abs(float(unit_scores[USELESS[dim]])) < 1e-3 * float(others.min())


def test_only_random_scores_depend_on_the_seed(
    planted: dict[str, Profile], text: Path, tmp_path: Path
) -> None:
    """The same seed gives the same scores, another seed changes those of random and no others."""
    checkpoint = Checkpoint(planted["mlp"].folder.parent / "model")
    same, other = (scored(checkpoint, text, tmp_path / str(seed), seed) for seed in (0, 1))
    for name, dim in DENSE:
        first = planted["mlp"].scores(name, dim)
        for layer, value in same.scores(name, dim).items():
            assert torch.equal(value, first[layer])
        for layer, value in other.scores(name, dim).items():
            assert torch.equal(value, first[layer]) == (name != "random")
    layers = same.scores("random", "mlp")
    assert not torch.equal(layers["0"], layers["1"])


class FakeWeights:
    def __init__(self, *weights: Tensor) -> None:
        self.weights = weights

    def carrying(self) -> Iterator[Tensor]:
        yield from self.weights

    reading = carrying


def score_of(name: str, stats: dict[str, Tensor], weights: FakeWeights, dim: str) -> list[float]:
    module: ModuleType = plugins.load(FOLDER, name)
    scores: Tensor = module.score(stats, weights, dim, torch.Generator().manual_seed(0))
    return scores.tolist()


def test_scores_equal_hand_computed_numbers() -> None:
    none = FakeWeights()
    routed = {"routed_norm_sum": torch.tensor([[6.0], [0.0]]), "tokens": torch.tensor(12)}
    routed["routed_tokens"] = torch.tensor([[3.0], [0.0]])
    assert score_of("routed_output", routed, none, "experts") == [2.0, 0.0]
    assert score_of("routing_frequency", routed, none, "experts") == [0.25, 0.0]
    squares = torch.tensor([[4.0, 5.0], [16.0, 0.0]])
    assert score_of("activation_l2", {"square_sum": squares}, none, "heads") == [3.0, 4.0]
    assert score_of("minitron", {"mean_abs_square_sum": squares}, none, "heads") == [3.0, 4.0]
    assert score_of("gradient", {"gradient_square_sum": squares}, none, "heads") == [3.0, 4.0]
    assert score_of("taylor", {"taylor_abs_sum": squares}, none, "kv_heads") == [9.0, 16.0]
    assert score_of("fisher", {"taylor_square_sum": squares}, none, "kv_heads") == [4.5, 8.0]
    distance = torch.tensor([[0.25], [0.5]])
    stats = {"input_output_distance": distance}
    assert score_of("block_influence", stats, none, "layers") == [0.25, 0.5]
    assert score_of("last_layers", {"count": torch.tensor(3)}, none, "layers") == [2.0, 1.0, 0.0]
    distance = torch.tensor([[0.3, 0.0, 0.0], [0.2, 0.1, 0.0], [0.6, 0.5, 0.4]])
    stats = {"angular_distance": distance}  # of one layer, of the first two and of the last two
    rows = [[0.3, 0.1, 0.4], [0.2, 0.2, 0.5], [0.6, 0.6, 0.6]]
    expected = torch.tensor(rows).tolist()
    assert score_of("angular_distance", stats, none, "layers") == expected
    weights = FakeWeights(torch.tensor([[1.0, 1.0], [0.0, -2.0]]), torch.tensor([[1.0], [0.0]]))
    assert score_of("magnitude", {}, weights, "mlp") == pytest.approx([math.sqrt(3), 2.0])
    assert score_of("magnitude_l1", {}, weights, "mlp") == [3.0, 2.0]
    # Two heads of two channels, read by an output of two: [units, width, out].
    readers = FakeWeights(torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[2.0, 0.0], [5.0, 5.0]]]))
    stats = {"square_sum": squares, "sum": torch.tensor([[2.0, 1.0], [0.0, 0.0]])}
    stats["tokens"] = torch.tensor(2)
    assert score_of("wanda", stats, readers, "heads") == pytest.approx([math.sqrt(105), 8.0])
    # Variances 2 − 1 = 1 and 2.5 − 0.25; 8 and 0.
    assert score_of("fluctuation", stats, readers, "heads") == pytest.approx([27.25, 32.0])


@pytest.mark.parametrize("width", [1, 3])
def test_obs_removes_what_a_fresh_solve_of_every_choice_would(width: int) -> None:
    """One unit a round: each time the one whose loss, with the rest re-solved, is the smallest."""
    generator = torch.Generator().manual_seed(width)
    units, out = 7, 5
    rows = torch.randn(60, units * width, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(
        units * width, units * width, generator=generator, dtype=torch.float64
    )
    readers = torch.randn(units, width, out, generator=generator, dtype=torch.float64)
    gram = rows.T @ rows
    damped = gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    target = readers.flatten(0, 1)

    def loss(kept: list[int]) -> float:
        k = [unit * width + n for unit in kept for n in range(width)]
        new = torch.zeros_like(target)
        if k:
            new[k] = torch.linalg.solve(damped[k][:, k], damped[k] @ target)
        return float(((new - target).T @ damped @ (new - target)).trace())

    left, expected = list(range(units)), []
    while left:
        first = min(left, key=lambda unit: loss([other for other in left if other != unit]))
        expected.append(first)
        left.remove(first)
    place = removal_order(gram, readers, steps=units)
    assert place.argsort().tolist() == expected


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_magnitude_counts_every_weight_of_a_unit(
    text: Path, tmp_path: Path, model_type: str
) -> None:
    """Readers and writers, in fused tensors too, written out by the tensors' names."""
    checkpoint = write_model(tmp_path / "model", model_type, head_dim=HEAD_DIM)
    config = ProfileConfig(criteria=("magnitude",), samples=1, gram_tokens=0)
    measured = profile(checkpoint, data_of(text), tmp_path / "profile", config, OPTIONS)
    state = {name: checkpoint.tensor(name).double() for name in checkpoint.names()}
    if model_type == "phi3":
        for n in range(3):
            prefix = f"model.layers.{n}."
            fused = state.pop(prefix + "self_attn.qkv_proj.weight").split([48, 16, 16])
            for part, name in zip(fused, "qkv", strict=True):
                state[f"{prefix}self_attn.{name}_proj.weight"] = part
            fused = state.pop(prefix + "mlp.gate_up_proj.weight").chunk(2)
            for part, name in zip(fused, ("gate", "up"), strict=True):
                state[f"{prefix}mlp.{name}_proj.weight"] = part

    def norms(dim: str, parts: list[tuple[str, int]], units: int) -> None:
        for layer, scores in measured.scores("magnitude", dim).items():
            total = torch.zeros(units, dtype=torch.float64)
            for name, axis in parts:
                weight = state[f"model.layers.{layer}.{name}_proj.weight"]
                total += (weight if axis == 0 else weight.T).reshape(units, -1).square().sum(1)
            torch.testing.assert_close(scores.double(), total.sqrt(), rtol=1e-6, atol=0)

    norms("mlp", [("mlp.gate", 0), ("mlp.up", 0), ("mlp.down", 1)], 56)
    norms("heads", [("self_attn.q", 0), ("self_attn.o", 1)], 6)
    norms("kv_heads", [("self_attn.k", 0), ("self_attn.v", 0)], 2)


def test_unknown_scores_are_refused_with_those_there_are(planted: dict[str, Profile]) -> None:
    with pytest.raises(UserError, match="did you mean 'magnitude'"):
        planted["mlp"].scores("magnitud", "mlp")
    with pytest.raises(UserError, match="it has: angular_distance, block_influence, fisher"):
        planted["mlp"].scores("magnitude", "layers")
