"""Losses by source: each token gets its source's losses, in chunks, steps and processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_losses import BETA, SKEW
from slow_losses import slow as slow_loss
from test_head import Case, N
from test_trainer import error
from tiny_folders import data_of, write_text
from tiny_tokenizer import tiny_tokenizer
from tiny_training import arguments, pair, start_ranks, tiny_sequences, train
from torch import Tensor

from regrow.data import DataConfig
from regrow.data.sequences import Sequences, build_sequences
from regrow.training.cache.sparse import Sparse
from regrow.training.callbacks import MetricSums
from regrow.training.head import head_loss
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.trainer import DistillTrainer

TEACHERS, COUNT_PREFIX = {"skewed_kl": 1.0}, {"skewed_reverse_kl": 0.5}
MIXES = {
    "contrastive": LossWeights(
        {"forward_kl": 1.0}, 1.0, BETA, SKEW, by_source=(TEACHERS, COUNT_PREFIX)
    ),
    "hot": LossWeights({"jsd": 1.0}, 2.5, BETA, SKEW, by_source=(TEACHERS, COUNT_PREFIX)),
    "some in common": LossWeights(
        {"forward_kl": 1.0},
        2.0,
        BETA,
        SKEW,
        by_source=(
            {"cross_entropy": 0.3, "skewed_kl": 0.7},
            {"skewed_kl": 0.2, "jsd": 2.0, "cross_entropy": 1.0},
            {"forward_kl": 1.0},
        ),
    ),
}


def sources_of(mix: LossWeights, count: int) -> Tensor:
    """Sources in no order; the last one has no token if there are many."""
    draw = torch.Generator().manual_seed(7)
    return torch.randint(0, len(mix.by_source), (count,), generator=draw)


def slow(case: Case, mix: LossWeights, source_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Token by token on full logits in float64: the weighted sum, and the sum of each loss."""
    logits = []
    for hidden, head in ((case.student_NH, case.student), (case.teacher_NH, case.teacher)):
        full = hidden.double() @ head.weight_VH.double().T
        logits.append(full if head.softcap is None else head.softcap * (full / head.softcap).tanh())
    total, parts = torch.zeros((), dtype=torch.float64), {}
    for n, source in enumerate(source_N.tolist()):
        for name, weight in mix.by_source[source].items():
            rows = (logits[0][n : n + 1], logits[1][n : n + 1], case.targets_N[n : n + 1])
            value = slow_loss(name, *rows, mix.temperature).sum()
            total, parts[name] = total + weight * value, parts.get(name, 0.0) + value
    return total, parts


def chunked(
    case: Case, mix: LossWeights, source_N: Tensor | None, chunk: int
) -> tuple[Tensor, dict[str, Tensor]]:
    return head_loss(
        case.student_NH,
        case.student,
        case.targets_N,
        mix,
        case.teacher_NH,
        case.teacher,
        chunk_tokens=chunk,
        source_N=source_N,
    )


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "softcap"])
def test_value_and_gradients_equal_the_slow_version(mix: LossWeights, cap: float | None) -> None:
    case = Case(softcap=cap, teacher_softcap=cap)
    source_N = sources_of(mix, N)
    expected, parts = slow(case, mix, source_N)
    expected_gradients = case.gradients(expected)
    for chunk in range(1, N + 2):
        value, gradients = chunked(case, mix, source_N, chunk)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        assert gradients.keys() == {name for weights in mix.by_source for name in weights}
        for name, part in parts.items():
            torch.testing.assert_close(gradients[name], part, rtol=1e-12, atol=1e-12)
        for gradient, exact in zip(case.gradients(value), expected_gradients, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_gradients_by_finite_differences(mix: LossWeights) -> None:
    case = Case(sizes=(5, 3, 5, 5), softcap=2.0, teacher_softcap=2.0)
    source_N = torch.tensor([1, 0, 0, 1, len(mix.by_source) - 1])
    case.check_by_finite_differences(lambda: chunked(case, mix, source_N, 2)[0])


def test_tokens_of_no_known_source_have_the_plain_mix_to_the_bit() -> None:
    case = Case(torch.float32)
    mix = MIXES["hot"]
    actual, expected = (
        chunked(case, weights, None, 4) for weights in (mix, replace(mix, by_source=()))
    )
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys() == {"jsd"}
    pairs = zip(case.gradients(actual[0]), case.gradients(expected[0]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_cached_tokens_take_the_losses_of_their_source() -> None:
    """A source taught by the text alone, and one by known ids: as two calls give it."""
    case = Case()
    weights = ({"cross_entropy": 1.0}, {"forward_kl": 0.5})
    source_N = sources_of(LossWeights({}, by_source=weights), N)
    p_NK = torch.rand(N, 2, dtype=torch.float64).softmax(-1) / 2
    sparse = Sparse(11, torch.arange(2).expand(N, 2).contiguous(), p_NK, 1 - p_NK.sum(-1))
    arguments = (case.student_NH, case.student, case.targets_N)
    total, _ = head_loss(
        *arguments,
        LossWeights({}, by_source=weights),
        sparse=sparse,
        chunk_tokens=3,
        source_N=source_N,
    )
    expected = torch.zeros((), dtype=torch.float64)
    for number, row_weights in enumerate(weights):
        rows = source_N == number
        row_arguments = (case.student_NH[rows], case.student, case.targets_N[rows])
        expected = (
            expected + head_loss(*row_arguments, LossWeights(row_weights), sparse=sparse[rows])[0]
        )
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    write_text(tmp_path / "a.jsonl", seed=1)
    write_text(tmp_path / "b.jsonl", seed=2)
    return data_of(tmp_path / "a.jsonl", sources=[str(tmp_path / "a.jsonl")])


def test_sequences_have_the_source_of_each_token(tmp_path: Path, data: DataConfig) -> None:
    """The same blocks as without losses of sources, which have no such tensor, and its number."""
    paths: list[Any] = [str(tmp_path / "a.jsonl"), {"source": str(tmp_path / "b.jsonl")}]
    plain = data_of(tmp_path, sources=paths)
    tagged = data_of(tmp_path, sources=[paths[0], {**paths[1], "losses": COUNT_PREFIX}])
    before, after = (
        build_sequences(config, tiny_tokenizer(), "train", 20) for config in (plain, tagged)
    )
    assert before.source is None
    assert set(before[0]) == {"input_ids", "position_ids", "labels", "real"}
    assert after.source is not None
    untagged = Sequences(after.input_ids, after.position_ids, after.labels, after.real)
    assert untagged.fingerprint == before.fingerprint != after.fingerprint
    alone = [
        set("".join(path.read_text().split()).split('"text":'))
        for path in sorted(tmp_path.iterdir())
    ]
    checked = 0
    for row in range(len(after)):
        starts = (after.position_ids[row] == 0).nonzero().flatten().tolist()
        for begin, end in zip(starts, [*starts[1:], after.input_ids.shape[1]], strict=True):
            numbers = set(after.source[row, begin:end].tolist())
            assert len(numbers) == 1  # of one document
            words = tiny_tokenizer().decode(
                after.input_ids[row, begin:end].tolist(), skip_special_tokens=True
            )
            piece = "".join(words.split())
            within = [any(piece in text for text in texts) for texts in alone]
            if sum(within) == 1:
                assert numbers == {within.index(True)}
                checked += 1
    assert checked > 10
    assert set(after.source.unique().tolist()) == {0, 1}
    after.save(tmp_path / "blocks.safetensors")
    reloaded = Sequences.load(tmp_path / "blocks.safetensors")
    assert reloaded.fingerprint == after.fingerprint
    assert torch.equal(reloaded.select([3, 1]).source, after.source[[3, 1]])
    assert torch.equal(next(reloaded.batches(4))["source"], after.source[:4])


MIX = LossWeights(
    {"forward_kl": 1.0}, 2.0, by_source=({"skewed_kl": 1.0}, {"skewed_reverse_kl": 0.5})
)


def tagged_sequences() -> Sequences:
    """A source for each document, and so that one has many more tokens than the other."""
    plain = tiny_sequences()
    document = (plain.position_ids == 0).long().cumsum(1)
    rows = torch.arange(len(plain))[:, None]
    source = ((document == 1) | (rows == 3)).long()
    return Sequences(plain.input_ids, plain.position_ids, plain.labels, plain.real, source)


def whole_step(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """All blocks at once in float64; the outputs, which the head's own tests vouch for."""
    student, teacher = pair(dtype)
    student.train()
    undo = bind_loss(student, teacher, MIX)
    outputs = student(**next(tagged_sequences().batches(8)))
    undo()
    (outputs["loss"] / outputs["tokens"]).backward()
    outputs["gradients"] = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return outputs


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    return whole_step()


def test_a_step_is_the_sum_over_the_sources(exact: dict[str, Any]) -> None:
    """Each kind of token alone, by a plain mix and by labels of its own, adds up to the whole."""
    sequences = tagged_sequences()
    assert sequences.source is not None
    total, counts = torch.zeros((), dtype=torch.float64), []
    for number, weights in enumerate(MIX.by_source):
        student, teacher = pair(torch.float64)
        student.train()
        undo = bind_loss(student, teacher, LossWeights(weights, MIX.temperature))
        labels = sequences.labels.where(sequences.source == number, torch.tensor(-100))
        outputs = student(sequences.input_ids, sequences.position_ids, labels)
        undo()
        (name,) = weights
        torch.testing.assert_close(outputs["parts"][name], exact["parts"][name])
        assert exact["counts"][name] == outputs["tokens"]
        total = total + outputs["loss"].detach()
        counts.append(int(outputs["tokens"]))
    torch.testing.assert_close(total, exact["loss"].detach())
    assert sum(counts) == exact["tokens"]
    assert min(counts) > 0
    assert counts[0] != counts[1]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_is_the_same_however_it_is_split(
    tmp_path: Path, exact: dict[str, Any], batch_size: int, accumulation: int
) -> None:
    trainer, watch = train(tmp_path, batch_size, accumulation, tagged_sequences(), MIX)
    assert error(watch.gradients, exact["gradients"]) < 1e-5
    check_log(trainer, exact)


def check_log(trainer: DistillTrainer, exact: dict[str, Any]) -> None:
    """Each loss is logged by name, as the mean of the tokens it is taken of."""
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(float(exact["loss"].detach() / exact["tokens"]), rel=1e-3)
    for name, count in exact["counts"].items():
        mean = float(exact["parts"][name] / count)
        assert row[name] == pytest.approx(mean, rel=1e-4)


def _train_share(rank: int, folder: str) -> None:
    trainer, watch = train(
        Path(folder) / f"{rank}", 2, 2, tagged_sequences(), MIX, ddp_backend="gloo"
    )
    rows = [row for row in trainer.state.log_history if "loss" in row]
    torch.save((watch.gradients, rows), Path(folder) / f"{rank}.pt")


def test_ranks_give_the_step_of_one_process(tmp_path: Path, exact: dict[str, Any]) -> None:
    start_ranks(2, _train_share, str(tmp_path))
    by_rank = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert len(by_rank) == 2
    for gradients, _ in by_rank:
        assert error(gradients, exact["gradients"]) < 1e-5
    (row,) = by_rank[0][1]
    for name, count in exact["counts"].items():
        assert row[name] == pytest.approx(float(exact["parts"][name] / count), rel=1e-4)


def test_held_out_forward_kl_is_of_all_tokens_and_others_of_their_own(tmp_path: Path) -> None:
    student, teacher = pair(torch.float64)
    sequences = tagged_sequences()
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, per_device_eval_batch_size=3),
        eval_dataset=sequences,
    )
    undo = bind_loss(student, teacher, MIX)
    measured = trainer.evaluate()
    undo()
    assert set(measured) == {"eval_forward_kl", "eval_skewed_kl", "eval_skewed_reverse_kl"}
    parts = (sequences.input_ids, sequences.position_ids, sequences.labels, sequences.real)
    trainer.eval_dataset = Sequences(*parts)
    undo = bind_loss(student, teacher, LossWeights({"forward_kl": 1.0}))
    assert trainer.evaluate()["eval_forward_kl"] == pytest.approx(measured["eval_forward_kl"])
    undo()


def test_a_loss_without_a_token_is_not_logged() -> None:
    tally = MetricSums()
    sums = {"a": 6.0, "b": 0.0, "c": 8.0, "tokens": 4.0, "tokens of a": 3.0, "tokens of b": 0.0}
    tally.add({name: torch.tensor(value) for name, value in sums.items()})
    assert tally.means(lambda values: values) == {"a": 2.0, "c": 2.0}
