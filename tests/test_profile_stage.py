"""The profile stage: padding, what is gathered, the two orders, what is reused and refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slow_profile import OPTIONS, Slow, calibration, close
from tiny_folders import data_of, write_model, write_text
from torch import Tensor
from transformers import AutoConfig

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.layerwise import LayerByLayer, Spill
from regrow.profile_folder import SCORES, STATISTICS
from regrow.runtime.progress import Progress
from regrow.stage import RecipePlan, RecipeRun, parse_step
from regrow.stages.profile import ProfileConfig, importance
from regrow.stages.profile import stage as profile_stage
from regrow.stages.profile.collect import Batch, Collector
from regrow.stages.profile.passes import layer_major, resident
from regrow.stages.profile.stage import profile

LAYER_MAJOR = OPTIONS.model_copy(update={"order": "layer"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    names = ("llama", "mistral", "qwen3", "gemma3_text", "qwen3_moe")
    return {name: write_model(folder / name, name, torch.float64) for name in names}


@pytest.mark.parametrize(("memory", "order"), [(10**9, "resident"), (10**5, "layer_major")])
def test_a_model_too_large_for_the_device_goes_layer_by_layer(
    models: dict[str, Checkpoint],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
    order: str,
) -> None:
    monkeypatch.setattr(profile_stage, "memory_bytes", lambda device: memory)
    used: list[str] = []
    for name in ("resident", "layer_major"):
        real = getattr(profile_stage, name)
        monkeypatch.setattr(
            profile_stage,
            name,
            lambda *arguments, real=real, name=name: (used.append(name), real(*arguments)),
        )
    config = ProfileConfig(samples=1, gram_tokens=0)
    options = OPTIONS.model_copy(update={"order": "auto"})
    profile(models["llama"], data_of(text), tmp_path / "out", config, options)
    assert used == [order]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "mixtral"])
def test_layer_major_computes_in_the_stored_dtype(text: Path, tmp_path: Path, name: str) -> None:
    """In bfloat16 a rounding more or less would show at once."""
    checkpoint = write_model(tmp_path / "model", name, torch.bfloat16)
    config = ProfileConfig(criteria=("activation_l2",), samples=2, gram_tokens=0)
    dtypes = [
        load_file(profile(checkpoint, data_of(text), tmp_path / o.order, config, o).folder / SCORES)
        for o in (OPTIONS, LAYER_MAJOR)
    ]
    for key, value in dtypes[0].items():
        assert torch.equal(dtypes[1][key], value), key


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped on Linux")
def test_a_resident_layer_keeps_no_file_mapped(tmp_path: Path) -> None:
    """Under a limit on memory a mapped shard counts whole, however small the tensor from it."""
    checkpoint = write_model(tmp_path / "model", "llama", torch.float64)
    config = AutoConfig.from_pretrained(str(checkpoint.folder))
    family = families.of(checkpoint)
    arguments = (
        family,
        config,
        checkpoint.names(),
        checkpoint.tensor,
        torch.float64,
        torch.device("cpu"),
    )
    shell = LayerByLayer(*arguments)
    with shell.resident(1):
        checkpoint._open = None
        assert str(checkpoint.folder) not in Path("/proc/self/maps").read_text()
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(shell.model.get_parameter(name), checkpoint.tensor(name))


@pytest.mark.parametrize("order", ["resident", "layer"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_padding_is_never_counted(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path, name: str, order: str
) -> None:
    """Blocks with padding give the sums of the same blocks without, Gram matrices too."""
    checkpoint = models[name]
    sequences = calibration(checkpoint, data_of(text), 2)
    counts = []
    for pad in (0, 9):
        family = families.of(checkpoint)
        needs = {dim: {"square_sum", "mean_abs_square_sum"} for dim in ("mlp", "heads", "hidden")}
        needs["layers"] = {"input_output_distance"}
        needs["experts"] = {"routed_tokens", "routed_norm_sum", "square_sum"}
        needs["expert_mlp"] = {"sum", "square_sum", "mean_abs_square_sum"}
        collector = Collector(family, needs, ("mlp", "heads"), weighted=True)
        inputs = {
            "input_ids": padded(sequences.input_ids, torch.full((2, pad), 5)),
            "position_ids": padded(sequences.position_ids, torch.arange(pad).expand(2, pad)),
        }
        real = padded(sequences.real, torch.zeros(2, pad, dtype=torch.bool))
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
            layer_major(*common, Spill(tmp_path / "spill"))
        counts.append({**sums, **collector.sums})
    assert counts[0].keys() == counts[1].keys()
    assert "gram/heads/0" in counts[0]
    assert ("routed_tokens/experts/1" in counts[0]) == (name == "qwen3_moe")
    for key, value in counts[0].items():
        close(counts[1][key], value.double(), rtol=1e-6)


def test_impossible_criteria_are_refused(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    cases = {
        "whole model": (ProfileConfig(criteria=("taylor",), samples=1), LAYER_MAJOR),
        "works on Gram": (ProfileConfig(criteria=("obs",), samples=8, gram_tokens=0), OPTIONS),
    }
    for message, (config, options) in cases.items():
        with pytest.raises(UserError, match=message):
            profile(models["llama"], data_of(text), tmp_path / "out", config, options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dims", "needs", "message"),
    [
        (
            {"mlp"},
            {"kurtosis"},
            r"no statistic .kurtosis. of mlp is gathered; there are: grad",
        ),
        ({"mlp", "layers"}, {"square_sum"}, r"no statistic 'square_sum' of layers"),
        ({"hidden"}, {"gram"}, r"no statistic 'gram' of hidden"),
        ({"kv_heads"}, {"routed_tokens"}, r"no statistic 'routed_tokens' of kv_heads"),
        ({"channels"}, {"sum"}, r"no dimension 'channels'; there are: mlp, heads"),
    ],
)
def test_a_criterion_with_an_unknown_statistic_is_refused_before_the_pass(
    models: dict[str, Checkpoint],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dims: set[str],
    needs: set[str],
    message: str,
) -> None:
    new = SimpleNamespace(DIMS=frozenset(dims), NEEDS=frozenset(needs))
    monkeypatch.setattr(importance, "plugins", SimpleNamespace(load=lambda *_: new))
    config = ProfileConfig(criteria=("new",), samples=8)
    with pytest.raises(UserError, match=message):
        profile(models["llama"], data_of(text), tmp_path / "out", config, OPTIONS)
    assert not (tmp_path / "out").exists()


def test_gram_matrices_are_gathered_where_they_are_read(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    default = ProfileConfig(samples=8)
    assert default.resolved().gram_tokens == 0
    assert default.resolved(read_later=True).gram_tokens == 65536
    assert ProfileConfig(criteria=("wanda", "obs")).resolved().gram_tokens == 65536
    for gram_tokens in (0, 100):
        explicit = ProfileConfig(gram_tokens=gram_tokens)
        assert explicit.resolved(True).gram_tokens == explicit.resolved().gram_tokens == gram_tokens
    measured = profile(models["llama"], data_of(text), tmp_path / "default", default, OPTIONS)
    assert measured.info["grams"] == []
    assert not list((measured.folder / "grams").iterdir())


@pytest.mark.parametrize(
    ("steps", "tokens"),
    [
        (["profile", {"prune": {"keep_params": 0.8}}], 0),
        (["profile", {"prune": {"keep_params": 0.8, "repair_method": "gram"}}], 65536),
        (["profile", {"prune": {"num_layers": 2, "repair_method": "gram", "repair": False}}], 0),
        (["profile", "rotate", "profile", {"prune": {"repair_method": "gram"}}], 0),
        ([{"profile": {"gram_tokens": 512}}, {"prune": {"keep_params": 0.8}}], 512),
    ],
)
def test_a_recipe_gathers_gram_matrices_for_the_prunes_that_follow(
    models: dict[str, Checkpoint],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[Any],
    tokens: int,
) -> None:
    entries = [parse_step(entry, number) for number, entry in enumerate(steps)]
    configs: list[ProfileConfig] = []
    monkeypatch.setattr(profile_stage, "profile", lambda *arguments: configs.append(arguments[3]))
    run = RecipeRun(str(models["llama"].folder), data_of(text), entries, tmp_path, OPTIONS)
    entries[0].stage.run(entries[0], run, "01-profile")
    assert [config.gram_tokens for config in configs] == [tokens]


def test_gram_matrices_that_a_repair_lacks_are_refused_before_the_profile(
    models: dict[str, Checkpoint], text: Path
) -> None:
    pruning = {"num_layers": 2, "repair_method": "gram"}
    entries: list[Any] = [{"profile": {"gram_tokens": 0}}, {"prune": pruning}]
    steps = [parse_step(entry, number) for number, entry in enumerate(entries)]
    plan = RecipePlan("model", models["llama"], data_of(text), OPTIONS, steps)
    steps[0].stage.leave(steps[0], plan)
    with pytest.raises(UserError, match="repair by gram needs Gram matrices, and the profile"):
        steps[1].stage.check(steps[1], plan)


def test_too_few_sequences_for_a_repair_are_refused_before_the_profile(
    models: dict[str, Checkpoint], text: Path
) -> None:
    entries: list[Any] = [{"profile": {"samples": 7}}, {"prune": {"num_layers": 2}}]
    entries.append({"prune": {"num_layers": 2, "repair": False}})
    steps = [parse_step(entry, number) for number, entry in enumerate(entries)]
    plan = RecipePlan("model", models["llama"], data_of(text), OPTIONS, steps)
    steps[0].stage.leave(steps[0], plan)
    with pytest.raises(UserError, match=r"before it has 7 sequences .* takes 8 or more"):
        steps[1].stage.check(steps[1], plan)
    steps[2].stage.check(steps[2], plan)


def padded(x: Tensor, end: Tensor) -> Tensor:
    return torch.cat([x, end.to(x.dtype)], 1)


def test_a_padded_sequence_through_the_stage(models: dict[str, Checkpoint], tmp_path: Path) -> None:
    """Too little text for one block: the stage counts the real tokens only."""
    text = write_text(tmp_path / "short.jsonl", documents=6)
    data = data_of(text, sequence_length=256)
    config = ProfileConfig(criteria=("minitron",), samples=3, gram_tokens=0)
    measured = profile(models["qwen3"], data, tmp_path / "out", config, OPTIONS)
    sequences = calibration(models["qwen3"], data, 3)
    assert len(sequences) == 1
    assert measured.info["tokens"] == int(sequences.real.sum()) < 256
    slow = Slow(models["qwen3"], sequences)
    statistics = load_file(measured.folder / STATISTICS)
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
        measured = profile(models["llama"], data_of(text), tmp_path / str(number), config, OPTIONS)
        statistics = load_file(measured.folder / STATISTICS)
        assert {key.split("/")[0] for key in statistics} == expected
        scored = {key.split("/")[0] for key in load_file(measured.folder / SCORES)}
        assert scored == set(criteria)
        files = {path.name for path in (measured.folder / "grams").iterdir()}
        assert files == {f"heads-{layer}.safetensors" for layer in range(3)}
        assert measured.has_gram("heads")
        assert not measured.has_gram("mlp")


def test_uniform_weights_and_number_of_tokens(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    config = ProfileConfig(samples=8, gram_tokens=8 * 32 + 31, token_weight="uniform")
    measured = profile(models["llama"], data_of(text), tmp_path / "out", config, OPTIONS)
    assert measured.info["gram_tokens"] == 8 * 32
    slow = Slow(models["llama"], calibration(models["llama"], data_of(text), 8))
    rows = slow.rows("mlp/1", [7])
    close(measured.gram("mlp", 1).validate, rows.T @ rows)


def test_too_few_sequences_for_grams_and_unknown_criteria_are_refused(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path
) -> None:
    config = ProfileConfig(samples=8, gram_tokens=7 * 32)
    with pytest.raises(UserError, match="too few"):
        profile(models["llama"], data_of(text), tmp_path / "a", config, OPTIONS)
    config = ProfileConfig(criteria=("activation_l1",))
    with pytest.raises(UserError, match="activation_l2"):
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
    measured = profile(checkpoint.folder, data_of(text), tmp_path / "out", config, OPTIONS)
    scores = measured.scores("block_influence", "layers")["all"]
    assert abs(float(scores[1])) < 1e-6
    assert float(scores[[0, 2]].min()) > 1e-2


def test_saved_and_reused_until_text_or_model_change(
    models: dict[str, Checkpoint], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_text = tmp_path / "text.jsonl"
    copied_text.write_bytes(text.read_bytes())
    config = ProfileConfig(samples=8, gram_tokens=8 * 32)
    first = profile(models["llama"], data_of(copied_text), tmp_path / "out", config, OPTIONS)
    runs: list[int] = []
    run = profile_stage._run
    monkeypatch.setattr(profile_stage, "_run", lambda *arguments: (runs.append(1), run(*arguments)))
    reused = profile(models["llama"], data_of(copied_text), tmp_path / "out", config, OPTIONS)
    assert runs == []
    assert reused.info == first.info
    copied_text.write_text(copied_text.read_text() + json.dumps({"text": "One more."}) + "\n")
    changed = profile(models["llama"], data_of(copied_text), tmp_path / "out", config, OPTIONS)
    assert runs == [1]
    assert changed.info != first.info  # what tells a prune that its profile is another one
    profile(models["mistral"], data_of(copied_text), tmp_path / "out", config, OPTIONS)
    assert runs == [1, 1]
