"""The pages on adding a metric and a criterion, followed to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import doc_pages
import pytest
import torch
from test_evaluate import TEXT
from tiny_folders import write_model, write_text
from tiny_job import call
from torch import Tensor
from transformers import AutoModelForCausalLM

from regrow import plugins
from regrow.checkpoint import Checkpoint
from regrow.profile_folder import Profile
from regrow.stages.evaluate.config import METRICS
from regrow.stages.evaluate.stage import EVALUATION


def test_the_page_on_metrics_adds_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/add-a-metric.md: figures of both files, against float64."""
    monkeypatch.chdir(tmp_path)
    teacher, model = (
        write_model(Path(f"my-{name}"), seed=n) for n, name in enumerate(("teacher", "model"))
    )
    Path("story.txt").write_text(TEXT)
    with doc_pages.written("add-a-metric.md", tmp_path):
        assert {"entropy", "teacher_mass"} <= set(plugins.names(METRICS))
        for arguments in doc_pages.commands("add-a-metric.md"):
            call(*arguments, "--dtype", "float32", "--text-tokens", "300")
    assert "entropy" not in plugins.names(METRICS)
    evaluation = json.loads((Path("my-figures") / EVALUATION).read_text())
    by_name = {
        label: {figure["name"]: figure for figure in figures}
        for label, figures in evaluation["figures"].items()
    }
    ids = teacher.tokenizer()(TEXT)["input_ids"][:300]
    windows = [ids[begin : begin + 64] for begin in range(0, 300, 64)]
    entropy, mass = [], []
    for window in windows:
        q_TV, p_TV = (softmax(checkpoint, window[:-1]) for checkpoint in (model, teacher))
        entropy += (-(q_TV * q_TV.log()).sum(-1)).tolist()
        mass += [float(p_V[q_V.argmax()]) for p_V, q_V in zip(p_TV, q_TV, strict=True)]
    figures = by_name["my-model"]
    assert figures["entropy/story"]["value"] == pytest.approx(sum(entropy) / 295, rel=1e-5)
    assert figures["teacher_mass/story"]["value"] == pytest.approx(sum(mass) / 295, rel=1e-4)
    assert figures["teacher_mass/story"]["n"] == 295
    assert "probability that teacher gives" in figures["teacher_mass/story"]["convention"]
    assert set(by_name["teacher"]) == {"entropy/story"}


def softmax(checkpoint: Checkpoint, ids: list[int]) -> Tensor:
    """Probabilities [T, V] in float64 by the stock reader."""
    folder = str(checkpoint.folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].softmax(-1)


def test_the_page_on_criteria_adds_a_criterion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/add-a-criterion.md: scores against a formula in float64, and the cut that follows."""
    monkeypatch.chdir(tmp_path)
    checkpoint = write_model(Path("my-model"))
    write_text(Path("text.jsonl"))
    with doc_pages.written("add-a-criterion.md", tmp_path):
        criterion = plugins.load("regrow.stages.profile.importance", "spread")
        for arguments in doc_pages.commands("add-a-criterion.md"):
            call(*arguments)
    x_TU = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = {"sum": x_TU.sum(0)[:, None], "square_sum": x_TU.square().sum(0)[:, None]}
    score_U = criterion.score({**sums, "tokens": torch.tensor(50)}, None, "mlp", None)
    assert score_U.tolist() == pytest.approx(x_TU.std(0, correction=0).tolist())
    scores = Profile(Path("my-profile")).scores("spread", "mlp")
    pruned = Checkpoint(Path("my-pruned"))
    for layer in ("0", "1"):
        kept = scores[layer].topk(40).indices.sort().values
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(pruned.tensor(name), checkpoint.tensor(name)[kept])
