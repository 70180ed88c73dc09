"""Student layers and heads map to the teacher's: by plan, by depth, through projections."""

from __future__ import annotations

import pytest
import torch
from tiny_feature_losses import KEPT, OUTPUTS
from tiny_models import random_plan, tiny_config, tiny_model
from torch import Tensor

from regrow.errors import UserError
from regrow.training.features import LayerMapping, ModelFeatures, at_depths
from regrow.training.head import Head


def features(states: list[Tensor], attentions: list[Tensor] | None = None) -> ModelFeatures:
    return ModelFeatures(tuple(states), tuple(attentions or ()), lambda x: x, Head(torch.eye(2)))


def test_layers_map_by_the_plan() -> None:
    config = tiny_config("llama", num_hidden_layers=6).to_dict()
    match = LayerMapping.of_plan(random_plan(config, layers=KEPT, heads=4, hidden=36))
    assert match.outputs == OUTPUTS
    assert match.layers == ((0, 0), (1, 2), (2, 3), (3, 5))
    assert match.channels is not None
    assert len(match.channels) == 36
    assert match.heads is not None
    assert {n: len(ids) for n, ids in match.heads.items()} == dict.fromkeys(range(4), 4)
    same = LayerMapping.of_plan(random_plan(config))
    assert same == LayerMapping.of_same(6)
    assert (same.channels, same.heads, same.projections) == (None, None, {})


@pytest.mark.parametrize(
    ("student", "teacher", "outputs", "last"),
    [
        (2, 4, ((0, 1),), (1, 3)),
        (4, 4, ((0, 0), (1, 1), (2, 2)), (3, 3)),
        (3, 8, ((0, 2), (1, 4)), (2, 7)),
        (4, 2, ((0, 0), (1, 0)), (3, 1)),  # the teacher's last output is not compared
        (1, 4, (), (0, 3)),
        (2, 1, (), (1, 0)),
    ],
)
def test_layers_map_by_depth_without_a_plan(
    student: int, teacher: int, outputs: tuple[tuple[int, int], ...], last: tuple[int, int]
) -> None:
    match = LayerMapping.by_depth(student, teacher)
    assert match.outputs == outputs
    assert match.layers[-1] == last
    assert match.mean_heads


@pytest.mark.parametrize(
    ("num_layers", "depths", "blocks"),
    [
        (30, (0.25, 0.5, 0.75), [7, 14, 22]),
        (4, (0.25, 0.5, 0.75), [0, 1, 2]),
        (2, (0.25, 0.5, 0.75), [0]),
        (8, (6, 0.01, 3), [0, 3, 6]),
    ],
)
def test_depths_select_layers(
    num_layers: int, depths: tuple[int | float, ...], blocks: list[int]
) -> None:
    outputs = tuple((n, 2 * n) for n in range(num_layers - 1))
    assert at_depths(outputs, num_layers, depths) == tuple((n, 2 * n) for n in blocks)


@pytest.mark.parametrize("depth", [3, 4, -1])
def test_depths_beyond_the_layers_are_refused(depth: int) -> None:
    with pytest.raises(UserError, match=rf"lens_layers: {depth} is not a layer .* \(0 to 2\)"):
        at_depths(((0, 0), (1, 1), (2, 2)), 4, (0.5, depth))


@pytest.mark.parametrize(("student_size", "teacher_size"), [(20, 48), (48, 20), (32, 32)])
def test_projections_keep_the_size_of_a_state(student_size: int, teacher_size: int) -> None:
    match = LayerMapping.by_depth(3, 3)
    match.project((student_size, teacher_size), frozenset({"outputs", "embeddings"}), seed=1)
    assert set(match.projections) == {"embeddings", "layer 0", "layer 1"}
    states = torch.randn(500, student_size, generator=torch.Generator().manual_seed(0))
    for weight in match.projections.values():
        assert weight.shape == (student_size, teacher_size)
        ratio = (states @ weight).square().mean() / states.square().mean()
        assert 0.8 < float(ratio.detach()) < 1.25
    other = LayerMapping.by_depth(3, 3)
    other.project((student_size, teacher_size), frozenset({"outputs", "lens"}), seed=1)
    assert set(other.projections) == {"layer 0", "layer 1"}


def test_projections_map_student_states_to_the_teachers_size() -> None:
    """Each through its own matrix, in full precision under autocast."""
    match = LayerMapping.by_depth(2, 2)
    match.project((3, 5), frozenset({"outputs", "embeddings"}), seed=0)
    draw = torch.Generator().manual_seed(2)
    student_states = [torch.randn(2, 4, 3, generator=draw) for _ in range(3)]
    teacher_states = [torch.randn(2, 4, 5, generator=draw) for _ in range(3)]
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    with torch.autocast("cpu", torch.bfloat16):
        embedded = match.embedded(features(student_states), features(teacher_states), mask)
        (states,) = match.states(features(student_states), features(teacher_states), mask)
    for projected, layer, name in ((embedded, 0, "embeddings"), (states, 1, "layer 0")):
        expected = student_states[layer][mask].double() @ match.projections[name].double()
        torch.testing.assert_close(projected[0].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(projected[1], teacher_states[layer][mask], rtol=0, atol=0)


def test_without_a_plan_the_mean_of_the_heads_is_compared() -> None:
    match = LayerMapping.by_depth(1, 2)
    draw = torch.Generator().manual_seed(2)
    student_heads = [torch.rand(1, 2, 4, 4, generator=draw)]
    teacher_heads = [torch.rand(1, 3, 4, 4, generator=draw) for _ in range(2)]
    mask = torch.tensor([[False, True, False, True]])
    ((q, p),) = match.attended(features([], student_heads), features([], teacher_heads), mask)
    assert q.shape == p.shape == (2, 1, 4)
    torch.testing.assert_close(q[1, 0], student_heads[0][0, :, 3].mean(0))
    torch.testing.assert_close(p[0, 0], teacher_heads[1][0, :, 1].mean(0))


def test_tiny_models_have_the_final_norm_where_it_is_looked_for() -> None:
    from tiny_models import NAMES

    from regrow.training.features import final_norm

    for model_type in NAMES:
        model = tiny_model(model_type)
        state = torch.randn(1, 2, 48, dtype=torch.float64)
        assert final_norm(model)(state).shape == state.shape
