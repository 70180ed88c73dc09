"""Every stage gives with 2 and with 4 processes what it gives with one; an error ends all."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from tiny_folders import data_of, write_model, write_text
from tiny_tokenizer import SENTENCES
from tiny_training import start_ranks

import regrow
from regrow import stage
from regrow.checkpoint import load
from regrow.cli.main import main
from regrow.config import Options
from regrow.errors import UserError
from regrow.pruning.config import PruneConfig
from regrow.runtime import distributed
from regrow.stages.cache import CacheConfig
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.export import ExportConfig
from regrow.stages.generate import GenerateConfig
from regrow.stages.profile import ProfileConfig
from regrow.stages.quantize import QuantizeConfig
from regrow.stages.reconstruct import ReconstructConfig
from regrow.stages.rotate import RotateConfig
from regrow.stages.sparsify import SparsifyConfig

RESIDENT = Options(batch_size=2, order="resident")
LAYER = Options(batch_size=2, order="layer")
MANY = (
    *("activation_l2", "minitron", "fluctuation", "taylor", "fisher", "token_count"),
    *("block_influence", "angular_distance", "kl_drop", "obs"),
)
SMALLER = PruneConfig(intermediate_size=40, multiple_of=8, criterion="activation_l2")

Job = Callable[[Path, Path], Any]


def _profile(place: Path, out: Path) -> None:
    many = ProfileConfig(criteria=MANY, samples=13, gram_tokens=9 * 32, removal_sequences=3)
    few = ProfileConfig(criteria=("activation_l2",), samples=13, gram_tokens=8 * 32)
    data = data_of(place / "text.jsonl")
    regrow.profile(place / "model", data, out / "whole", many, RESIDENT)
    regrow.profile(place / "model", data, out / "layers", few, LAYER)


def _evaluate(place: Path, out: Path) -> None:
    config = EvaluateConfig(
        metrics=("perplexity", "kl", "acceptance", "tasks", "generations", "size"),
        tasks=(f"mine={place}/rows.jsonl",),
        texts={"raw": f"{place}/raw.txt"},
        window=32,
        text_tokens=300,
        heldout_sequences=7,
        prompts=("one two", "a", "some more words"),
        new_tokens=4,
        dtype="float32",
    )
    models = {"model": place / "model", "other": place / "other"}
    data = data_of(place / "text.jsonl")
    regrow.evaluate(models, out, data, place / "model", config, Options(batch_size=2))


def _compare(place: Path, out: Path) -> None:
    data, config = data_of(place / "text.jsonl"), SMALLER.model_copy(update={"repair": False})
    out.mkdir(exist_ok=True)
    file = out / "table.json"
    regrow.compare(place / "model", place / "profile", data, config, file, RESIDENT, 2)


def _prune(place: Path, out: Path) -> None:
    regrow.prune(place / "model", out / "sizes", SMALLER, place / "profile")
    target = SMALLER.model_copy(update={"intermediate_size": None, "keep_params": 0.8})
    data = data_of(place / "text.jsonl")
    regrow.prune(place / "model", out / "search", target, place / "profile", data, RESIDENT)


def _quantize(place: Path, out: Path) -> None:
    config = QuantizeConfig(method="gptq", samples=8)
    regrow.quantize(place / "model", out, config, data_of(place / "text.jsonl"))


def _sparsify(place: Path, out: Path) -> None:
    config = SparsifyConfig(samples=8)
    regrow.sparsify(place / "model", out, config, data_of(place / "text.jsonl"))


def _rotate(place: Path, out: Path) -> None:
    regrow.rotate(place / "model", data_of(place / "text.jsonl"), out, RotateConfig())


def _reconstruct(place: Path, out: Path) -> None:
    config = ReconstructConfig(tokens=512, passes=1, batch_tokens=128, validation_sequences=2)
    data = data_of(place / "text.jsonl")
    regrow.reconstruct(place / "cut", place / "model", data, out, config)


def _generate(place: Path, out: Path) -> None:
    config = GenerateConfig(
        limit=7, split="all", max_new_tokens=5, keep_unfinished=True, max_perplexity=1e9
    )
    data = data_of(place / "prompts.jsonl")
    regrow.generate(place / "model", data, out, config, Options(batch_size=2))


def _cache(place: Path, out: Path) -> None:
    config = CacheConfig(tokens=320, heldout_sequences=3)
    regrow.cache(place / "model", data_of(place / "text.jsonl"), out, config, RESIDENT)


def _export(place: Path, out: Path) -> None:
    regrow.export(place / "model", out / "model.gguf", ExportConfig(type="F32"))


JOBS: dict[str, Job] = {
    "profile": _profile,
    "evaluate": _evaluate,
    "compare": _compare,
    "prune": _prune,
    "quantize": _quantize,
    "sparsify": _sparsify,
    "rotate": _rotate,
    "reconstruct": _reconstruct,
    "generate": _generate,
    "cache": _cache,
    "export": _export,
}
ELSEWHERE = {"distill", "advise", "prepare", "initialize", "learn_masks", "report", "prefer"}
"""distill: test_distill_ranks. Process 0 alone runs the others, as it runs quantize."""


def _all(rank: int, place: str, out: str) -> None:
    """Every stage, one after the other."""
    for name, job in JOBS.items():
        job(Path(place), Path(out) / name)
    distributed.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, text, a profile, and the results of one process in `one`."""
    place = tmp_path_factory.mktemp("ranks")
    write_model(place / "model")
    write_model(place / "other", intermediate_size=40)
    write_text(place / "text.jsonl")
    (place / "raw.txt").write_text(" ".join(SENTENCES * 20))
    rows = [{"context": s[:9], "choices": ["a b", "cé", "deff"], "gold": 1} for s in SENTENCES]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"{n} {SENTENCES[n % 5]}"} for n in range(9)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = ProfileConfig(criteria=("activation_l2", "taylor", "magnitude"), samples=8)
    regrow.profile(place / "model", data_of(place / "text.jsonl"), place / "profile", config)
    regrow.prune(place / "model", place / "cut", SMALLER, place / "profile")
    _all(0, str(place), str(place / "one"))
    return place


def _stored(folder: Path) -> dict[str, Any]:
    """The content of all files of a result that does not depend on time and place."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "manifest.json":
            content[name] = json.loads(path.read_text())["figures"]
        elif path.suffix == ".safetensors":
            content |= {f"{name}:{key}": value for key, value in load_file(path).items()}
        elif path.suffix in (".json", ".jsonl", ".ndjson"):
            content[name] = path.read_text()
        elif path.is_file():
            content[name] = path.read_bytes()
    return content


def _compare_folders(one: Path, several: Path, name: str, tolerance: float) -> None:
    """Tensors differ by at most `tolerance` of their largest element; other files are equal."""
    expected, actual = _stored(one / name), _stored(several / name)
    assert actual.keys() == expected.keys(), name
    assert expected, name
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            error = (actual[key].double() - value.double()).abs().max()
            assert error <= tolerance * value.double().abs().max(), f"{name}/{key}"
        elif not key.endswith("manifest.json"):
            assert actual[key] == value, f"{name}/{key}"


def _same_figures(one: Path, several: Path) -> None:
    """Each figure of an evaluation, and each item, to the last bit but one."""
    for file in ("evaluation.json", "items.json"):
        expected, actual = (
            json.loads((place / "evaluate" / file).read_text()) for place in (one, several)
        )
        assert _close(actual, expected), file


def _close(actual: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            _close(actual[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(_close, actual, expected))
    if isinstance(expected, float):
        return math.isclose(actual, expected, rel_tol=1e-12)
    return bool(actual == expected)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_gives_what_one_process_gives(place: Path, world: int, tmp_path: Path) -> None:
    """Bit for bit, but for the sums of a profile, whose order differs: 1e-6."""
    assert set(JOBS) | ELSEWHERE == set(stage.names())
    start_ranks(world, _all, str(place), str(tmp_path / "several"))
    one, several = place / "one", tmp_path / "several"
    _same_figures(one, several)
    shutil.rmtree(several / "evaluate")
    for name in sorted(set(JOBS) - {"evaluate"}):
        _compare_folders(one, several, name, 1e-6 if name == "profile" else 0.0)
    assert not list(several.rglob("*spill*"))
    assert not list(several.glob(".*"))


def _refused(rank: int, place: str, kind: str) -> None:
    """What each process says and returns, as the command line does."""
    where, text = Path(place), Path(place) / "text.jsonl"
    if kind == "differs" and rank == 1:
        text = write_text(where / f"text-{rank}" / "text.jsonl", seed=7)
    if kind in ("crash", "hang") and rank == 1:
        import_module("regrow.stages.profile.stage").resident = _crash  # type: ignore[attr-defined]
    if kind == "alone":
        (where / f"node-{rank}").mkdir()
        os.chdir(where / f"node-{rank}")
        distributed.VISIBLE = 1.0
    out = where / kind if kind != "alone" else Path("relative")
    distributed.GRACE = 1.0 if kind == "hang" else 4.0
    arguments = ["profile", str(where / "model"), "--data", str(text), "--sequence-length", "32"]
    arguments += ["--samples", "8", "--criteria", "activation_l2", "--out", str(out)]
    with (where / f"{kind}.{rank}").open("w") as said:
        os.dup2(said.fileno(), 2)
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except ZeroDivisionError:
            code = 1
            os.write(2, b"crashed\n")
        (where / f"{kind}.{rank}.code").write_text(str(code))
        time.sleep(60 if kind == "hang" else 1 - rank)  # process 0 has the job's store
        os._exit(0)


def _crash(*arguments: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("differs", 2, "the inputs of profile: process 1 on"),
        ("crash", 1, "crashed"),
        ("alone", 2, "in which process 0 writes: give --out a folder that all nodes share"),
    ],
)
def test_an_error_in_one_process_ends_all_with_one_line(
    place: Path, tmp_path: Path, kind: str, code: int, message: str
) -> None:
    for name in ("model", "text.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    if kind == "differs":
        (tmp_path / "text-1").mkdir()
    start_ranks(2, _refused, str(tmp_path), kind)
    assert [(tmp_path / f"{kind}.{rank}.code").read_text() for rank in (0, 1)] == [str(code)] * 2
    lines = [(tmp_path / f"{kind}.{rank}").read_text() for rank in (0, 1)]
    errors = [line for text in lines for line in text.splitlines() if message in line]
    assert len(errors) == 1, lines
    assert "Traceback" not in "".join(lines)
    assert not (tmp_path / kind).exists()


def test_a_process_that_waits_for_a_failed_one_ends(place: Path, tmp_path: Path) -> None:
    """The failed process keeps its connections open, so that no transfer breaks off."""
    for name in ("model", "text.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    start = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException) as caught:
        start_ranks(2, _refused, str(tmp_path), "hang")
    assert caught.value.exit_code == 1
    assert caught.value.error_index == 0
    assert time.monotonic() - start < 50
    assert not (tmp_path / "hang.0.code").exists()
    assert (tmp_path / "hang.1").read_text().endswith("crashed\n")


def test_share_and_merge_in_one_process() -> None:
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.merged({"a": 1}) == {"a": 1}
    assert distributed.gathered(5) == [5]
    sums = {"a": torch.ones(2)}
    assert distributed.sum_over_ranks(sums) is sums


def test_a_timeout_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(distributed.TIMEOUT, given)
        with pytest.raises(UserError, match=f"REGROW_TIMEOUT={given}: give the minutes"):
            distributed.timeout()
    monkeypatch.setenv(distributed.TIMEOUT, "1.5")
    assert distributed.timeout().total_seconds() == 90


def test_the_outline_of_a_model_follows_its_sizes(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "copy")
    assert load(tmp_path / "copy").outline == load(place / "model").outline
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt", "note": "other"})
    assert load(tmp_path / "copy").outline != load(place / "model").outline
