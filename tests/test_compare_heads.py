"""One query head removed, the least important or a random one, against full logits."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from tiny_folders import data_of, write_model, write_text
from torch import Tensor

from regrow import PruneConfig, compare
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.profile_folder import Profile
from regrow.search.score import CutScorer
from regrow.stages.compare.head_removal import Heads, _without, heads_table, remove_heads
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile

OPTIONS = Options(device="cpu", batch_size=4, order="resident")
LAYERS, HEADS, WIDTH, PROFILED = 3, 6, 8, 8


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> CutScorer:
    """Of a model whose head 4 in layer 1 writes nothing, in float32 to compare sums."""
    folder = tmp_path_factory.mktemp("heads")
    text = write_text(folder / "text.jsonl", documents=300)
    checkpoint = write_model(folder / "model", head_dim=WIDTH, num_key_value_heads=6)
    model = checkpoint.model(torch.float32)
    with torch.no_grad():
        rows = slice(4 * WIDTH, 5 * WIDTH)
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[rows] = 0
    model.save_pretrained(str(checkpoint.folder))
    config = ProfileConfig(
        criteria=("activation_l2", "magnitude", "random"), samples=PROFILED, gram_tokens=0
    )
    profile(checkpoint.folder, data_of(text), folder / "profile", config, OPTIONS)
    opened = Checkpoint(checkpoint.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_PRECISION", "float32")
        return CutScorer(opened, Profile(folder / "profile"), data_of(text), OPTIONS)


@torch.no_grad()
def slow_losses(trial: CutScorer, heads: Heads) -> tuple[float, float]:
    """KL and cross-entropy from full logits, the heads' part of o_proj's input set to zero."""
    data = data_of(trial.profile.folder.parent / "text.jsonl")
    sequences = build_sequences(data, trial.checkpoint.tokenizer(), "calibration", PROFILED + 8)
    batch = next(sequences.select(range(PROFILED, PROFILED + 8)).batches(8))
    model_inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    model = trial.checkpoint.model(torch.float32)
    log_p = model(**model_inputs, use_cache=False).logits[:, :-1].double().log_softmax(-1)

    def zero(head: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        x[..., head * WIDTH : (head + 1) * WIDTH] = 0
        return (x, *inputs[1:])

    for layer, head in heads:
        module = model.get_submodule(f"model.layers.{layer}.self_attn.o_proj")
        module.register_forward_pre_hook(lambda m, inputs, head=head: zero(head, inputs))
    log_q = model(**model_inputs, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    mask = batch["labels"][:, 1:] != -100
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()
    loss = -log_q.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)[mask].mean()
    return float(kl), float(loss)


def close(actual: float, expected: float) -> None:
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_rows_equal_the_slow_version(trial: CutScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least important by each criterion, and every random draw, one in all and one a layer."""
    tried: list[Heads] = []
    monkeypatch.setattr(
        "regrow.stages.compare.head_removal._without",
        lambda trial, heads: (tried.append(heads), _without(trial, heads))[1],
    )
    rows = remove_heads(trial, 3)
    monkeypatch.undo()
    dense = slow_losses(trial, [])[1]
    assert [(row["removed"], row["chosen"]) for row in rows] == [
        (removed, chosen)
        for removed in ("one head", "one head in every layer")
        for chosen in ("activation_l2", "magnitude", "random")
    ]
    assert len(tried) == 2 * (1 + 1 + 3)
    slow = [slow_losses(trial, heads) for heads in tried]
    for number, row in enumerate(rows):
        begin = 5 * (number // 3) + number % 3
        slow_rows = slow[begin : begin + (3 if row["chosen"] == "random" else 1)]
        close(row["kl"], mean(kl for kl, _ in slow_rows))
        close(row["loss"], mean(loss for _, loss in slow_rows) - dense)
        assert ("kl_spread" in row) == (row["chosen"] == "random")
        if row["chosen"] == "random":
            close(row["kl_spread"], stdev(kl for kl, _ in slow_rows))
            close(row["loss_spread"], stdev(loss for _, loss in slow_rows))
    assert [len(heads) for heads in tried] == [1] * 5 + [LAYERS] * 5
    assert len({heads[0] for heads in tried[2:5]}) == 3  # drawn without putting back
    assert all(sorted(n for n, _ in heads) == list(range(LAYERS)) for heads in tried[5:])


def test_the_least_important_head_is_the_one_that_does_nothing(trial: CutScorer) -> None:
    rows = {(row["removed"], row["chosen"]): row for row in remove_heads(trial, 2)}
    assert abs(rows["one head", "activation_l2"]["kl"]) < 1e-6
    assert abs(rows["one head", "activation_l2"]["loss"]) < 1e-6
    assert rows["one head", "random"]["kl"] > 1e-3
    assert rows == {(row["removed"], row["chosen"]): row for row in remove_heads(trial, 2)}


def test_the_model_is_unchanged_afterwards(trial: CutScorer) -> None:
    before = {name: value.clone() for name, value in trial.dense.model.state_dict().items()}
    remove_heads(trial, 2)
    for name, value in trial.dense.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_command_writes_both_tables(trial: CutScorer, tmp_path: Path) -> None:
    place = trial.profile.folder.parent
    data, target = data_of(place / "text.jsonl"), PruneConfig(intermediate_size=32)
    out = tmp_path / "table.json"
    compare(place / "model", place / "profile", data, target, out, OPTIONS, heads=2)
    text = out.read_text()
    assert '"removed": "one head in every layer"' in text
    table = heads_table([{"removed": "a", "chosen": "b", "kl": 1.0, "loss": 0.5}], 2)
    assert table.row_count == 1


def test_a_profile_without_scores_of_heads_is_refused(trial: CutScorer, tmp_path: Path) -> None:
    place = trial.profile.folder.parent
    data = data_of(place / "text.jsonl")
    config = ProfileConfig(criteria=("block_influence", "random"), samples=1, gram_tokens=0)
    bare = profile(place / "model", data, tmp_path / "bare", config, OPTIONS)
    with pytest.raises(UserError, match="scores no query heads: profile with --criteria"):
        compare(place / "model", bare, data, PruneConfig(num_layers=2), options=OPTIONS, heads=2)
