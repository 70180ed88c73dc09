"""Distillation across tokenizers: spans against hand-made ones, the loss in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from slow_losses import BETA, DIVERGENCES, SKEW
from tiny_models import tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer, tiny_tokenizer_of
from tiny_training import Largest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from regrow.data.documents import Document
from regrow.data.sequences import IGNORED, Packer, Sequences
from regrow.errors import UserError
from regrow.runtime import chunks
from regrow.training.cross_tokenizer.align import Aligner, Span, token_bytes
from regrow.training.cross_tokenizer.teacher import (
    CrossTokenizerTeacher,
    log_probabilities,
    span_loss,
)
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher

HARD = ["naïve café 日本語 🙂 text", " two  spaces\n\n\ttab", "é", "", "a", *SENTENCES]
KINDS = ("byte level", "byte fallback", "unigram")


def by_hand(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the letters a to d, an end, and these merges; words are not split."""
    vocab = {"<end>": 0, **{letter: n for n, letter in enumerate("abcd", start=1)}}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


def test_spans_equal_a_hand_made_example() -> None:
    student = by_hand(("a", "b"), ("c", "d"))  # ab|cd|a|a|d|<end>
    teacher = by_hand(("b", "c"), ("a", "d"))  # a|bc|d|a|ad|<end>
    ids = [*student("abcdaad")["input_ids"], 0]
    assert student.convert_ids_to_tokens(ids) == ["ab", "cd", "a", "a", "d", "<end>"]
    aligned = Aligner(student, teacher).align(ids)
    assert aligned is not None
    assert teacher.convert_ids_to_tokens(aligned[0]) == ["a", "bc", "d", "a", "ad", "<end>"]
    assert aligned[1] == [
        Span((0, 2), (0, 3)),  # abcd
        Span((2, 3), (3, 4)),  # a
        Span((3, 5), (4, 5)),  # ad
        Span((5, 6), (5, 6)),  # the end
    ]


def test_a_span_at_the_very_start_of_the_teachers_text_is_not_compared() -> None:
    """The student has a BOS to predict its first token from; the teacher has none."""
    student = by_hand(("a", "b"), ("c", "d"))
    student.add_special_tokens({"bos_token": "<begin>"})
    teacher = by_hand(("b", "c"), ("a", "d"))  # a|bc|d|a|ad|<end>
    ids = torch.tensor([[student.bos_token_id, *student("abcdaad")["input_ids"], 0]])
    labels = ids.clone()
    labels[:, 0] = IGNORED
    positions = torch.arange(ids.shape[1])[None]
    aligner = Aligner(student, teacher)
    aligned = aligner.align(ids[0].tolist())
    assert aligned is not None
    assert aligned[1][0] == Span((1, 3), (0, 3))  # abcd
    aligned_batch = aligner.batch({"input_ids": ids, "position_ids": positions, "labels": labels})
    assert student.convert_ids_to_tokens(aligned_batch.student.target) == ["a", "a", "d", "<end>"]
    assert teacher.convert_ids_to_tokens(aligned_batch.teacher.target) == ["a", "ad", "<end>"]
    assert aligned_batch.student.at == [2, 3, 4, 5]
    assert aligned_batch.teacher.at == [2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_the_text(kind: str) -> None:
    tokenizer = tiny_tokenizer_of(kind)
    spelled = token_bytes(tokenizer, "x")
    for text in HARD:
        parts = [spelled[i] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert None not in parts
        joined = b"".join(part for part in parts if part is not None)
        assert (
            joined.removeprefix(b"" if kind == "byte level" or not text else b" ") == text.encode()
        )


def text_between(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bytes:
    return b"".join(part or b"" for i in ids for part in [token_bytes(tokenizer, "x")[i]])


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_spans_hold_the_same_text_and_are_the_shortest(
    student: str, teacher: str, text: str
) -> None:
    student_tokenizer, teacher_tokenizer = tiny_tokenizer_of(student), tiny_tokenizer_of(teacher)
    if student == teacher == "byte level":
        teacher_tokenizer = tiny_tokenizer(300)
    ids = [*student_tokenizer(text)["input_ids"], student_tokenizer.eos_token_id]
    aligned = Aligner(student_tokenizer, teacher_tokenizer).align(ids)
    assert aligned is not None
    teacher_ids, spans = aligned
    plain = [
        i
        for i in teacher_ids
        if i not in (teacher_tokenizer.bos_token_id, teacher_tokenizer.eos_token_id)
    ]
    assert plain == teacher_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert teacher_ids[-1] == teacher_tokenizer.eos_token_id
    for (a, b), (c, d) in spans:
        assert (
            text_between(student_tokenizer, ids[a:b]).strip()
            == text_between(teacher_tokenizer, teacher_ids[c:d]).strip()
        )
        for middle in range(a + 1, b):  # nowhere inside do both end
            left = text_between(student_tokenizer, ids[a:middle])
            assert all(
                left != text_between(teacher_tokenizer, teacher_ids[c:n]) for n in range(c + 1, d)
            )
    for span, following in pairwise(spans):
        assert (span.student[1], span.teacher[1]) == (following.student[0], following.teacher[0])
    assert spans[-1].student[1] == len(ids)
    assert spans[-1].teacher[1] == len(teacher_ids)


@pytest.mark.parametrize(("begin", "end"), [(1, 0), (2, 0), (0, 1), (0, 2), (1, 1)])
def test_a_sequence_may_begin_and_end_inside_a_character(begin: int, end: int) -> None:
    student, teacher = tiny_tokenizer(260), tiny_tokenizer(384)  # the first has bytes alone
    ids = student("日 the model is pruned 本")["input_ids"]
    ids = ids[begin : len(ids) - end]
    aligned = Aligner(student, teacher).align(ids)
    assert aligned is not None
    skipped = (3 - begin) % 3
    teacher_ids, spans = aligned
    text = (b"" if begin else "日".encode()) + b" the model is pruned "
    expected = text.decode() + ("" if end else "本")
    assert teacher_ids == teacher(expected)["input_ids"]
    assert spans[0].student[0] == skipped
    covered = b"".join(text_between(student, ids[slice(*span.student)]) for span in spans)
    assert covered == expected.encode()


def block_of(tokenizer: PreTrainedTokenizerBase, length: int = 48, seed: int = 0) -> Sequences:
    """Two rows of packed documents; prompts and single tokens here and there are not scored."""
    packer = Packer(length, tokenizer.pad_token_id or 0)
    draw = torch.Generator().manual_seed(seed)
    for text in [*SENTENCES, "naïve 日本語 🙂"]:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        packer.add(Document(ids, (torch.rand(len(ids), generator=draw) < 0.8).tolist()))
    return packer.sequences(2)


def slow_outputs(
    student: Any,
    teacher: Any,
    aligner: Aligner,
    sequences: Sequences,
    temperature: float,
    name: str,
) -> Tensor:
    """Document by document, each alone in both models, whole logits, one span after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(sequences)):
        starts = (sequences.position_ids[row] == 0).nonzero().squeeze(-1).tolist()
        for begin, end in pairwise([*starts, sequences.input_ids.shape[1]]):
            ids = sequences.input_ids[row, begin:end]
            scored = (sequences.labels[row, begin:end] != IGNORED).tolist()
            if not sequences.real[row, begin]:
                continue
            aligned = aligner.align(ids.tolist())
            assert aligned is not None
            teacher_ids = torch.tensor(aligned[0])
            log_q = student(ids[None], use_cache=False).logits[0].log_softmax(-1)
            with torch.no_grad():
                log_p = teacher(teacher_ids[None], use_cache=False).logits[0].log_softmax(-1)
            for (a, b), (c, d) in aligned[1]:
                if a == 0 or c == 0 or not all(scored[a:b]):
                    continue
                student_log_p = torch.stack([log_q[n - 1, ids[n]] for n in range(a, b)]).sum()
                masters = torch.stack([log_p[n - 1, teacher_ids[n]] for n in range(c, d)]).sum()
                total = total + slow_span(name, student_log_p, masters, temperature)
    return total


def slow_span(
    name: str, student_log_p: Tensor, teacher_log_p: Tensor, temperature: float
) -> Tensor:
    """By the probabilities themselves."""
    q, p = (student_log_p / temperature).exp(), (teacher_log_p / temperature).exp()
    two = [torch.stack((x, 1 - x)).log() for x in (p, q)]
    return temperature * DIVERGENCES[name](two[0], two[1])


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_and_gradients_in_float64(name: str, temperature: float) -> None:
    student_tokenizer, teacher_tokenizer = tiny_tokenizer(300), tiny_tokenizer_of("byte fallback")
    student = tiny_model(
        "llama", torch.float64, seed=1, vocab_size=len(student_tokenizer), num_hidden_layers=2
    )
    teacher = tiny_model(
        "llama", torch.float64, seed=2, vocab_size=len(teacher_tokenizer), num_hidden_layers=1
    )
    for model in (student, teacher):  # likely enough that 1 − p by itself is exact
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(0.02)
    sequences, aligner = block_of(student_tokenizer), Aligner(student_tokenizer, teacher_tokenizer)
    batch = next(sequences.batches(2))
    weights = list(student.parameters())
    expected = slow_outputs(student, teacher, aligner, sequences, temperature, name)
    gradients = torch.autograd.grad(expected, weights)
    mix = LossWeights({name: 1.0}, 1.0, BETA, SKEW)
    undo = bind_loss(student, CrossTokenizerTeacher(Teacher(teacher), aligner, temperature), mix)
    outputs = student.train()(**{k: batch[k] for k in ("input_ids", "position_ids", "labels")})
    undo()
    torch.testing.assert_close(outputs["loss"], expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(
        outputs["parts"][f"span_{name}"], expected.detach(), rtol=1e-7, atol=0
    )
    assert 0.3 < float(outputs["parts"]["in_spans"]) / int(outputs["tokens"]) < 1
    for one_, other_ in zip(torch.autograd.grad(outputs["loss"], weights), gradients, strict=True):
        torch.testing.assert_close(one_, other_, rtol=1e-6, atol=1e-10)


def test_the_loss_of_the_teacher_itself_is_zero_and_mixes_with_cross_entropy() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", torch.float64, seed=1)
    sequences = block_of(tokenizer)
    batch = next(sequences.batches(2))
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "labels")}
    spans = CrossTokenizerTeacher(Teacher(model), Aligner(tokenizer, tokenizer), 100.0)
    undo = bind_loss(model, spans, LossWeights({"forward_kl": 1.0, "cross_entropy": 0.5}))
    outputs = model(**inputs)
    undo()
    undo = bind_loss(model, None, LossWeights({"cross_entropy": 1.0}))
    plain = float(model(**inputs)["loss"].detach())
    undo()
    assert float(outputs["parts"]["span_forward_kl"]) == 0.0
    assert float(outputs["loss"].detach()) == pytest.approx(plain / 2, rel=1e-12)
    # The same tokens: every scored one is a span of its own.
    assert int(outputs["parts"]["in_spans"]) == int(outputs["tokens"])
    # In eval mode the span KL comes first, whatever teaches.
    bind_loss(model, spans, LossWeights({"cross_entropy": 1.0}))
    assert next(iter(model.eval()(**inputs)["parts"])) == "span_forward_kl"


def test_nothing_scored_is_a_zero_with_a_graph() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", torch.float32, seed=1)
    batch = next(block_of(tokenizer).batches(2))
    inputs = {k: batch[k] for k in ("input_ids", "position_ids")}
    spans = CrossTokenizerTeacher(
        Teacher(tiny_model("llama", seed=2)), Aligner(tokenizer, tokenizer), 100.0
    )
    bind_loss(model, spans, LossWeights({"forward_kl": 1.0}))
    loss = model.train()(**inputs, labels=torch.full_like(batch["labels"], IGNORED))["loss"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(model.get_output_embeddings().weight.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("cap", [None, 1.5])
def test_log_probabilities_in_chunks(cap: float | None) -> None:
    n, h, v, size = 13, 6, 17, 14
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(v, h, generator=draw, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, size, (n,), generator=draw)
    scale = torch.randn(n, generator=draw, dtype=torch.float64)
    logits = hidden @ weight[:size].T
    logits = logits if cap is None else cap * (logits / cap).tanh()
    expected = logits.log_softmax(-1)[torch.arange(n), targets]
    gradients = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    for chunk in (1, 4, n, n + 1):
        log_p = log_probabilities(hidden, Head(weight, cap), targets, size, chunk_tokens=chunk)
        torch.testing.assert_close(log_p, expected, rtol=1e-12, atol=1e-12)
        chunk_gradients = torch.autograd.grad((log_p * scale).sum(), (hidden, weight))
        torch.testing.assert_close(chunk_gradients, gradients, rtol=1e-11, atol=1e-12)
    ce, _ = head_loss(
        hidden, Head(weight[:size], cap), targets, LossWeights({"cross_entropy": 1.0})
    )
    torch.testing.assert_close(-expected.sum(), ce)


def test_no_tensor_of_tokens_times_vocabulary() -> None:
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    with Largest(set()) as largest:
        log_p = log_probabilities(
            hidden, Head(weight), torch.zeros(512, dtype=torch.int64), 1000, chunk_tokens=32
        )
        log_p.sum().backward()
    assert largest.elements == 32 * 1000


def test_chunks_of_the_default_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `chunk_tokens`, a chunk has at most CHUNK_ELEMENTS logits, in both passes."""
    n, size = 400, 50
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 40 * size)
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(size, 4)
    with Largest(ignored=set()) as largest:
        values = log_probabilities(hidden, Head(weight), torch.zeros(n, dtype=torch.int64), size)
        values.sum().backward()  # type: ignore[no-untyped-call]
    assert largest.elements == 40 * size


def test_far_and_certain_spans_stay_finite() -> None:
    student_log_p = torch.tensor(
        [0.0, -1e-30, -1e-9, -700.0, 0.0], dtype=torch.float64, requires_grad=True
    )
    teacher_log_p = torch.tensor([0.0, -5.0, -1e-9, -1.0, -700.0], dtype=torch.float64)
    for name in DIVERGENCES:
        loss, _ = span_loss(
            student_log_p, teacher_log_p, LossWeights({name: 1.0}, 1.0, BETA, SKEW), 100.0
        )
        (slope,) = torch.autograd.grad(loss, student_log_p)
        assert math.isfinite(float(loss.detach())), name
        assert bool(slope.isfinite().all()), name


def test_special_tokens_that_the_teacher_lacks_are_refused() -> None:
    chat = tiny_tokenizer()
    other = tiny_tokenizer_of("byte fallback")
    ids = torch.tensor([chat("<|im_start|>user\nHello there!<|im_end|>")["input_ids"]])
    positions = torch.arange(ids.shape[1])[None]
    sequences = Sequences(ids, positions, ids, torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(UserError, match=r"special token '<\|im_start\|>', which the teacher"):
        Aligner(chat, other).check_specials(sequences)
    marked = Aligner(chat, tiny_tokenizer(300))  # it has the same marks
    marked.check_specials(sequences)
    assert marked.coverage(sequences) > 0.5
    plain = block_of(chat)
    nothing = torch.full_like(plain.labels, IGNORED)
    plain = Sequences(plain.input_ids, plain.position_ids, nothing, plain.real)
    with pytest.raises(UserError, match="both tokenizers change all of the text"):
        Aligner(chat, other).coverage(plain)
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    silent = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"student x has .* \(decoder: WordPiece\)"):
        Aligner(silent, chat, ("student x", "teacher y"))


def test_text_that_does_not_decode_to_itself_is_left_out() -> None:
    """Without bytes, what was not trained on is unknown to the teacher."""
    student_tokenizer, teacher_tokenizer = (
        tiny_tokenizer(),
        tiny_tokenizer_of("unigram without bytes"),
    )
    aligner = Aligner(student_tokenizer, teacher_tokenizer)
    assert aligner.align(student_tokenizer("日本語")["input_ids"]) is None
    assert aligner.align(student_tokenizer("The capital of France")["input_ids"]) is not None
    assert aligner.coverage(block_of(student_tokenizer)) < 1
