"""Speed and memory: statistics by hand, operations counted by torch, models in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate import write_model
from tiny_models import tiny_ids, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from regrow import families
from regrow.checkpoint import load
from regrow.config import Options
from regrow.cost import forward_flops
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.metrics import memory, speed
from regrow.stages.evaluate.metrics.speed import Run, Setting


def eval_model(folder: Path, label: str = "m") -> FolderEvalModel:
    options = Options(device="cpu", batch_size=1)
    checkpoint = load(folder)
    return FolderEvalModel(
        *(label, checkpoint, checkpoint.tokenizer(), [], torch.float32, options, {})
    )


def values(measured: MetricResult) -> dict[str, float]:
    return {figure.name: figure.value for figure in measured.figures}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    write_model(folder / "dense", tiny_model("llama", seed=1))
    write_model(folder / "small", tiny_model("llama", seed=2, intermediate_size=16))
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "mistral"])
def test_operations_are_those_that_torch_counts(model_type: str) -> None:
    """Up to the half of the scores that a causal model masks, and the weights of norms."""
    tokens = 20
    model = tiny_model(model_type, attn_implementation="eager")
    config = model.config.to_dict()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tiny_ids(1, tokens), logits_to_keep=1)
    family = families.get(model_type)
    full = family.sizes(config)
    masked = tokens * tokens - tokens * (tokens + 1) // 2
    masked *= 4 * full["layers"] * full["heads"] * full["head_dim"]
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    counted = forward_flops(family, config, tokens)
    rotary = counter.get_total_flops() - (counted + masked - 2 * norms * tokens)
    assert 0 <= rotary <= full["head_dim"] * tokens
    one_token = forward_flops(family, config, 1, past=tokens)
    difference = counted + one_token - forward_flops(family, config, tokens + 1)
    assert difference == 2 * full["vocab"] * full["hidden"]  # the head of the prompt's last token


def test_speed_statistics_equal_hand_computed_values(place: Path) -> None:
    """Two prompts of ten tokens; the first run only warms up."""
    setting = Setting(2, 10, 2)
    runs = [Run(9, [9, 9]), Run(0.1, [0.01, 0.03]), Run(0.3, [0.02, 0.06]), Run(0.2, [0.02, 0.02])]
    measured = values(
        MetricResult(speed._figures(eval_model(place / "dense"), {setting: runs}, "in turn"))
    )
    assert measured["prefill"] == pytest.approx(20 / 0.2)
    assert measured["decode"] == pytest.approx(2 / 0.02)
    assert measured["ttft"] == pytest.approx(200)
    assert measured["ttft_p95"] == pytest.approx(290)  # between 200 and 300, 0.9 of the way
    assert measured["time_per_output_token"] == pytest.approx(20)
    # 10 20 20 20 30 60: place 0.95 · 5 = 4.75
    assert measured["time_per_output_token_p95"] == pytest.approx(30 + 0.75 * 30)


def test_speed_up_as_a_share_of_the_operations(place: Path) -> None:
    setting = Setting(1, 16, 4)
    small, base = eval_model(place / "small", "small"), eval_model(place / "dense", "dense")
    runs = [Run(5, [5]), Run(0.1, [0.01]), Run(0.1, [0.02])]
    base_runs = [Run(1, [1]), Run(0.2, [0.03]), Run(0.3, [0.02])]
    figures = speed._speed_ups(small, base, {setting: runs}, {setting: base_runs})
    measured = values(MetricResult(figures))
    assert measured["prefill_speedup"] == pytest.approx(2.5)
    assert measured["decode_speedup"] == pytest.approx(2.0)
    family = families.get("llama")
    counts = [forward_flops(family, s.checkpoint.config, 16) for s in (base, small)]
    assert measured["prefill_of_flops"] == pytest.approx(2.5 * counts[1] / counts[0])
    after = [forward_flops(family, s.checkpoint.config, 1, past=18) for s in (base, small)]
    assert measured["decode_of_flops"] == pytest.approx(2.0 * after[1] / after[0])


@pytest.mark.parametrize("fits", [True, False])
def test_models_take_turns_where_they_fit(
    fits: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[str, str]] = []
    plain = speed._run

    def run(model: EvalModel, setting: Setting) -> Run:
        timed.append((model.label, str(setting)))
        return plain(model, setting)

    monkeypatch.setattr(speed, "_run", run)
    monkeypatch.setattr("regrow.stages.evaluate.eval_model.MEMORY_SHARE", 0.5 if fits else 0.0)
    models = {label: eval_model(place / label, label) for label in ("dense", "small")}
    config = EvaluateConfig(prefill_tokens=(8, 4), batch_sizes=(1, 3), decode_tokens=2, repeats=1)
    results = speed.measure_all(models, config, "dense")
    settings = ["1 x 8", "1 x 4", "3 x 8", "3 x 4"]
    order = ["dense", "small"] * 2 if fits else ["dense"] * 2 + ["small"] * 2
    assert timed == [(label, setting) for label in order for setting in settings]
    small = values(results["small"])
    for setting in ("", "/1 x 4", "/3 x 8", "/3 x 4"):
        for kind in ("prefill", "decode", "ttft", "ttft_p95", "prefill_speedup", "decode_of_flops"):
            assert small[kind + setting] > 0
    assert not any("speedup" in name for name in values(results["dense"]))
    order_text = "models in turn" if fits else "one model after the other"
    assert order_text in results["small"].figures[0].convention
    assert ("model" in vars(models["small"])) == fits


def test_peak_memory_holds_the_weights(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 528, "intermediate_size": 2048, "num_hidden_layers": 4}
    model = tiny_model("llama", **sizes)
    weights = 4 * sum(p.numel() for p in model.parameters())
    write_model(tmp_path / "m", model)
    del model
    config = EvaluateConfig(prefill_tokens=(16,))
    measured = values(memory.measure(eval_model(tmp_path / "m"), Context(config)))
    assert measured["load_time"] > 0
    if memory.RESET.exists():
        assert 0.9 * weights < measured["peak_memory"] < 5 * weights
