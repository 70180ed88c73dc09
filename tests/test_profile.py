"""Statistics and Gram matrices against plain hooks and one document at a time, in float64."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import data_of, write_model, write_text
from tiny_models import SPECIAL
from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.data import Blocks, DataConfig, build_blocks
from regrow.errors import UserError
from regrow.options import Options
from regrow.stages.profile import ProfileConfig, profile
from regrow.stages.profile import stage as profile_stage
from regrow.stages.profile.collect import Batch, Collector
from regrow.stages.profile.orders import layer_major, resident
from regrow.progress import Progress
from regrow.statistics import SCORES, STATISTICS, Profile

FAMILIES = sorted(SPECIAL)
CONFIG = ProfileConfig(
    criteria=("activation_l2", "minitron", "block_influence"), samples=19, gram_tokens=17 * 32
)
OPTIONS = Options(device="cpu", batch_size=3, order="resident")
LAYER_MAJOR = OPTIONS.model_copy(update={"order": "layer"})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=120)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, name, torch.float64) for name in FAMILIES}


@pytest.fixture(scope="module")
def profiles(
    models: dict[str, Checkpoint], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Profile]]:
    """Per family its profile by both orders."""
    found: dict[str, dict[str, Profile]] = {}
    for name, checkpoint in models.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = {
            options.order: profile(
                checkpoint, data_of(text), folder / options.order, CONFIG, options
            )
            for options in (OPTIONS, LAYER_MAJOR)
        }
    return found


class Slow:
    """What every watched place sees, token by token: documents run alone, none is packed."""

    def __init__(self, checkpoint: Checkpoint, blocks: Blocks) -> None:
        self.model = checkpoint.model(torch.float64)
        self.seen: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.block = 0
        pre_mlp = "pre_feedforward" if "gemma" in self.model.config.model_type else "post_attention"
        for number, layer in enumerate(self.model.base_model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self._watch_input(attention.o_proj, f"heads/{number}")
            self._watch_input(mlp.down_proj, f"mlp/{number}")
            mlp_norm = layer.get_submodule(f"{pre_mlp}_layernorm")
            self._watch_input(layer.input_layernorm, f"residual/heads/{number}")
            self._watch_input(mlp_norm, f"residual/mlp/{number}")
            self._watch_output(layer.input_layernorm, f"norm/attention/{number}")
            self._watch_output(mlp_norm, f"norm/mlp/{number}")
            self._watch_input(layer, f"in/{number}")
            self._watch_output(layer, f"out/{number}")
        self._watch_output(self.model.base_model.norm, "norm/final")
        self._run(blocks)

    def _watch_input(self, module: torch.nn.Module, place: str) -> None:
        module.register_forward_pre_hook(lambda _, inputs: self._keep(place, inputs[0]))

    def _watch_output(self, module: torch.nn.Module, place: str) -> None:
        module.register_forward_hook(lambda _, inputs, output: self._keep(place, output))

    def _keep(self, place: str, x_1Td: Tensor) -> None:
        self.seen[place][self.block] += list(x_1Td[0])

    @torch.no_grad()
    def _run(self, blocks: Blocks) -> None:
        for self.block, (ids, positions, real) in enumerate(
            zip(blocks.input_ids, blocks.position_ids, blocks.real, strict=True)
        ):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for begin, end in zip(starts[:-1], starts[1:], strict=True):
                if real[begin]:
                    self.model.base_model(ids[None, begin:end], use_cache=False)

    def rows(self, place: str, blocks: range | list[int] | None = None) -> Tensor:
        """Every token's vector at a place [N, d], of these blocks or all."""
        seen = self.seen[place]
        chosen = seen if blocks is None else blocks
        return torch.stack([x for block in chosen for x in seen[block]])

    def places(self, dim: str, layer: int | str) -> list[str]:
        if dim != "hidden":
            return [f"{dim}/{layer}"]
        return [place for place in self.seen if place.startswith("norm/")]

    def square_sum(self, dim: str, layer: int | str) -> Tensor:
        rows = [self.rows(place) for place in self.places(dim, layer)]
        return torch.stack([x.square().sum(0) for x in rows]).sum(0)

    def mean_abs_square_sum(self, dim: str, layer: int | str) -> Tensor:
        total = 0.0
        for place in self.places(dim, layer):
            for block in self.seen[place]:
                total = total + self.rows(place, [block]).abs().mean(0) ** 2
        assert isinstance(total, Tensor)
        return total

    def influence(self, layer: int) -> float:
        before, after = self.rows(f"in/{layer}"), self.rows(f"out/{layer}")
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
        return 1 - sum(cosines) / len(cosines)

    def gram(self, dim: str, layer: int, blocks: list[int]) -> Tensor:
        rows = self.rows(f"{dim}/{layer}", blocks)
        residuals = self.rows(f"residual/{dim}/{layer}", blocks)
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for x, r in zip(rows, residuals, strict=True):
            total += torch.outer(x, x) / (r @ r)
        return total


def calibration(checkpoint: Checkpoint, data: DataConfig, samples: int) -> Blocks:
    return build_blocks(data, checkpoint.tokenizer(), "calibration", samples)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
    """Norm-wise closeness: float32 sums in the profile, float64 in the slow version."""
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= rtol * float(expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_and_grams_equal_the_slow_version(
    models: dict[str, Checkpoint], profiles: dict[str, dict[str, Profile]], text: Path, name: str
) -> None:
    checkpoint, found = models[name], profiles[name]["resident"]
    sizes = families.of(checkpoint).sizes(checkpoint.config)
    blocks = calibration(checkpoint, data_of(text), 19)
    assert len(blocks) == 19
    slow = Slow(checkpoint, blocks)
    statistics = load_file(found.folder / STATISTICS)
    per_layer = [(dim, n) for dim in ("mlp", "heads") for n in range(sizes["layers"])]
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
    influence = statistics.pop("input_output_distance/layers/all")
    expected = torch.tensor([[slow.influence(n)] for n in range(sizes["layers"])])
    close(influence, expected.double())
    assert not statistics
    held_out = [7, 15]
    fit = [n for n in range(17) if n not in held_out]
    for dim, layer in per_layer:
        gram = found.gram(dim, layer)
        close(gram.fit, slow.gram(dim, layer, fit))
        close(gram.validate, slow.gram(dim, layer, held_out))


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_major_gives_the_same_numbers(
    profiles: dict[str, dict[str, Profile]], name: str
) -> None:
    one, other = profiles[name]["resident"].folder, profiles[name]["layer"].folder
    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(other) for p in other.rglob("*.safetensors"))
    layers = int(profiles[name]["resident"].scores("block_influence", "layers")["all"].numel())
    assert len(files) == 2 + 2 * layers
    for file in files:
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-6, atol=0)
    assert not (other / "spill").exists()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_layer_major_computes_in_the_stored_dtype(text: Path, tmp_path: Path, name: str) -> None:
    """In bfloat16 a rounding more or less would show at once."""
    checkpoint = write_model(tmp_path / "model", name, torch.bfloat16)
    config = ProfileConfig(criteria=("activation_l2",), samples=2, gram_tokens=0)
    found = [
        load_file(profile(checkpoint, data_of(text), tmp_path / o.order, config, o).folder / SCORES)
        for o in (OPTIONS, LAYER_MAJOR)
    ]
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key


@pytest.mark.parametrize("order", ["resident", "layer"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_padding_is_never_counted(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path, name: str, order: str
) -> None:
    """Blocks with padding give the sums of the same blocks without, Gram matrices too."""
    checkpoint = models[name]
    blocks = calibration(checkpoint, data_of(text), 2)
    found = []
    for pad in (0, 9):
        family = families.of(checkpoint)
        needs = {dim: {"square_sum", "mean_abs_square_sum"} for dim in ("mlp", "heads", "hidden")}
        needs["layers"] = {"input_output_distance"}
        collector = Collector(family, needs, ("mlp", "heads"), weighted=True)
        inputs = {
            "input_ids": padded(blocks.input_ids, torch.full((2, pad), 5)),
            "position_ids": padded(blocks.position_ids, torch.arange(pad).expand(2, pad)),
        }
        real = padded(blocks.real, torch.zeros(2, pad, dtype=torch.bool))
        sums: dict[str, Tensor] = {}

        def take(
            layer: int, collector: Collector = collector, sums: dict[str, Tensor] = sums
        ) -> None:
            for dim, gram in collector.take_grams(layer).items():
                sums[f"gram/{dim}/{layer}"] = gram.fit

        common: Any = (checkpoint, [(Batch(real, "fit"), inputs)], collector, take)
        common = (*common, torch.device("cpu"), torch.float64, Progress("", 1, ""))
        if order == "resident":
            resident(*common)
        else:
            layer_major(*common, tmp_path / "spill")
        found.append({**sums, **collector.sums})
    assert found[0].keys() == found[1].keys()
    assert "gram/heads/0" in found[0]
    for key, value in found[0].items():
        close(found[1][key], value.double(), rtol=1e-6)


def padded(x: Tensor, end: Tensor) -> Tensor:
    return torch.cat([x, end.to(x.dtype)], 1)


def test_a_padded_block_through_the_stage(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Too little text for one block: the stage counts the real tokens only."""
    text = write_text(tmp_path / "short.jsonl", documents=6)
    data = data_of(text, sequence_length=512)
    config = ProfileConfig(criteria=("minitron",), samples=3, gram_tokens=0)
    found = profile(models["qwen3"], data, tmp_path / "out", config, OPTIONS)
    blocks = calibration(models["qwen3"], data, 3)
    assert len(blocks) == 1
    assert found.info["tokens"] == int(blocks.real.sum()) < 512
    slow = Slow(models["qwen3"], blocks)
    statistics = load_file(found.folder / STATISTICS)
    for layer in range(3):
        close(
            statistics[f"mean_abs_square_sum/mlp/{layer}"].flatten(),
            slow.mean_abs_square_sum("mlp", layer),
        )


def test_only_what_the_criteria_need_is_gathered(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    cases = {
        ("activation_l2",): {"square_sum"},
        ("minitron", "random"): {"mean_abs_square_sum"},
        ("block_influence",): {"input_output_distance"},
        ("magnitude", "random"): set(),
    }
    for number, (criteria, expected) in enumerate(cases.items()):
        config = ProfileConfig(criteria=criteria, samples=9, gram_tokens=9 * 32, grams=("heads",))
        found = profile(models["llama"], data_of(text), tmp_path / str(number), config, OPTIONS)
        statistics = load_file(found.folder / STATISTICS)
        assert {key.split("/")[0] for key in statistics} == expected
        scored = {key.split("/")[0] for key in load_file(found.folder / SCORES)}
        assert scored == set(criteria)
        files = {path.name for path in (found.folder / "grams").iterdir()}
        assert files == {f"heads-{layer}.safetensors" for layer in range(3)}
        assert found.has_gram("heads")
        assert not found.has_gram("mlp")


def test_uniform_weights_and_number_of_tokens(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    config = ProfileConfig(samples=8, gram_tokens=8 * 32 + 31, token_weight="uniform")
    found = profile(models["llama"], data_of(text), tmp_path / "out", config, OPTIONS)
    assert found.info["gram_tokens"] == 8 * 32
    slow = Slow(models["llama"], calibration(models["llama"], data_of(text), 8))
    rows = slow.rows("mlp/1", [7])
    close(found.gram("mlp", 1).validate, rows.T @ rows)


def test_too_few_blocks_for_grams_and_unknown_criteria_are_refused(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="too few"):
        config = ProfileConfig(samples=8, gram_tokens=7 * 32)
        profile(models["llama"], data_of(text), tmp_path / "a", config, OPTIONS)
    with pytest.raises(UserError, match="activation_l2"):
        config = ProfileConfig(criteria=("activation_l1",))
        profile(models["llama"], data_of(text), tmp_path / "b", config, OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_does_nothing_has_no_influence(text: Path, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", "llama", torch.float64)
    model = checkpoint.model(torch.float64)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{name}").weight.zero_()  # type: ignore[operator,union-attr]
    model.save_pretrained(str(checkpoint.folder))
    config = ProfileConfig(criteria=("block_influence",), samples=4, gram_tokens=0)
    found = profile(checkpoint.folder, data_of(text), tmp_path / "out", config, OPTIONS)
    scores = found.scores("block_influence", "layers")["all"]
    assert abs(float(scores[1])) < 1e-6
    assert float(scores[[0, 2]].min()) > 1e-2


def test_saved_and_reused_until_text_or_model_change(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "text.jsonl"
    own.write_bytes(text.read_bytes())
    config = ProfileConfig(samples=8, gram_tokens=8 * 32)
    first = profile(models["llama"], data_of(own), tmp_path / "out", config, OPTIONS)
    runs: list[int] = []
    run = profile_stage._run
    monkeypatch.setattr(profile_stage, "_run", lambda *given: (runs.append(1), run(*given)))
    again = profile(models["llama"], data_of(own), tmp_path / "out", config, OPTIONS)
    assert runs == []
    assert again.info == first.info
    own.write_text(own.read_text() + json.dumps({"text": "One more."}) + "\n")
    changed = profile(models["llama"], data_of(own), tmp_path / "out", config, OPTIONS)
    assert runs == [1]
    assert changed.info != first.info  # what tells a prune that its profile is another one
    profile(models["mistral"], data_of(own), tmp_path / "out", config, OPTIONS)
    assert runs == [1, 1]


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
