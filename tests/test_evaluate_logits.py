"""Metrics that read logits: in one pass, exact, and against the teacher's own tokens only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_evaluate import TEXT, figures, per_window, write_model
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from regrow import plugins
from regrow.config import Options
from regrow.errors import UserError
from regrow.stages.evaluate import eval_model, folder_model
from regrow.stages.evaluate.config import METRICS, EvaluateConfig
from regrow.stages.evaluate.metrics.acceptance import DRAFTED, accepted_length, per_token
from regrow.stages.evaluate.stage import EVALUATION, check_metrics, evaluate, load_metric
from regrow.training.head import Head

LOGIT_METRICS = ("perplexity", "kl", "agreement", "acceptance")
WINDOW, TOKENS = 32, 150
SCORED = [31] * 4 + [21]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders teacher and student, and a text."""
    folder = tmp_path_factory.mktemp("logits")
    write_model(folder / "teacher", tiny_model("llama", seed=1))
    near_teacher, generator = tiny_model("llama", seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in near_teacher.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight += 0.3 * weight.std() * noise
    write_model(folder / "student", near_teacher)
    (folder / "raw.txt").write_text(TEXT)
    return folder


def measured(place: Path, out: Path, **fields: Any) -> dict[str, dict[str, Any]]:
    """The figures of the student, by name."""
    settings: dict[str, Any] = {
        "metrics": LOGIT_METRICS,
        "texts": {"raw": f"{place}/raw.txt"},
        "text_tokens": TOKENS,
        "window": WINDOW,
        "dtype": "float32",
        **fields,
    }
    models, config = {"student": place / "student"}, EvaluateConfig(**settings)
    evaluate(models, out, None, place / "teacher", config, Options(device="cpu", batch_size=2))
    return figures(json.loads((out / EVALUATION).read_text()), "student")


def windows() -> list[list[int]]:
    ids = tiny_tokenizer()(TEXT)["input_ids"][:TOKENS]
    return [ids[begin : begin + WINDOW] for begin in range(0, TOKENS, WINDOW)]


def logits(folder: Path, ids: list[int]) -> Tensor:
    """Logits [T, V] in float64 by the stock reader."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_agreement_one_token_at_a_time(place: Path, tmp_path: Path) -> None:
    figure = measured(place, tmp_path / "out")["agreement/raw"]
    hits = []
    for ids in windows():
        ours, theirs = (logits(place / name, ids) for name in ("student", "teacher"))
        hits.append(sum(int(ours[t].argmax() == theirs[t].argmax()) for t in range(len(ids) - 1)))
    mean = sum(hits) / sum(SCORED)
    assert 0.2 < mean < 0.95  # neither none nor all
    assert figure["value"] == pytest.approx(mean, abs=1e-12)
    assert figure["n"] == sum(SCORED)
    squares = sum((hit - mean * n) ** 2 for hit, n in zip(hits, SCORED, strict=True))
    assert figure["stderr"] == pytest.approx(math.sqrt(5 / 4 * squares) / sum(SCORED))
    assert figure["convention"].startswith("share of scored tokens")
    assert "is that of teacher" in figure["convention"]


def test_acceptance_one_token_at_a_time(place: Path, tmp_path: Path) -> None:
    found = measured(place, tmp_path / "out", metrics=("acceptance", "size"))
    shares = []
    for ids in windows():
        q, p = (logits(place / name, ids).softmax(-1) for name in ("student", "teacher"))
        shares += [
            sum(min(a, b) for a, b in zip(*row, strict=True))
            for row in zip(p[:-1].tolist(), q[:-1].tolist(), strict=True)
        ]
    mean = sum(shares) / sum(SCORED)
    assert 0.1 < mean < 0.9
    assert found["acceptance/raw"]["value"] == pytest.approx(mean, rel=1e-5)
    expected = (1 - mean**5) / (1 - mean)
    assert found["accepted_length/raw"]["value"] == pytest.approx(expected, rel=1e-5)
    assert found["draft_speedup/raw"]["value"] == pytest.approx(expected / 5, rel=1e-5)


def test_the_teacher_accepts_as_many_drafted_tokens_as_expected() -> None:
    """Speculative sampling by hand: draw from q, accept with probability min(1, p / q)."""
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(64, generator=draw, dtype=torch.float64).softmax(-1) for _ in "pq")
    trials = 20_000
    tokens = torch.multinomial(q, trials * DRAFTED, replacement=True, generator=draw)
    accepted = torch.rand(trials * DRAFTED, generator=draw, dtype=torch.float64) < (p / q)[tokens]
    runs = accepted.view(trials, DRAFTED).long().cumprod(-1).sum(-1) + 1
    acceptance = float(per_token(q.log()[None], p.log()[None], tokens[:1]))
    assert accepted_length(acceptance, DRAFTED) == pytest.approx(
        float(runs.double().mean()), rel=0.02
    )


def test_one_pass_for_all_in_chunks(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model reads a text once; the logits of at most 16 tokens are held at once."""
    whole = measured(place, tmp_path / "whole")
    read: list[int] = []
    rows: list[int] = []
    plain, head_logits = folder_model.FolderEvalModel._windows, Head.logits

    def counted(self: Any, text: Any, counter: Any) -> Any:
        for number, window in plain(self, text, counter):
            read.append(len(window.targets_N))
            yield number, window

    def noted(self: Head, states_NH: Tensor, *arguments: Any, **more: Any) -> Tensor:
        rows.append(len(states_NH))
        return head_logits(self, states_NH, *arguments, **more)

    monkeypatch.setattr(folder_model.FolderEvalModel, "_windows", counted)
    monkeypatch.setattr(folder_model, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(folder_model, "check_model", lambda *_: None)  # reads logits, too
    monkeypatch.setattr(Head, "logits", noted)
    chunked = measured(place, tmp_path / "chunked")
    assert read == SCORED * 2
    assert max(rows) == 16
    for name, figure in whole.items():
        assert chunked[name]["value"] == pytest.approx(figure["value"], rel=1e-6), name
        assert chunked[name]["n"] == figure["n"]
    slow = per_window(place, "student", [i for ids in windows() for i in ids], WINDOW)
    mean = sum(kl for _, kl in slow) / sum(SCORED)
    assert chunked["kl/raw"]["value"] == pytest.approx(mean, rel=1e-4)


def test_kl_of_a_near_lossless_model_in_bfloat16(tmp_path: Path) -> None:
    """Half-precision states, but neither logits nor softmax are rounded to half precision."""
    model = tiny_model("llama", torch.bfloat16, seed=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(16)  # logits of several units, as a trained model has them
        write_bfloat16(tmp_path / "teacher", model)
        weight_VH = model.lm_head.weight
        draw_VH = torch.rand(weight_VH.shape, generator=torch.Generator().manual_seed(0))
        weight_VH.copy_(weight_VH * (1 + 2**-7 * (draw_VH < 0.03)))
    write_bfloat16(tmp_path / "student", model)
    (tmp_path / "raw.txt").write_text(TEXT)
    found = measured(tmp_path, tmp_path / "out", dtype="bfloat16")["kl/raw"]["value"]
    total = rounded = 0.0
    for ids in windows():
        ours, theirs = (bfloat16_logits(tmp_path / n, ids)[:-1] for n in ("student", "teacher"))
        total += kl(ours, theirs)
        rounded += kl(ours.bfloat16().double(), theirs.bfloat16().double())
    assert 1e-6 < total / sum(SCORED) < 1e-4
    assert rounded > 1.5 * total  # so the test would see a rounding
    assert found == pytest.approx(total / sum(SCORED), rel=0.03)


def write_bfloat16(folder: Path, model: PreTrainedModel) -> None:
    model.save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))


def bfloat16_logits(folder: Path, ids: list[int]) -> Tensor:
    """Exact logits [T, V] of final hidden states that were computed in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    with torch.no_grad():
        states_TH = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return states_TH.double() @ model.lm_head.weight.double().T


def kl(ours: Tensor, theirs: Tensor) -> float:
    log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def test_padding_of_the_embedding_is_no_token(tmp_path: Path) -> None:
    """Rows beyond the tokenizer take most of the probability, and are left out of KL."""
    known = len(tiny_tokenizer())
    for seed, name in enumerate(("teacher", "student")):
        model = tiny_model("llama", seed=seed, vocab_size=known + 7, tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight[known:] *= 30
        write_model(tmp_path / name, model)
    (tmp_path / "raw.txt").write_text(TEXT)
    found = measured(tmp_path, tmp_path / "out")
    total, hits = 0.0, 0
    for ids in windows():
        ours, theirs = (logits(tmp_path / n, ids)[:-1, :known] for n in ("student", "teacher"))
        total += kl(ours, theirs)
        hits += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    assert found["kl/raw"]["value"] == pytest.approx(total / sum(SCORED), rel=1e-4)
    assert found["agreement/raw"]["value"] == pytest.approx(hits / sum(SCORED))


@pytest.mark.parametrize("name", plugins.names(METRICS))
def test_every_metric(name: str) -> None:
    """One of the three kinds; per_token is 0 or less than infinite, and leaves its input alone."""
    metric = load_metric(name)
    assert metric.__doc__
    if not hasattr(metric, "per_token"):
        return
    generator = torch.Generator().manual_seed(0)
    logits_NV, teacher_NV = torch.randn(2, 5, 11, generator=generator)
    targets_N = torch.tensor([3, 0, 10, 7, 7])
    before = logits_NV.clone(), teacher_NV.clone()
    values_N = metric.per_token(logits_NV, teacher_NV, targets_N)
    assert values_N.shape == (5,)
    assert bool(values_N.double().isfinite().all())
    assert torch.equal(logits_NV, before[0])
    assert torch.equal(teacher_NV, before[1])


def test_a_metric_of_another_shape_is_refused(place: Path, tmp_path: Path) -> None:
    metric: Any = SimpleNamespace(READS_TEACHER=False, per_token=lambda q, p, t: q.logsumexp(-1)[0])
    with pytest.raises(UserError, match=r"metric odd: per_token must return one .* \[5\] \(given"):
        eval_model._values("odd", metric, torch.zeros(5, 7), None, torch.zeros(5))


def test_a_file_that_measures_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.stages.evaluate import metrics

    (tmp_path / "nothing.py").write_text("VALUE = 3\n")
    (tmp_path / "half.py").write_text("READS_TEACHER = False\ndef per_token(a, b, c): ...\n")
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    with pytest.raises(
        UserError, match=r"metric nothing: .*nothing.py needs `measure`, or `measure"
    ):
        load_metric("nothing")
    with pytest.raises(UserError, match=r"half.py needs .*`READS_TEACHER` and `UNIT` and `CONV"):
        load_metric("half")


def test_a_chosen_metric_with_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    def refused(match: str, has_teacher: bool = True, **fields: Any) -> None:
        with pytest.raises(UserError, match=match) as caught:
            check_metrics(EvaluateConfig(**fields), None, has_teacher)
        assert "\n" not in str(caught.value)

    refused("metric kl needs a teacher to compare with: give --against", False, metrics=("kl",))
    refused("metric agreement needs text: give --data or --texts", metrics=("size", "agreement"))
    refused("metric tasks needs tasks: give --tasks", metrics=("tasks",))
    refused("metric generations needs prompts", metrics=("generations",), prompts=())
    check_metrics(EvaluateConfig(), None, False)  # of all metrics, those that apply are measured
    for field in ("metrics", "prefill_tokens", "batch_sizes"):
        with pytest.raises(ValueError, match=f"{field}\n.*at least 1 item"):
            EvaluateConfig(**{field: ()})
    with pytest.raises(ValueError, match="empty text: give the text to continue"):
        EvaluateConfig(prompts=("Hello", " "))
    with pytest.raises(ValueError, match="empty name: give the name of a task"):
        EvaluateConfig(tasks=("",))
    with pytest.raises(ValueError, match="metric 'size' is given twice"):
        EvaluateConfig(metrics=("size", "size"))
