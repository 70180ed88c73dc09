"""A search that also chooses the format in which the weights will be stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_folders import data_of
from tiny_pruning import OPTIONS, chosen, slow_kl, write_place
from torch import nn

from regrow import cost, families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.pruning.config import PruneConfig
from regrow.pruning.cut import cut_model
from regrow.quantization.fake_quantize import grid_of, round_weights
from regrow.quantization.formats import find_scheme
from regrow.search.shapes import check_keep_params
from regrow.stages.prune.stage import prune

FORMATS = ("bf16", "int8", "int4-g32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def bytes_of_whole(place: Path, name: str) -> int:
    checkpoint = Checkpoint(place / "model")
    return cost.file_bytes(families.of(checkpoint), checkpoint.config, name)


def limited(limit: float, formats: tuple[str, ...] = FORMATS, **fields: Any) -> PruneConfig:
    fields = {"multiple_of": 2, "num_candidates": 6, **fields}
    return PruneConfig(max_bytes=str(int(limit)), formats=formats, **fields)


def search_in(place: Path, out: Path, config: PruneConfig) -> None:
    prune(place / "model", out, config, place / "profile", data_of(place / "text.jsonl"), OPTIONS)


def rounded(model: Any, name: str) -> Any:
    """The slow way: a copy of each weight, on its grid."""
    if name != "bf16":
        for layer, module in model.named_modules():
            if isinstance(module, nn.Linear) and layer != "lm_head":
                grid = grid_of(module.weight, find_scheme(name))
                module.weight = nn.Parameter(grid.nearest(module.weight.detach()))
    return model


def test_each_shape_is_scored_with_its_weights_rounded(place: Path, tmp_path: Path) -> None:
    """Below the smallest whole model, so that every candidate is a cut."""
    config = limited(0.9 * bytes_of_whole(place, "int8"), ("bf16", "int8"), repair=False)
    search_in(place, tmp_path / "out", config)
    table = json.loads((tmp_path / "out" / "candidates.json").read_text())
    assert {row["format"] for row in table} == {"bf16", "int8"}
    assert [row["chosen"] for row in table] == [True, *[False] * (len(table) - 1)]
    assert [row["kl"] for row in table] == sorted(row["kl"] for row in table)
    for row in table:
        dense = Checkpoint(place / "model").model(torch.float32)
        cut = rounded(cut_model(dense, chosen(place, **row["sizes"])), row["format"])
        assert row["kl"] == pytest.approx(slow_kl(place, cut), rel=0.02)
        checkpoint = Checkpoint(place / "model")
        stored = (families.of(checkpoint), checkpoint.config, row["format"], row["sizes"])
        assert row["bytes"] == cost.file_bytes(*stored) <= int(config.max_bytes or 0)
    assert table[0]["format"] == "int8"  # it keeps more of the model


def test_where_the_whole_model_is_best_it_is_not_pruned(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In int8 it fits and loses next to nothing, but in bf16 half of it would have to go."""
    limit = bytes_of_whole(place, "int8")
    with pytest.raises(UserError) as raised:
        search_in(place, tmp_path / "out", limited(limit))
    text = str(raised.value)
    assert "pruning does not pay: whole model, int8, " in text and "\n" not in text
    assert "the best cut is " in text and "quantize with --scheme int8" in text
    assert f"less than {bytes_of_whole(place, 'int4-g32') / 1e6:,.1f} MB" in text
    assert not (tmp_path / "out").exists()
    assert "whole model, int4-g32" in capsys.readouterr().err


def test_where_the_whole_model_is_best_no_model_of_the_search_stays(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores do, and the same search then distils nothing."""
    config = limited(
        bytes_of_whole(place, "int8"), halving_tokens=64, halving_shapes=2, num_candidates=2
    )
    scores = []
    for _ in range(2):
        with pytest.raises(UserError, match="pruning does not pay") as raised:
            search_in(place, tmp_path / "out", config)
        scores.append(str(raised.value))
        assert not [path for path in (tmp_path / ".out.search").iterdir() if path.is_dir()]
        monkeypatch.setattr("regrow.stages.distill.stage.distill", None)
    assert scores[0] == scores[1]


def test_the_distillations_train_for_the_grid(place: Path, tmp_path: Path) -> None:
    limit = 0.9 * bytes_of_whole(place, "int8")
    config = limited(limit, ("int8",), halving_tokens=64, halving_shapes=2, num_candidates=2)
    search_in(place, tmp_path / "out", config)
    table = json.loads((tmp_path / "out" / "candidates.json").read_text())
    assert table[0]["distilled"].keys() == {"64"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["format"] == "int8" and manifest["config"]["formats"] == []


def test_rounding_leaves_the_shared_weights_alone(place: Path) -> None:
    dense = Checkpoint(place / "model").model(torch.float32)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    views = [m.weight.data for m in dense.modules() if isinstance(m, nn.Linear)]
    kept = [view.clone() for view in views]
    round_weights(dense, find_scheme("int8"))
    assert all(torch.equal(one, other) for one, other in zip(views, kept, strict=True))
    changed = [n for n, t in dense.state_dict().items() if not torch.equal(t, before[n])]
    assert changed and not any("embed" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"formats": ("int8",), "keep_params": 0.8}, "under a limit of max_bytes or max_ram"),
        ({"formats": ("int8",), "max_bytes": "1MB", "max_decode_ms": 3}, "without a limit in"),
        ({"formats": ("fp8",), "max_bytes": "1MB"}, "fp8 also rounds inputs"),
        ({"formats": ("q4_0",), "max_bytes": "1MB"}, "q4_0"),
    ],
)
def test_formats_that_cannot_be_searched_are_refused(fields: Any, message: str) -> None:
    with pytest.raises((ValidationError, UserError), match=message):
        PruneConfig(**fields)


def test_a_limit_that_needs_no_choice_is_refused(place: Path) -> None:
    checkpoint = Checkpoint(place / "model")
    roomy = limited(2 * bytes_of_whole(place, "bf16"))
    with pytest.raises(UserError, match="meets the limit in bf16, int8, int4-g32: nothing to cut"):
        check_keep_params(checkpoint, roomy)
    with pytest.raises(UserError, match="the smallest shape this model can be cut to takes"):
        check_keep_params(checkpoint, limited(100))
