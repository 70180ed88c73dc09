"""Advice: ten requests with the answer an expert would sign, accepted recipes, and licences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cost import LLAMA_70B, QWEN3_8B
from tiny_job import call, refused, write_model, write_text

from regrow.config import Options
from regrow.cost.model import ModelSize
from regrow.errors import UserError
from regrow.recipe import recipe as recipes
from regrow.stages.advise import tables
from regrow.stages.advise.config import AdviseConfig
from regrow.stages.advise.licence import licence
from regrow.stages.advise.recipes import schedule
from regrow.stages.advise.source import Source, open_source
from regrow.stages.advise.stage import Advice, advise
from regrow.stages.advise.strategies import answers

QWEN3_32B = {**QWEN3_8B, "num_hidden_layers": 64, "hidden_size": 5120}
QWEN3_32B |= {"intermediate_size": 25600, "num_attention_heads": 64}
MODELS = {"8b": QWEN3_8B, "32b": QWEN3_32B, "70b": LLAMA_70B}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json for each model: no weights anywhere."""
    place = tmp_path_factory.mktemp("configs")
    for name, fields in MODELS.items():
        (place / f"{name}.json").write_text(json.dumps(fields))
    return place


def ask(folder: Path, model: str, **fields: Any) -> Advice:
    return advise(str(folder / f"{model}.json"), AdviseConfig(**fields))


REQUESTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    # A laptop with 16 GB and no budget: 16 GB of weights do not fit, 8 bits do, and lose nothing.
    "laptop": (
        *("8b", {"device": "laptop", "gpu_hours": 0}, "q8-0"),
        "Does quantization alone do? Yes: Q8_0",
    ),
    # A phone: even 4 bits of 8 B do not fit 4 GB; the sibling of 4 B does in 4 bits.
    "phone": (
        *("8b", {"device": "phone", "gpu_hours": 0, "tolerated_loss": 6}, "qwen3-4b-q4-k-m"),
        "Does quantization alone do? No, not even Q4_K_M: needs",
    ),
    # One card of 24 GB: the model fits as it is. Do nothing.
    "24 GB card": (
        *("8b", {"device": "rtx4090", "gpu_hours": 5}, "as-it-is"),
        "Does it have to be smaller? It keeps all targets as it is.",
    ),
    # 32 B on the same card: only 4 bits fit, and 1 to 3 points are tolerated.
    "32B on a 24 GB card": (
        *("32b", {"device": "rtx4090", "gpu_hours": 0}, "int4"),
        "Does quantization alone do? Yes: int4",
    ),
    # 70 B on one H200: fp8 halves it without loss; 141 GB of bf16 do not fit.
    "70B on an H200": (
        *("70b", {"device": "h200", "gpu_hours": 0}, "fp8"),
        "Does quantization alone do? Yes: fp8",
    ),
    # 70 B in 10 ms a token on one H100: no number of bits does that; a sibling of 8 B does.
    "70B in 10 ms": (
        *("70b", {"device": "h100", "max_decode_ms": 10, "tolerated_loss": 20}, "llama-3.1-8b"),
        "Does quantization alone do? No, not even int4",
    ),
    # A quarter faster on programs without quantized kernels, a cluster: prune a fifth, distil long.
    "cluster": (
        "8b",
        {"smaller": 1.25, "plain": True, "gpu_hours": 10_000, "gpus": 512, "max_decode_ms": 7.0},
        "prune-80",
        "Is a smaller model good enough already? Evaluate Qwen/Qwen3-4B",
    ),
    # Four times smaller for anybody: 4 bits lose up to 3 points, a cut to a quarter far more.
    "four times smaller": (
        *("8b", {"smaller": 2.6, "gpu_hours": 100}, "int4"),
        "Does quantization alone do? Yes: int4",
    ),
    # Ten times smaller, general: only a smaller pretrained model; its loss must be measured.
    "ten times smaller": (
        *("8b", {"smaller": 10, "gpu_hours": 1000}, "qwen3-1.7b-int4"),
        "Does quantization alone do? No, not even int4",
    ),
    # One narrow task, a hundred times smaller: a tiny model, trained on what the model labelled.
    "narrow task": (
        *("8b", {"smaller": 100, "task": "narrow", "gpu_hours": 100}, "tiny"),
        "Does quantization alone do? No, not even int4",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_ten_requests(name: str, folder: Path) -> None:
    model, fields, chosen, reason = REQUESTS[name]
    advice = ask(folder, model, **fields)
    assert advice.chosen is not None
    assert advice.chosen.name == chosen, [each.name for each in advice.others]
    assert not advice.chosen.misses
    assert reason in "\n".join(advice.lines())
    assert advice.chosen.reason
    assert advice.chosen.source


def test_combinations_are_shown_beside(folder: Path) -> None:
    """Prune, distil, then int4, where a smaller model exists that costs nothing."""
    advice = ask(folder, "8b", smaller=3.6, gpu_hours=10_000, tolerated_loss=6)
    by_name = {each.name: each for each in (advice.chosen, *advice.others) if each}
    pruned = next(each for name, each in by_name.items() if name.startswith("prune-"))
    assert pruned.cost is not None
    assert pruned.tokens >= 1e9
    assert pruned.recipe is not None
    assert [next(iter(s)) for s in pruned.recipe["stages"] if isinstance(s, dict)][:3] == [
        *("profile", "prune", "distill")
    ]


def test_the_next_step_after_a_smaller_model_is_to_teach_it(folder: Path) -> None:
    others = [each.name for each in ask(folder, "8b", smaller=10, gpu_hours=1000).others]
    assert "distil-qwen3-1.7b-int4" in others


def test_impossible_requests_say_what_is_missed(folder: Path) -> None:
    advice = ask(folder, "70b", smaller=1000, gpu_hours=0)
    assert advice.chosen is None
    assert "No way here keeps all targets" in "\n".join(advice.lines())
    assert all(each.misses for each in advice.others)


def test_prefix_caching_helps_prefill(folder: Path) -> None:
    """A prompt of 8,192 tokens takes too long; nine tenths of it are shared."""
    limit = {"device": "h100", "prompt_tokens": 8192, "max_prefill_ms": 300.0, "gpu_hours": 0}
    assert "ms for a prompt" in " ".join(ask(folder, "8b", **limit).first)
    shared = ask(folder, "8b", **limit, shared_prefix=0.9)
    assert shared.chosen is not None
    assert shared.chosen.name == "as-it-is"
    assert "90% of a prompt is shared: caching saves 6" in shared.first[3]


def test_a_long_context_asks_for_another_architecture(folder: Path) -> None:
    long = ask(folder, "8b", context_length=131072, device="h200")
    assert "fewer KV heads" in long.first[4]
    assert "the weights decide" in ask(folder, "8b").first[4]


def test_recipes_are_accepted(tmp_path: Path) -> None:
    """Each recipe passes the checker, with a tiny model in the place of the real one."""
    model = write_model(
        tmp_path / "model", hidden_size=64, num_attention_heads=8, intermediate_size=4096
    )
    text = write_text(tmp_path / "text.jsonl", documents=2000)
    config = AdviseConfig(data=(str(text),), gpu_hours=1e9, tolerated_loss=100, smaller=1.01)
    small = ModelSize(open_source(str(model)).config)
    ways = answers(str(model), small, config)
    named = [each for each in ways if each.recipe is not None]
    assert {each.name for each in named} >= {"fp8", "int4", "prune-50", "prune-50-int4"}
    for each in named:
        assert each.recipe is not None
        fields = yaml.safe_load(yaml.safe_dump(each.recipe))
        fields["data"]["sequence_length"] = 32
        job = recipes.parse(recipes.Recipe, _tiny(fields), "")
        recipes.check(job, Options(device="cpu"))


def _tiny(fields: dict[str, Any]) -> dict[str, Any]:
    """The recipe with numbers that tiny text can fill."""
    for stage in fields["stages"]:
        if not isinstance(stage, dict):
            continue
        for name, values in stage.items():
            if name == "profile":
                values["samples"] = 16
            if name == "prune":
                values["multiple_of"] = 8
            if name == "distill":
                values |= {"tokens": 512, "batch_tokens": 128, "heldout_sequences": 4}
                values["eval_tokens"] = 256
    return fields


def test_the_command_writes_advice_and_recipes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "advice"
    request = ("--device", "laptop", "--gpu-hours", 0, "--out", out)
    call("advise", folder / "8b.json", *request)
    said = capsys.readouterr().out
    assert (out / "advice.txt").read_text() == said
    assert "8,190,735,360 parameters, 16.4 GB in bf16, KV cache 144 KiB a token" in said
    assert "licence: unknown" in said
    recipe = yaml.safe_load((out / "q8-0.yaml").read_text())
    assert recipe["stages"] == ["evaluate", {"export": {"type": "Q8_0"}}, "report"]
    call("advise", folder / "8b.json", *request)  # again, over its own files


def test_bad_requests(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "8b.json"
    cases: dict[str, tuple[object, ...]] = {
        "no device named 'h10' — did you mean 'h100'?": (model, "--device", "h10"),
        "no such model folder, config.json or hub id: x": ("x",),
        "--smaller: Input should be greater than 1": (model, "--smaller", 0.5),
        "--max-bytes: give a size such as 90MB": (model, "--max-bytes", "much"),
    }
    for said, arguments in cases.items():
        assert refused(capsys, "advise", *arguments).startswith(said)
    (tmp_path / "no.json").write_text('{"model_type": "mamba"}')
    assert "state-space" in refused(capsys, "advise", tmp_path / "no.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    assert "not from regrow" in refused(capsys, "advise", model, "--out", tmp_path / "mine")


@pytest.mark.parametrize(
    ("card", "file", "use", "allows"),
    [
        ("---\nlicense: apache-2.0\n---\n", "", "competing", "yes"),
        ("---\nlicense: llama3.1\n---\n", "", "commercial", "conditions"),
        ("---\nlicense: llama3\n---\n", "", "competing", "no"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "", "commercial", "no"),
        ("", "Apache License\n  Version 2.0, January 2004", "open", "yes"),
        ("", "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version", "open", "conditions"),
        ("---\nlicense: openrail++\n---\n", "", "open", "unknown"),
        ("", "", "open", "unknown"),
        ("---\n: [\n---\n", "", "open", "unknown"),
    ],
)
def test_licences(card: str, file: str, use: Any, allows: str) -> None:
    found = licence(Source("x", {}, card, file), use)
    assert found.allows == allows
    assert bool(found.source) == (allows != "unknown")
    assert len(found.lines(use)) > (1 if found.source else 0)


def test_the_licence_of_a_gguf_file_is_in_its_keys(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = licence(Source(str(path), {}, "", ""), "commercial")
    assert (found.name, found.allows) == ("apache-2.0", "yes")


def test_tables_are_complete() -> None:
    for name, row in tables.table("licences").items():
        for use in ("open", "internal", "commercial", "competing"):
            assert row[use] in ("yes", "conditions", "no", "unknown"), (name, use)
        assert row["read"]
        assert row["source"]
    for row in tables.table("evidence")["pruned"]:
        assert row["points"][0] <= row["points"][1]
        assert row["source"]


def test_evidence_is_never_milder_than_asked() -> None:
    """A measurement with more tokens or a shallower cut is not used."""
    deep = tables.of_pruning(0.5, 90e9)
    assert deep is not None
    assert "Sheared" in deep.text  # Minitron took 94 billion tokens
    few = tables.of_pruning(0.8, 1.6e6)
    assert few is not None
    assert few.points == (1.9, 39.9)
    long = tables.of_pruning(0.8, 94e9)
    assert long is not None
    assert "Minitron 4B" not in long.text  # a cut to a half says little about one to four fifths
    assert tables.of_pruning(0.8, 1e4) is None
    assert tables.of_pruning(0.2, 1e12) is None


def test_siblings() -> None:
    names = [each.name for each in tables.siblings(ModelSize(QWEN3_8B))]
    assert names == ["Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-0.6B"]
    four = tables.siblings(ModelSize(QWEN3_8B))[0]
    assert four.size.parameters == pytest.approx(4.02e9, rel=1e-2)
    assert four.evidence is not None
    assert four.evidence.points == (4.9, 4.9)
    assert tables.siblings(ModelSize({**QWEN3_8B, "num_hidden_layers": 35})) == []


def test_schedules_divide_into_sequences() -> None:
    for tokens in (1e5, 1e6, 1e7, 1e8, 1e9, 9e10):
        fields = schedule(tokens)
        assert fields["batch_tokens"] % 512 == 0
        assert fields["tokens"] >= 100 * fields["batch_tokens"] or tokens < 1e6


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="gpt2: no table can be derived"):
        advise(str(path))
