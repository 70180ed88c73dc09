"""Statistics and Gram matrices against plain hooks and one document at a time, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slow_profile import OPTIONS, Slow, calibration, close
from tiny_folders import data_of, write_model
from tiny_models import NAMES

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.profile_folder import STATISTICS, Profile
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile

FAMILIES = NAMES

CONFIG = ProfileConfig(
    criteria=(
        *("activation_l2", "minitron", "block_influence"),
        *("routed_output", "routing_frequency"),
    ),
    samples=19,
    gram_tokens=17 * 32,
)
GRADIENTS = ("gradient", "taylor", "fisher", "fluctuation")

LAYER_MAJOR = OPTIONS.model_copy(update={"order": "layer"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, name, torch.float64) for name in FAMILIES}


@pytest.fixture(scope="module")
def profiles(
    models: dict[str, Checkpoint], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Profile]]:
    """Per family its profile by both orders."""
    by_name: dict[str, dict[str, Profile]] = {}
    for name, checkpoint in models.items():
        folder = tmp_path_factory.mktemp(name)
        by_name[name] = {
            options.order: profile(
                checkpoint, data_of(text), folder / options.order, CONFIG, options
            )
            for options in (OPTIONS, LAYER_MAJOR)
        }
    return by_name


def places(checkpoint: Checkpoint, *dims: str) -> list[tuple[str, int]]:
    family = families.of(checkpoint)
    return [(dim, n) for dim in dims for n in family.layers_of(dim, checkpoint.config)]


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_and_grams_equal_the_slow_version(
    models: dict[str, Checkpoint], profiles: dict[str, dict[str, Profile]], text: Path, name: str
) -> None:
    checkpoint, profile = models[name], profiles[name]["resident"]
    sizes = families.of(checkpoint).sizes(checkpoint.config)
    sequences = calibration(checkpoint, data_of(text), 19)
    assert len(sequences) == 19
    slow = Slow(checkpoint, sequences)
    statistics = load_file(profile.folder / STATISTICS)
    per_layer = places(checkpoint, "mlp", "heads")
    for dim, layer in [*per_layer, ("hidden", "all")]:
        for statistic in ("square_sum", "mean_abs_square_sum"):
            expected = getattr(slow, statistic)(dim, layer)
            tensor = statistics.pop(f"{statistic}/{dim}/{layer}")
            assert tensor.shape == (sizes[dim], len(expected) // sizes[dim])
            close(tensor.flatten(), expected)
            if dim == "heads":
                groups = statistics.pop(f"{statistic}/kv_heads/{layer}")
                assert torch.equal(groups.flatten(), tensor.flatten())
                assert len(groups) == sizes["kv_heads"]
    for _, layer in places(checkpoint, "experts"):
        expert_sums = statistics.pop(f"square_sum/expert_mlp/{layer}")
        assert expert_sums.shape == (sizes["experts"], sizes["expert_mlp"])
        close(expert_sums, slow.square_sum("expert_mlp", layer))
        close(
            statistics.pop(f"mean_abs_square_sum/expert_mlp/{layer}"),
            slow.mean_abs_square_sum("expert_mlp", layer),
        )
        norms_NE = slow.rows(f"experts/{layer}").norm(dim=-1)
        energy = statistics.pop(f"square_sum/experts/{layer}").squeeze(-1)
        close(energy, norms_NE.square().sum(0))
        close(statistics.pop(f"routed_norm_sum/experts/{layer}").squeeze(-1), norms_NE.sum(0))
        counts = torch.stack(slow.routed[layer]).sum(0)
        assert (
            statistics.pop(f"routed_tokens/experts/{layer}").squeeze(-1).tolist() == counts.tolist()
        )
        chosen = checkpoint.config["num_experts_per_tok"]
        assert counts.sum() == chosen * slow.rows(f"heads/{layer}").shape[0]
        means = norms_NE.sum(0) / counts
        close(profile.scores("routed_output", "experts")[str(layer)], means)
        share = profile.scores("routing_frequency", "experts")[str(layer)]
        close(share, counts.double() / len(norms_NE))
        close(profile.scores("activation_l2", "experts")[str(layer)], norms_NE.norm(dim=0))
    influence = statistics.pop("input_output_distance/layers/all")
    expected = torch.tensor([[slow.influence(n)] for n in range(sizes["layers"])])
    close(influence, expected.double())
    assert not statistics
    held_out = [7, 15]
    fit = [n for n in range(17) if n not in held_out]
    for dim, layer in per_layer:
        gram = profile.gram(dim, layer)
        close(gram.fit, slow.gram(dim, layer, fit))
        close(gram.validate, slow.gram(dim, layer, held_out))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_sums_equal_the_slow_version(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = models[name]
    config = ProfileConfig(criteria=GRADIENTS, samples=7, gram_tokens=0)
    folder = profile(checkpoint, data_of(text), tmp_path / "out", config, OPTIONS).folder
    statistics = load_file(folder / STATISTICS)
    sizes = families.of(checkpoint).sizes(checkpoint.config)
    slow = Slow(checkpoint, calibration(checkpoint, data_of(text), 7))
    for dim in ("mlp", "heads", "hidden", "layers", "experts", "expert_mlp"):
        width = {"heads": sizes["head_dim"], "experts": sizes["hidden"]}.get(dim, 1)
        all_layers = range(sizes["layers"])
        layers = all_layers if dim == "layers" else [n for _, n in places(checkpoint, dim)]
        for layer in ["all"] if dim == "hidden" else layers:
            changes = slow.changes(dim, layer, width)
            place = f"{dim}/all" if dim == "layers" else f"{dim}/{layer}"
            row = slice(None) if dim != "layers" else slice(int(layer), int(layer) + 1)
            absolute = torch.stack([change.abs().sum(0) for change in changes]).sum(0).flatten()
            squares = torch.stack([change.square().sum(0) for change in changes]).sum(0).flatten()
            close(statistics[f"taylor_abs_sum/{place}"][row].flatten(), absolute)
            close(statistics[f"taylor_square_sum/{place}"][row].flatten(), squares)
            if dim not in ("layers", "experts"):
                gradients = slow.gradient_square_sum(dim, layer).flatten()
                close(statistics[f"gradient_square_sum/{place}"].flatten(), gradients)
            if dim in ("mlp", "heads", "expert_mlp"):
                close(statistics[f"sum/{place}"].flatten(), slow.sum(dim, layer).flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_major_gives_the_same_numbers(
    models: dict[str, Checkpoint], profiles: dict[str, dict[str, Profile]], name: str
) -> None:
    resident, layer_major = profiles[name]["resident"].folder, profiles[name]["layer"].folder
    files = sorted(p.relative_to(resident) for p in resident.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(layer_major) for p in layer_major.rglob("*.safetensors"))
    assert len(files) == 3 + len(places(models[name], "mlp", "heads"))
    for file in files:
        resident_tensors, layer_major_tensors = (
            load_file(resident / file),
            load_file(layer_major / file),
        )
        assert resident_tensors.keys() == layer_major_tensors.keys()
        for key, value in resident_tensors.items():
            torch.testing.assert_close(layer_major_tensors[key], value, rtol=1e-6, atol=0)
    assert not (layer_major / "spill").exists()


def test_two_profiles_are_the_same_to_the_bit(
    models: dict[str, Checkpoint],
    profiles: dict[str, dict[str, Profile]],
    text: Path,
    tmp_path: Path,
) -> None:
    first = profiles["qwen3"]["resident"].folder
    second = profile(models["qwen3"], data_of(text), tmp_path / "out", CONFIG, OPTIONS).folder
    for path in first.rglob("*.safetensors"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
