"""Model cards: every model folder has one of its own, which says where the model is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_folders import data_of, write_model
from tiny_models import random_plan

from regrow import DistillConfig, PruneConfig, QuantizeConfig, distill, prune, quantize
from regrow.card import Lineage, public_source, text, write
from regrow.checkpoint import load
from regrow.checkpoint.licence import Licence, licence_of
from regrow.stage_dir import read

CARD = """---
license: other
license_name: some-research-license
---
# The large one

Words about the large model.
"""


def front(card: str) -> dict[str, Any]:
    """The metadata of a card."""
    fields = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(fields, dict)
    return fields


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A model with a card, cut, then taught by itself and by another model, then in 8 bits."""
    place = tmp_path_factory.mktemp("chain")
    dense = write_model(place / "large", dtype=torch.bfloat16, head_dim=8)
    (place / "large" / "README.md").write_text(CARD)
    other = write_model(place / "other", dtype=torch.bfloat16, num_hidden_layers=4)
    plan = random_plan(dense.config, dense.fingerprint, mlp=40)
    plan.write(place / "plan.json")
    cut = prune(dense, place / "cut", PruneConfig(plan=str(place / "plan.json"), repair=False))
    data = data_of(text)
    config = DistillConfig(tokens=128, batch_tokens=128, eval_tokens=128, heldout_sequences=2)
    taught = distill(cut, str(place / "large"), data, place / "taught", config)
    again = distill(taught, str(other.folder), data, place / "again", config)
    quantize(again, place / "small", QuantizeConfig(scheme="int8"))
    return place


def test_every_stage_writes_a_card_of_its_own(chain: Path) -> None:
    for name in ("cut", "taught", "again", "small"):
        card = (chain / name / "README.md").read_text()
        assert f"# {name}\n" in card
        assert "Words about the large model." not in card
        assert str(chain) not in card
        assert "- base model: large\n" in card
        assert front(card)["license"] == "other"
        assert front(card)["license_name"] == "some-research-license"
    assert (chain / "large" / "README.md").read_text() == CARD


def test_a_card_knows_the_stages_before(chain: Path, text: Path) -> None:
    card = (chain / "small" / "README.md").read_text()
    for line in ("- 01-prune: prune of `", "- 02-distill: distill of `", "- 04-quantize: quantize"):
        assert line in card
    assert front(card)["tags"] == ["regrow", "distill", "prune", "quantize"]
    assert f"- {text.name}: licence unknown" in card
    assert "scheme: int8" in card
    assert "tokens: 128" in card
    assert "- taught by: other\n" in card
    assert "- taught by" not in (chain / "taught" / "README.md").read_text()
    manifest = read(chain / "taught")
    assert manifest is not None
    figure = next(row for row in manifest["figures"] if row["name"] == "held-out KL")
    assert (
        f"| held-out KL | {figure['value']:.4g} | nats |"
        in (chain / "taught" / "README.md").read_text()
    )


def test_a_card_says_who_opens_the_folder(chain: Path) -> None:
    assert "compressed-tensors" in (chain / "small" / "README.md").read_text()
    plain = (chain / "again" / "README.md").read_text()
    assert "compressed-tensors" not in plain
    assert "AutoModelForCausalLM" in plain


def test_a_card_does_not_change_a_file_that_it_is_linked_to(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "first").write_text("first")
    (tmp_path / "README.md").hardlink_to(tmp_path / "first")
    write(tmp_path, Lineage("x", "org/base", Licence("mit", "its card")))
    assert (tmp_path / "first").read_text() == "first"
    assert front((tmp_path / "README.md").read_text())["base_model"] == "org/base"


def test_the_hub_learns_licence_and_data_sets() -> None:
    of_hub = Lineage("x", "org/base", Licence(), sources=["org/words:train", "package:p==1/a.txt"])
    fields = front(text("x", of_hub, {"model_type": "llama"}))
    assert "license" not in fields
    assert fields["datasets"] == ["org/words"]
    assert public_source("/home/me/words.jsonl") == "words.jsonl"
    assert public_source("org/words:train") == "org/words:train"


def test_an_evaluation_is_a_table_of_teacher_and_result() -> None:
    how = "first 512 tokens of a novel"
    figures = [
        {"name": f"{label}/perplexity/novel", "value": value, "n": 511, "convention": how}
        for label, value in (("teacher", 40.88), ("pruned", 104.0), ("distilled", 93.47))
    ]
    figures += [
        {"name": "distilled/kl/novel", "value": 1.207, "unit": "nats", "n": 511},
        {"name": "distilled/ttft", "value": 5753.0, "unit": "ms"},
        {"name": "distilled/prefill_speedup", "value": 1.1},
    ]
    stages = {"04-evaluate": {"stage": "evaluate", "figures": figures}}
    card = text("x", Lineage("x", "org/base", Licence(), stages=stages), {"model_type": "llama"})
    assert "| figure | teacher | distilled | unit | n |" in card
    assert "| perplexity/novel | 40.88 | 93.47 |  | 511 |" in card
    assert "| kl/novel | – | 1.207 | nats | 511 |" in card
    assert f"- perplexity/novel: {how}" in card
    for absent in ("pruned", "ttft", "speedup"):
        assert absent not in card


def test_licences_in_metadata(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: [\n---\n")
    assert licence_of(str(tmp_path)) == Licence()
    path.write_text("---\nlicense: other\n---\n")
    assert licence_of(str(tmp_path)).metadata() == {}
    path.write_text("---\nlicense: mit\n---\n")
    assert licence_of(str(tmp_path)).metadata() == {"license": "mit"}


def test_a_model_of_random_weights_has_no_base_model(tmp_path: Path, text: Path) -> None:
    teacher = write_model(tmp_path / "teacher", dtype=torch.bfloat16, head_dim=8)
    (tmp_path / "config.json").write_text((tmp_path / "teacher" / "config.json").read_text())
    config = DistillConfig(tokens=128, batch_tokens=128, eval_tokens=128, heldout_sequences=2)
    out = distill(tmp_path / "config.json", teacher, data_of(text), tmp_path / "out", config)
    card = (out / "README.md").read_text()
    assert "- base model: none: random weights\n- architecture: llama\n- taught by: teacher" in card
    assert load(out).fingerprint
