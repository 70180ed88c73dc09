"""On-policy distillation: what the student writes, what is scored, and that it can be continued."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from slow_losses import BETA
from slow_losses import slow as slow_loss
from tiny_distillation import CONFIG, OPTIONS, data, rows_of, write_place
from tiny_job import refused
from tiny_tokenizer import tiny_tokenizer
from tiny_training import arguments, pair, start_ranks, tiny_sequences
from torch import Tensor

from regrow.data.sequences import IGNORED, Sequences
from regrow.errors import UserError
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.on_policy import (
    NumberedSequences,
    StudentWriter,
    own_rows,
    plain_prompts,
    share_out,
    text_prompts,
)
from regrow.training.trainer import DistillTrainer

T, NEW = 24, 5
LOSSES = {"reverse_kl": 0.7, "jsd": 0.2}
MIX = LossWeights({"forward_kl": 1.0}, 1.0, BETA, by_source=({"forward_kl": 1.0}, LOSSES))
SAMPLING = Sampling(NEW, 1.3, seed=3, vocab_size=370)


def test_own_rows_are_the_share_and_the_first_ones_of_more() -> None:
    assert own_rows(8, 0.5) == [1, 3, 5, 7]
    assert own_rows(5, 1.0) == [0, 1, 2, 3, 4]
    assert own_rows(5, 0.0) == []
    for share in (0.1, 0.3, 0.77):
        assert len(own_rows(1000, share)) == pytest.approx(1000 * share, abs=1)
        assert own_rows(1000, share)[:20] == own_rows(400, share)[:20]


def test_prompts_of_packed_text_by_hand() -> None:
    """Two documents: one with a prompt of 4 tokens and BOS, and plain text; then padding."""
    ids = torch.arange(100, 116)[None]
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1]])
    labels = ids.clone()
    labels[0, :5] = labels[0, 6:8] = labels[0, 14:] = IGNORED
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 14:] = False
    sequences = Sequences(ids, positions, labels, real)
    found = text_prompts(sequences, [0], 2, 1, 1)
    assert found == [[100, 101, 102, 103, 104], [106, 107, 108], [106, 110, 111]]
    assert list(plain_prompts([7, 8, 9], 4, 1, 0)) == []
    shared = share_out([[1, 2], [3, 4, 5], [6]], [4, 9], 10, 2)
    assert shared == {4: [[1, 2], [3, 4, 5]], 9: [[6], [1, 2]]}


@torch.no_grad()
def slow_answer(model: Any, prompt: list[int], key: str) -> list[int]:
    """One token after the other in float64, without a cache: inverts the cumulative sum."""
    draw, ids = Random(f"{SAMPLING.seed}/{key}"), list(prompt)
    for _ in range(NEW):
        logits = model(torch.tensor([ids])).logits[0, -1, : SAMPLING.vocab_size]
        sums = (logits / SAMPLING.temperature).softmax(-1).cumsum(-1)
        ids.append(int((sums <= draw.random() * sums[-1]).sum()))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


def trainer_of(
    folder: Path, batch_size: int, steps: int = 1, save_steps: int = 1000, **fields: Any
) -> tuple[DistillTrainer, Any, Sequences]:
    student, teacher = pair()
    sequences = tiny_sequences(16)
    rows = own_rows(len(sequences), 0.5)
    prompts = share_out(text_prompts(sequences, rows, 3, NEW, 0), rows, T, NEW)
    generator = BatchGenerator(student, tiny_tokenizer(), SAMPLING)
    writer = StudentWriter(generator, prompts, T, 1, steps, 5)
    given = {"per_device_train_batch_size": batch_size, "save_steps": save_steps}
    trainer = DistillTrainer(
        model=student,
        args=arguments(folder, **{**given, "max_steps": 2, **fields}),
        train_dataset=NumberedSequences(sequences),
        writer=writer,
    )
    return trainer, teacher, sequences


class Kept:
    """Keeps the micro-batches of each step."""

    def __init__(self, trainer: DistillTrainer) -> None:
        self.steps: list[list[dict[str, Tensor]]] = []
        original = trainer.get_batch_samples

        def keep(*given: Any) -> Any:
            batches, count = original(*given)
            self.steps.append(batches)
            if trainer.args.world_size == 1:
                assert count == sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches)
            return batches, count

        trainer.get_batch_samples = keep  # type: ignore[method-assign]

    def rows(self, step: int) -> dict[str, Tensor]:
        batches = self.steps[step]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_the_student_writes_and_only_its_tokens_are_scored(tmp_path: Path) -> None:
    """Step by step against float64: its draws, the masks, and the loss of each document alone."""
    trainer, teacher, sequences = trainer_of(tmp_path, 4, gradient_accumulation_steps=2)
    exact = pair(torch.float64)
    kept = Kept(trainer)
    undo = bind_loss(trainer.student, teacher, MIX)
    trainer.args.max_steps = 1
    trainer.train()
    undo()
    batch = kept.rows(0)
    assert "row" not in batch
    model, guide = exact[0], exact[1].model
    total, count = 0.0, 0
    for row in range(8):
        own = row % 2 == 1
        if not own:
            for name in ("input_ids", "labels", "position_ids"):
                assert torch.equal(batch[name][row], getattr(sequences, name)[row])
            assert (batch["source"][row] == 0).all()
            documents = _documents(batch, row)
        else:
            assert trainer.writer is not None
            documents, ids, labels = [], [], []
            for n, prompt in enumerate(trainer.writer.prompts[row]):
                answer = slow_answer(model, prompt, f"{row}/{n}")
                documents.append((prompt + answer, [IGNORED] * len(prompt) + answer))
                ids += prompt + answer
                labels += documents[-1][1]
            assert len(documents) > 1
            assert batch["input_ids"][row, : len(ids)].tolist() == ids
            assert batch["labels"][row, : len(ids)].tolist() == labels
            assert (batch["labels"][row, len(ids) :] == IGNORED).all()
        for ids, labels in documents:
            logits = [m(torch.tensor([ids])).logits[0].detach() for m in (model, guide)]
            for at in range(len(ids) - 1):
                if labels[at + 1] == IGNORED:
                    continue
                count += 1
                given = (*(each[at : at + 1] for each in logits), torch.tensor([labels[at + 1]]))
                for name, weight in MIX.by_source[own].items():
                    total += weight * float(slow_loss(name, *given, 1.0).sum())
    (logged,) = (r["loss"] for r in trainer.state.log_history if "loss" in r)
    assert logged == pytest.approx(total / count, rel=1e-4)


def _documents(batch: dict[str, Tensor], row: int) -> list[tuple[list[int], list[int]]]:
    starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
    return [
        (batch["input_ids"][row, a:b].tolist(), batch["labels"][row, a:b].tolist())
        for a, b in zip(starts, [*starts[1:], T], strict=True)
    ]


def test_texts_are_of_the_weights_at_their_step(tmp_path: Path) -> None:
    """With two steps at once the second step's text is of the first weights, else of the second."""
    texts = {}
    for steps, every in ((1, 1000), (2, 1000), (2, 1)):
        trainer, teacher, _ = trainer_of(tmp_path / f"{steps}{every}", 4, steps, every)
        kept = Kept(trainer)
        undo = bind_loss(trainer.student, teacher, MIX)
        trainer.train()
        undo()
        texts[steps, every] = [kept.rows(step)["input_ids"] for step in (0, 1)]
    fresh, stale, saved = texts[1, 1000], texts[2, 1000], texts[2, 1]
    assert torch.equal(fresh[0], stale[0])
    assert not torch.equal(fresh[1], stale[1])
    assert torch.equal(fresh[1], saved[1])  # it writes anew after a checkpoint


def _train_share(rank: int, folder: str) -> None:
    trainer, teacher, _ = trainer_of(Path(folder) / f"{rank}", 2, ddp_backend="gloo")
    kept = Kept(trainer)
    bind_loss(trainer.student, teacher, MIX)
    trainer.train()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save((kept.rows(0)["input_ids"], weights), Path(folder) / f"{rank}.pt")


def test_ranks_write_the_rows_of_one_process(tmp_path: Path) -> None:
    start_ranks(2, _train_share, str(tmp_path))
    trainer, teacher, _ = trainer_of(tmp_path / "alone", 4)
    kept = Kept(trainer)
    bind_loss(trainer.student, teacher, MIX)
    trainer.train()
    found = [torch.load(path) for path in sorted(tmp_path.glob("*.pt"))]
    assert torch.equal(torch.cat([ids for ids, _ in found]), kept.rows(0)["input_ids"])
    for _, weights in found:
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-4, atol=1e-5)


OWN = {
    "tokens": 4 * 128,
    "eval_tokens": 2 * 128,
    "on_policy_share": 0.5,
    "on_policy_prompt_tokens": 6,
    "on_policy_new_tokens": 10,
    "on_policy_steps": 3,
}


def config(**fields: Any) -> DistillConfig:
    return CONFIG.model_copy(update={**OWN, **fields})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_place(tmp_path_factory.mktemp("on_policy") / "place")
    rows = [json.dumps({"prompt": f"Say {n}."}) for n in range(40)]
    (place / "prompts.jsonl").write_text("\n".join(rows))
    return place


@pytest.mark.parametrize("seldom", [{}, {"eval_tokens": 4 * 128, "on_policy_steps": 2}])
def test_a_killed_run_goes_on_to_the_same_student(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seldom: dict[str, int]
) -> None:
    """Seldom measured but often saved, it continues where the student writes, before step 2."""
    given = (place / "pruned", place / "teacher", data(place))
    own = config(**seldom)
    whole = distill(*given, tmp_path / "whole", own, OPTIONS)
    original = DistillTrainer.training_step

    def killed(self: DistillTrainer, *more: Any, **named: Any) -> Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *more, **named)

    monkeypatch.setattr(DistillTrainer, "training_step", killed)
    often = OPTIONS.model_copy(update={"save_minutes": 1e-9} if seldom else {})
    with pytest.raises(KeyboardInterrupt):
        distill(*given, tmp_path / "cut", own, often)
    kept = [path.name for path in tmp_path.glob(".cut.partial/trainer/*")]
    assert kept == ["checkpoint-2"]
    monkeypatch.setattr(DistillTrainer, "training_step", original)
    cut = distill(*given, tmp_path / "cut", own, OPTIONS)
    name = "model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
    rows, again = (
        [
            {key: value for key, value in row.items() if key != "stage" and "seconds" not in key}
            for row in rows_of(folder)
        ]
        for folder in (whole, cut)
    )
    assert rows == again
    trained = [row for row in rows if "loss" in row]
    assert all({"forward_kl", "reverse_kl"} <= row.keys() for row in trained)
    stock = json.loads((place / "pruned" / "generation_config.json").read_text())
    written = json.loads((whole / "generation_config.json").read_text())
    assert {"max_new_tokens"} & written.keys() == {"max_new_tokens"} & stock.keys()


def test_prompts_of_their_own_in_place_of_all_text(place: Path, tmp_path: Path) -> None:
    """With a share of 1 and a file of prompts, changed prompts are another run."""
    own = config(on_policy_share=1.0, on_policy_prompts=str(place / "prompts.jsonl"), tokens=128)
    given = (place / "pruned", place / "teacher", data(place), tmp_path / "out")
    out = distill(*given, own, OPTIONS)
    (row,) = (row for row in rows_of(out) if "loss" in row)
    assert row["loss"] == pytest.approx(row["reverse_kl"], rel=1e-3)
    assert "forward_kl" not in row
    before = (out / "manifest.json").read_text()
    distill(*given, own, OPTIONS)
    assert (out / "manifest.json").read_text() == before
    (place / "more.jsonl").write_text((place / "prompts.jsonl").read_text().replace("Say", "Do"))
    distill(
        *given, own.model_copy(update={"on_policy_prompts": str(place / "more.jsonl")}), OPTIONS
    )
    assert (out / "manifest.json").read_text() != before


@pytest.mark.parametrize(
    ("fields", "options", "told"),
    [
        ({"cache": "somewhere"}, {}, "a cache holds the teacher's outputs"),
        ({"cross_tokenizer": "spans"}, {}, "compares no single tokens"),
        ({}, {"sharding": "fsdp"}, "no process with the whole student"),
        ({}, {"torch_compile": True}, "leave one out"),
        ({"on_policy_new_tokens": 30}, {}, "sequence_length is 32"),
        ({"on_policy_prompts": "nowhere.jsonl"}, {}, "no such file"),
    ],
)
def test_what_is_refused(place: Path, tmp_path: Path, fields: Any, options: Any, told: str) -> None:
    given = (place / "pruned", place / "teacher", data(place), tmp_path / "out")
    with pytest.raises(UserError, match=told):
        distill(*given, config(**fields), OPTIONS.model_copy(update=options))
    assert not (tmp_path / "out").exists()


def test_prompts_without_room_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "word " * 60}))
    said = refused(
        capsys,
        *("distill", place / "pruned", "--teacher", place / "teacher"),
        *("--data", place / "text.jsonl", "--sequence-length", 32, "--out", tmp_path / "out"),
        *("--tokens", 128, "--batch-tokens", 128, "--heldout-sequences", 2),
        *("--on-policy-share", 0.5, "--on-policy-prompts", tmp_path / "long.jsonl"),
        *("--on-policy-new-tokens", 8),
        at_once=False,
    )
    assert "none of" in said
    assert "has room for on_policy_new_tokens 8" in said
