"""Student and teacher whose tokens differ a little: padding, added tokens, ids beyond the rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_distillation import OPTIONS, figures
from tiny_folders import data_of, write_model, write_text
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer, tiny_tokenizer_of
from torch import Tensor, nn
from transformers import AddedToken, AutoModelForCausalLM, PreTrainedTokenizerFast

from regrow.checkpoint import Checkpoint
from regrow.data.sequences import Sequences, build_sequences
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.teacher import teacher_of
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.shared_tokens import NONE, check_text, common_ids, same_rules, teacher_ids
from regrow.training.teacher import Teacher

MIX = LossWeights({"forward_kl": 0.7, "cross_entropy": 0.3})
CONFIG = DistillConfig(tokens=512, batch_tokens=128, eval_tokens=256, heldout_sequences=4)


def added(*tokens: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with further added tokens, from id 384 on."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def renamed() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another end of sequence, under another id, and a further token."""
    rules = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for token in rules["added_tokens"]:
        token["content"] = token["content"].replace("<|endoftext|>", "</end>")
    vocab = {token.replace("<|endoftext|>", "</end>"): i for token, i in _vocab(rules).items()}
    swapped = {vocab["</end>"]: vocab["<|pad|>"], vocab["<|pad|>"]: vocab["</end>"]}
    rules["model"]["vocab"] = {token: swapped.get(i, i) for token, i in vocab.items()}
    for token in rules["added_tokens"]:
        token["id"] = rules["model"]["vocab"][token["content"]]
    tokenizer_renamed = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(rules), eos_token="</end>", pad_token="<|pad|>"
    )
    tokenizer_renamed.add_tokens([AddedToken("<|think|>", special=True)])
    return tokenizer_renamed


def _vocab(rules: dict[str, Any]) -> dict[str, int]:
    return dict(rules["model"]["vocab"])


def _tokenizer(rules: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(rules))


def folder_of(path: Path, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Checkpoint:
    write_model(path, **{"vocab_size": len(tokenizer), "num_hidden_layers": 2, **overrides})
    tokenizer.save_pretrained(str(path))
    return Checkpoint(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write_text(folder / "text.jsonl")
    folder_of(folder / "teacher", renamed(), vocab_size=400, hidden_size=60)
    folder_of(folder / "student", added("<|mine|>", "<|other|>"))
    return folder


def test_ids_by_string_then_by_role(place: Path) -> None:
    ids_V = teacher_ids(Checkpoint(place / "student"), Checkpoint(place / "teacher"))
    assert ids_V is not None
    end, pad, *rest = range(384)
    assert ids_V[[end, pad]].tolist() == [
        1,
        0,
    ]  # another string, another id
    assert ids_V[rest].tolist() == rest
    assert ids_V[384:].tolist() == [NONE, NONE]


def test_a_role_takes_no_token_twice() -> None:
    """The teacher pads with its end; the student has a padding of its own."""
    teacher = tiny_tokenizer()
    teacher.pad_token = teacher.eos_token
    student = added("<|mine|>")
    student.pad_token = "<|mine|>"
    assert common_ids(student, teacher, 384)[[0, 384]].tolist() == [0, NONE]
    assert common_ids(student, teacher, 383)[382:].tolist() == [382, NONE, NONE]  # no such row


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (added("<|mine|>"), True),
        (renamed(), True),
        (tiny_tokenizer(300), False),
        (tiny_tokenizer_of("byte fallback"), False),
    ],
    ids=["added", "renamed", "fewer merges", "another kind"],
)
def test_tokenizers_with_equal_rules_split_text_alike(
    other: PreTrainedTokenizerFast, same: bool
) -> None:
    assert same_rules(tiny_tokenizer(), other) is same


def test_another_splitting_before_the_merges_is_another_rule() -> None:
    rules = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    other = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(rules))
    assert not same_rules(tiny_tokenizer(), other)


def slow_loss(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], ids_V: Tensor
) -> tuple[Tensor, Tensor]:
    """The mix over the shared ids, and the teacher's mass on others, summed over scored tokens."""
    shared = [i for i, other in enumerate(ids_V.tolist()) if other != NONE]
    ids, positions = batch["input_ids"], batch["position_ids"]
    log_q = student(ids, position_ids=positions, use_cache=False).logits[..., shared]
    with torch.no_grad():
        all_p = teacher(ids_V[ids], position_ids=positions, use_cache=False).logits.softmax(-1)
    log_q, p = log_q.log_softmax(-1), all_p[..., ids_V[shared]]
    lost = 1 - p.sum(-1)
    log_p = (p / p.sum(-1, keepdim=True)).log()
    total, lost_mass = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        target = shared.index(int(batch["labels"][row, column + 1]))
        kl = (log_p[row, column].exp() * (log_p[row, column] - log_q[row, column])).sum()
        total = total + 0.7 * kl - 0.3 * log_q[row, column, target]
        lost_mass = lost_mass + lost[row, column]
    return total, lost_mass


def test_loss_gradient_and_lost_mass_in_float64(place: Path) -> None:
    student, teacher = Checkpoint(place / "student"), Checkpoint(place / "teacher")
    ids_V = teacher_ids(student, teacher)
    assert ids_V is not None
    student_model, teacher_model = student.model(torch.float64), teacher.model(torch.float64)
    sequences = build_sequences(data_of(place / "text.jsonl"), student.tokenizer(), "heldout", 4)
    batch = next(sequences.batches(4))
    weights = [weight for weight in student_model.parameters() if weight.requires_grad]
    expected, lost = slow_loss(student_model, teacher_model, batch, ids_V)
    gradients = torch.autograd.grad(expected, weights)
    master = Teacher(teacher_model, ids_V)
    bind_loss(student_model, master, MIX)
    outputs = student_model.train()(
        **{k: batch[k] for k in ("input_ids", "position_ids", "labels")}
    )
    torch.testing.assert_close(outputs["loss"], expected, rtol=1e-10, atol=0)
    for actual, other in zip(torch.autograd.grad(outputs["loss"], weights), gradients, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-8, atol=1e-12)
    share = master.mass_outside(sequences, 2)
    assert share == pytest.approx(float(lost) / int(outputs["tokens"]), rel=1e-10)
    assert share > 1e-7


def test_padding_is_no_part_of_the_distribution() -> None:
    """Identical models, one of them padded with zeros, are at no distance, and padding is cut."""
    model = tiny_model("llama", torch.float64, vocab_size=384, tie_word_embeddings=False)
    padded = tiny_model("llama", torch.float64, vocab_size=384, tie_word_embeddings=False)
    wide = torch.cat([model.lm_head.weight.data, torch.zeros(16, 48, dtype=torch.float64)])
    padded.lm_head.weight = nn.Parameter(wide)
    ids = torch.randint(4, 384, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "position_ids": torch.arange(12).expand(2, -1), "labels": ids}
    for student, teacher in ((model, padded), (padded, model), (padded, padded)):
        master = Teacher(teacher, size=384)
        assert len(master.head.weight_VH) == 384
        undo = bind_loss(student, master, LossWeights({"forward_kl": 1.0}))
        assert float(student(**batch)["loss"].detach()) == 0.0
        undo()
    # A teacher without padding in its rows is the whole of it.
    assert len(Teacher(model).head.weight_VH) == 384


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_is_opened_without_its_padding(tmp_path: Path, cached: bool) -> None:
    """Live or from a cache, its head has rows for the tokenizer's ids only."""
    size = len(tiny_tokenizer())
    teacher = write_model(tmp_path / "teacher", vocab_size=size + 16)
    stored: Any = SimpleNamespace(header=SimpleNamespace(vocab_size=size)) if cached else None
    opened = teacher_of(teacher, None, stored, torch.device("cpu"), "whole")
    head = opened.head
    weight_VH = teacher.tensor("model.embed_tokens.weight").bfloat16()
    if "lm_head.weight" in teacher.names():
        weight_VH = teacher.tensor("lm_head.weight").bfloat16()
    assert torch.equal(head.weight_VH, weight_VH[:size])


def test_text_that_a_model_cannot_read_is_refused() -> None:
    ids = torch.tensor([[5, 6, 384, 7]])
    sequences = Sequences(ids, torch.arange(4)[None], ids, torch.ones_like(ids, dtype=torch.bool))
    tokenizer = added("<|mine|>")
    check_text(sequences, tokenizer, (385, 385), None)
    for rows in ((384, 400), (400, 384)):
        with pytest.raises(UserError, match=r"token 384 \(.*mine.*\), which an embedding of 384"):
            check_text(sequences, tokenizer, rows, None)
    ids_V = common_ids(tokenizer, tiny_tokenizer(), 384)
    with pytest.raises(UserError, match="which the teacher's tokenizer lacks"):
        check_text(sequences, tokenizer, (400, 384), ids_V)


def test_a_run_reports_the_lost_probability_mass(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(place / "text.jsonl")
    out = distill(place / "student", place / "teacher", data, tmp_path / "out", CONFIG, OPTIONS)
    measured = figures(out)
    assert "the 384 tokens that both models have are compared" in capsys.readouterr().err
    share = measured["teacher's probability outside the shared tokens"]
    assert 0 < share < 0.5
    assert measured["held-out KL"] < measured["held-out KL before"]
    assert AutoModelForCausalLM.from_pretrained(str(out)).config.vocab_size == 386


def test_text_with_a_token_of_its_own_is_refused(place: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{n} <|mine|> and some more words"}) for n in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    data = data_of(tmp_path / "text.jsonl")
    with pytest.raises(UserError, match=r"mine.* which the teacher's tokenizer lacks"):
        distill(place / "student", place / "teacher", data, tmp_path / "out", CONFIG, OPTIONS)
    assert not (tmp_path / "out").exists()
