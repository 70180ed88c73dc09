"""Angular distance: every pair of depths, the chosen layers, and refused settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slow_profile import OPTIONS, Slow, calibration
from tiny_folders import data_of, write_model
from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.profile_folder import SCORES, STATISTICS, Profile
from regrow.pruning.choose import choose
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.collect import ROWS, layer_distances
from regrow.stages.profile.stage import profile
from regrow.stages.report.sections.importance import _layers, rounded

CONFIG = ProfileConfig(criteria=("angular_distance", "last_layers"), samples=7, gram_tokens=0)
LAYERS = 7


def slow_angle(first: Tensor, second: Tensor) -> float:
    angles = [
        math.acos(float(a @ b / (a.norm() * b.norm()))) for a, b in zip(first, second, strict=True)
    ]
    return sum(angles) / len(angles) / math.pi


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_every_pair_equals_the_slow_version(text: Path, tmp_path: Path, name: str) -> None:
    checkpoint = write_model(tmp_path / "model", name, torch.float64)
    measured = profile(checkpoint, data_of(text), tmp_path / "out", CONFIG, OPTIONS)
    slow = Slow(checkpoint, calibration(checkpoint, data_of(text), 7))
    layers = checkpoint.config["num_hidden_layers"]
    expected = torch.zeros(layers, layers, dtype=torch.float64)
    for last in range(layers):
        for first in range(last + 1):
            rows = slow.rows(f"in/{first}"), slow.rows(f"out/{last}")
            expected[last, first] = slow_angle(*rows)
    distances = load_file(measured.folder / STATISTICS)["angular_distance/layers/all"]
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_known_angles_over_several_portions_of_tokens() -> None:
    """Turned by 45 degrees in each of two layers, whatever the lengths."""
    start = torch.tensor([[1.0, 0.0]]).repeat(2 * ROWS + 3, 1)
    turned = torch.tensor([[2.0, 2.0]]).repeat(2 * ROWS + 3, 1)
    twice = torch.tensor([[0.0, 0.5]]).repeat(2 * ROWS + 3, 1)
    distances = layer_distances([start, turned, twice]) / len(start)
    expected = torch.tensor([[0.25, 0.0], [0.5, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(distances, expected, rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def planted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """The profile of a model whose layers 2 and 5 do nothing, and 3 and 4 only together."""
    folder = tmp_path_factory.mktemp("planted")
    checkpoint = write_model(folder / "model", num_hidden_layers=LAYERS)
    model = checkpoint.model(torch.float32)
    with torch.no_grad():
        for n, layer in enumerate(model.get_submodule("model.layers").children()):
            if n in (2, 3, 4, 5):
                layer.get_parameter("self_attn.o_proj.weight").zero_()
                layer.get_parameter("mlp.down_proj.weight").zero_()
    model.save_pretrained(str(checkpoint.folder))
    criteria = ("angular_distance", "block_influence")
    config = ProfileConfig(criteria=criteria, samples=4, gram_tokens=0)

    def shifted(self: Checkpoint, *_: object) -> object:
        loaded = real(self, torch.float32)
        stack = list(loaded.get_submodule("model.layers").children())
        stack[3].register_forward_hook(lambda module, inputs, out: out + 3.0)
        stack[4].register_forward_hook(lambda module, inputs, out: out - 3.0)
        return loaded

    real = Checkpoint.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "model", shifted)
        return profile(Checkpoint(folder / "model"), data_of(text), folder / "out", config, OPTIONS)


@pytest.mark.parametrize(("gone", "dropped"), [(2, [3, 4]), (4, [2, 3, 4, 5])])
def test_the_layers_that_do_nothing_are_removed(
    planted: Profile, gone: int, dropped: list[int]
) -> None:
    """Layers 3 and 4 each turn the stream, and undo each other: no score of one layer sees that."""
    checkpoint = Checkpoint(planted.folder.parent / "model")
    family = families.of(checkpoint)
    sizes = {"layers": LAYERS - gone}
    plan = choose(checkpoint, family, planted, sizes, "none", "angular_distance")
    assert plan.layers == [n for n in range(LAYERS) if n not in dropped]
    single = choose(checkpoint, family, planted, {"layers": LAYERS - 2}, "none", "block_influence")
    assert single.layers == [0, 1, 3, 4, 6]


@pytest.mark.parametrize("gone", range(1, 7))
def test_the_layers_of_least_distance_are_removed(planted: Profile, gone: int) -> None:
    distances = load_file(planted.folder / STATISTICS)["angular_distance/layers/all"]
    blocks = {first: float(distances[first + gone - 1, first]) for first in range(8 - gone)}
    checkpoint = Checkpoint(planted.folder.parent / "model")
    sizes = {"layers": LAYERS - gone}
    plan = choose(checkpoint, families.of(checkpoint), planted, sizes, "none", "angular_distance")
    dropped = sorted(set(range(LAYERS)) - set(plan.kept_layers()))
    assert dropped == list(range(dropped[0], dropped[0] + gone))
    assert blocks[dropped[0]] == min(blocks.values())


def test_last_layers_drops_from_the_end(text: Path, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", num_hidden_layers=5)
    config = CONFIG.model_copy(update={"criteria": ("last_layers",)})
    measured = profile(checkpoint, data_of(text), tmp_path / "out", config, OPTIONS)
    assert set(load_file(measured.folder / SCORES)) == {"last_layers/layers/all"}
    family = families.of(checkpoint)
    plan = choose(checkpoint, family, measured, {"layers": 3}, "none", "last_layers")
    assert plan.layers == [0, 1, 2]


def test_one_layer_at_a_time_is_refused(text: Path, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model")
    options = OPTIONS.model_copy(update={"order": "layer"})
    with pytest.raises(UserError, match=r"pairs of layers \(angular_distance\) need the whole"):
        profile(checkpoint, data_of(text), tmp_path / "out", CONFIG, options)
    assert not (tmp_path / "out").exists()


def test_the_report_shows_the_scores_for_the_number_of_removed_layers(planted: Profile) -> None:
    """Without a cut the row of one layer; bars are scores [L], as for other criteria."""
    scores = planted.scores("angular_distance", "layers")["all"]
    chart = _layers(scores, None, "angular_distance")
    (bars,) = chart.figure["data"]
    assert bars["y"] == rounded(scores[0])
