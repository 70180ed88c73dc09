"""Models with fewer tokens: the cut per family, their teacher, their text, and their stages."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of, write_model, write_text
from tiny_job import refused
from tiny_models import NAMES, float64_norms, random_plan, tiny_ids, tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.blend import BuildContext, blend
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.plan import Plan, compose
from regrow.profile_folder import Profile
from regrow.pruning.config import PruneConfig
from regrow.pruning.cut import check, cut_folder, cut_model
from regrow.search.score import CutScorer
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.stage import EVALUATION, evaluate
from regrow.stages.evaluate.texts import opening
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.passes import count_tokens
from regrow.stages.profile.stage import profile
from regrow.stages.prune.stage import prune
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.shared_tokens import teacher_ids
from regrow.training.teacher import Teacher

OPTIONS = Options(device="cpu", batch_size=4, order="resident")
KEPT = [0, 1, *range(3, 384, 5)]
SIZE = 320


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_parents_at_the_kept_ids(name: str, tied: bool, tmp_path: Path) -> None:
    """In memory, and from disk to disk; with a padded vocabulary; tied stays tied."""
    model: Any = float64_norms(
        tiny_model(name, tie_word_embeddings=tied, vocab_size=390, num_hidden_layers=2)
        if name not in ("qwen2", "gemma3_text")
        else tiny_model(name, tie_word_embeddings=tied, vocab_size=390)
    )
    plan = random_plan(model.config.to_dict(), vocab=KEPT)
    student: Any = float64_norms(cut_model(model, plan))
    ids = tiny_ids() % len(KEPT)
    with torch.no_grad():
        expected = model(torch.tensor(KEPT)[ids]).logits[..., KEPT]
        torch.testing.assert_close(student(ids).logits, expected, rtol=1e-12, atol=1e-12)
    family = families.get(name)
    assert student.config.vocab_size == len(KEPT)
    assert (student.config.eos_token_id, student.config.pad_token_id) == (0, 1)
    same = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert same == tied
    assert sum(p.numel() for p in student.parameters()) == family.count(
        model.config.to_dict(), {"vocab": len(KEPT)}
    )
    model.save_pretrained(str(tmp_path / "parent"))
    parent = Checkpoint(tmp_path / "parent")
    cut_folder(parent, plan.model_copy(update={"fingerprint": parent.fingerprint}), tmp_path / "s")
    cut_model_read = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "s"), dtype=torch.float64
    ).eval()
    for key, value in student.state_dict().items():
        assert torch.equal(cut_model_read.state_dict()[key], value), key


def test_ids_in_configs_follow_on_disk_and_in_memory(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32, eos_token_id=[7, 9], pad_token_id=9)
    model.generation_config.eos_token_id = [7, 9]
    plan = random_plan(model.config.to_dict(), vocab=[0, 1, 7, 8, 9])
    student = cut_model(model, plan)
    model.save_pretrained(str(tmp_path / "parent"))
    parent = Checkpoint(tmp_path / "parent")
    cut_folder(parent, plan.model_copy(update={"fingerprint": parent.fingerprint}), tmp_path / "s")
    written = json.loads((tmp_path / "s" / "generation_config.json").read_text())
    assert written["eos_token_id"] == student.generation_config.eos_token_id == [2, 4]
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    for fields in (config, student.config.to_dict()):
        assert (fields["eos_token_id"], fields["pad_token_id"]) == ([2, 4], 4)
    assert model.generation_config.eos_token_id == [7, 9]
    short = random_plan(model.config.to_dict(), vocab=[0, 1, 7, 8])
    with pytest.raises(UserError, match=r"vocab lacks token 9, which config\.json uses"):
        check(short, families.get("llama"), model.config.to_dict())


def test_plans_keep_and_compose_tokens() -> None:
    config = tiny_model("llama").config.to_dict()
    first = random_plan(config, vocab=[0, 1, 5, 6, 8], mlp=20)
    after = {**config, "vocab_size": 5, "intermediate_size": 20}
    second = random_plan(after, vocab=[0, 1, 4])
    composed = compose(first, second)
    assert composed.kept("vocab") == composed.vocab == [0, 1, 8]
    assert composed.mlp == first.mlp
    assert (
        compose(random_plan(config, mlp=20), random_plan({**after, "vocab_size": 384})) is not None
    )
    with pytest.raises(UserError, match=r"vocab names 384; allowed are 0 to 383"):
        random_plan(config, vocab=[0, 384]).check(families.get("llama").sizes(config))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, text.jsonl, its profile/, and cut/ with SIZE tokens and fewer MLP channels."""
    folder = tmp_path_factory.mktemp("vocab")
    text = write_text(folder / "text.jsonl", documents=200)
    checkpoint = write_model(
        folder / "model", num_hidden_layers=2, head_dim=8, vocab_size=len(tiny_tokenizer()) + 4
    )
    config = ProfileConfig(samples=12, gram_tokens=12 * 32)
    profile(checkpoint, data_of(text), folder / "profile", config, OPTIONS)
    target = PruneConfig(vocab_size=SIZE, intermediate_size=40, multiple_of=8)
    prune(checkpoint, folder / "cut", target, folder / "profile")
    return folder


def plan_of(place: Path) -> Plan:
    return Plan.read(place / "cut" / "plan.json")


def test_tokens_are_counted_over_the_whole_split(place: Path) -> None:
    """Against counting documents one by one; more than the profiled blocks, and none twice."""
    data, tokenizer = data_of(place / "text.jsonl"), tiny_tokenizer()
    all_counts = Counter[int]()
    for document in blend(BuildContext(data, tokenizer, "calibration", None)):
        all_counts.update(document.ids)
    scores = Profile(place / "profile").scores("token_count", "vocab")["all"]
    assert scores.tolist() == [all_counts[i] for i in range(len(tokenizer) + 4)]
    assert sum(all_counts.values()) > 2 * 12 * 32
    first_counts = count_tokens(data, tokenizer, len(tokenizer), 100)
    assert 100 <= int(first_counts.sum()) < 300


def test_the_pruned_folder_has_its_tokenizer(place: Path) -> None:
    plan = plan_of(place)
    assert plan.vocab is not None
    cut_tokenizer = AutoTokenizer.from_pretrained(str(place / "cut"))
    full_tokenizer = tiny_tokenizer()
    text = " ".join(SENTENCES)
    assert cut_tokenizer.decode(cut_tokenizer(text)["input_ids"]) == text
    old = {i: token for token, i in full_tokenizer.get_vocab().items()}
    assert {old[was]: now for now, was in enumerate(plan.vocab)} == cut_tokenizer.get_vocab()
    assert cut_tokenizer.chat_template == full_tokenizer.chat_template
    assert Checkpoint(place / "cut").config["vocab_size"] == SIZE
    same_plan = PruneConfig(plan=str(place / "cut" / "plan.json"))
    out = prune(place / "model", place / "again", same_plan, place / "profile")
    assert (out / "tokenizer.json").read_bytes() == (place / "cut" / "tokenizer.json").read_bytes()


def slow_kl(place: Path, folder: Path, batch: dict[str, Any], dtype: torch.dtype) -> float:
    """Σ_v p (log p − log q) over the kept ids, p of the parent renormalised, per scored token."""
    kept = torch.tensor(plan_of(place).vocab)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
        for path in (folder, place / "model")
    )
    ids, positions = batch["input_ids"], batch["position_ids"]
    with torch.no_grad():
        log_q = student(ids, position_ids=positions, use_cache=False).logits
        log_p = teacher(kept[ids], position_ids=positions, use_cache=False).logits
    log_q = log_q[:, :-1].double().log_softmax(-1)
    log_p = log_p[:, :-1][..., kept].double().log_softmax(-1)
    kl_BT = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(kl_BT[batch["labels"][:, 1:] != -100].mean())


def test_the_teacher_of_fewer_tokens_in_float64(place: Path) -> None:
    student, parent = Checkpoint(place / "cut"), Checkpoint(place / "model")
    ids = teacher_ids(student, parent)
    assert ids is not None
    assert ids.tolist() == plan_of(place).vocab
    model = student.model(torch.float64)
    data = data_of(place / "text.jsonl")
    sequences = build_sequences(data, student.tokenizer(), "heldout", 4)
    batch = next(sequences.batches(4))
    mix = LossWeights({"forward_kl": 1.0})
    bind_loss(model, Teacher(parent.model(torch.float64), ids), mix)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels")}
    outputs = model(**inputs)
    slow = slow_kl(place, place / "cut", batch, torch.float64)
    assert float(outputs["loss"].detach()) / int(outputs["tokens"]) == pytest.approx(slow, rel=1e-9)
    assert slow > 1e-3
    # Uncut weights over the same tokens are at no distance.
    plan = random_plan(parent.config, parent.fingerprint, vocab=plan_of(place).vocab or [])
    equal = cut_model(parent.model(torch.float64), plan)
    bind_loss(equal, Teacher(parent.model(torch.float64), ids), mix)
    assert float(equal(**inputs)["loss"].detach()) == 0.0


def test_distill_a_model_with_fewer_tokens(place: Path) -> None:
    config = DistillConfig(
        tokens=2560, batch_tokens=128, eval_tokens=640, heldout_sequences=16, learning_rate=1e-3
    )
    data = data_of(place / "text.jsonl")
    out = distill(place / "cut", place / "model", data, place / "distilled", config, OPTIONS)
    sequences = build_sequences(data, Checkpoint(out).tokenizer(), "validation", 16)
    batch = next(sequences.batches(16))
    rows = json.loads((out / "manifest.json").read_text())["figures"]
    values = {figure["name"]: figure["value"] for figure in rows}
    assert values["held-out KL"] < 0.9 * values["held-out KL before"]
    for name, folder in (("held-out KL before", place / "cut"), ("held-out KL", out)):
        slow = slow_kl(place, folder, batch, torch.float32)
        assert values[name] == pytest.approx(slow, rel=0.05)
    assert (out / "tokenizer.json").read_bytes() == (place / "cut" / "tokenizer.json").read_bytes()


@torch.no_grad()
def test_the_teacher_ranks_answers_of_a_model_with_fewer_tokens(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the pairs against float64 runs of the teacher on the same tokens, by their text."""
    pytest.importorskip("trl")
    from regrow.stages.prefer import PreferConfig, dpo
    from regrow.stages.prefer.stage import prefer

    trained: list[Any] = []
    train_pairs = dpo.train_pairs

    def noted(student: Checkpoint, pairs: Any, *rest: Any) -> Any:
        trained.extend(pairs)
        with torch.enable_grad():
            return train_pairs(student, pairs, *rest)

    monkeypatch.setattr(dpo, "train_pairs", noted)
    rows = "".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(40))
    (tmp_path / "prompts.jsonl").write_text(rows)
    config = PreferConfig(max_new_tokens=6, keep_unfinished=True, min_margin=0, temperature=2)
    out = tmp_path / "out"
    data = data_of(tmp_path / "prompts.jsonl")
    prefer(place / "cut", place / "model", data, out, config, OPTIONS)
    teacher, own = Checkpoint(place / "model"), Checkpoint(place / "cut").tokenizer()
    ids, model = teacher.tokenizer().get_vocab(), teacher.model(torch.float64)
    assert len(own) < len(ids) and trained
    for pair in trained:
        for answer, score in zip((pair.chosen, pair.rejected), pair.scores, strict=True):
            given = [ids[token] for token in own.convert_ids_to_tokens(pair.prompt + answer)]
            log_p = model(torch.tensor([given])).logits[0, :-1].log_softmax(-1)
            own_T = log_p.gather(-1, torch.tensor(given[1:])[:, None])[-len(answer) :]
            assert score == pytest.approx(float(own_T.mean()), rel=0.05, abs=2e-3)  # bf16


def test_another_models_tokens_are_refused(place: Path, tmp_path: Path) -> None:
    data = data_of(place / "text.jsonl")
    with pytest.raises(UserError, match="have different tokenizers"):  # a teacher with fewer
        distill(place / "model", place / "cut", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bits_per_byte_and_kl_on_equal_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the stock model, token by token; the text is what the teacher's first tokens say."""
    raw = tmp_path / "raw.txt"
    raw.write_text(" ".join(f"{n} é🤖 {s}" for n in range(8) for s in SENTENCES))
    config = EvaluateConfig(
        metrics=("perplexity", "kl"),
        texts={"raw": str(raw)},
        text_tokens=150,
        window=32,
        dtype="float32",
    )
    out = evaluate({"cut": place / "cut"}, tmp_path / "out", None, place / "model", config, OPTIONS)
    said = capsys.readouterr()
    assert "perplexities per token cannot be compared" in said.err
    assert "note: the KL of cut is over its own tokens." in said.out
    figures = json.loads((out / EVALUATION).read_text())["figures"]
    full_tokenizer = tiny_tokenizer()
    text, ids = opening([raw], full_tokenizer, 150)
    assert raw.read_text().startswith(text)
    assert len(ids) == 150
    assert abs(len(full_tokenizer(text)["input_ids"]) - 150) <= 3  # a character cut in two is whole
    slow = {}
    for label, folder in (("teacher", place / "model"), ("cut", place / "cut")):
        slow[label] = bits_per_byte(folder, ids if label == "teacher" else None, text)
        values = {figure["name"]: figure for figure in figures[label]}
        assert "perplexity/raw" not in values  # of tokens that differ: nothing to compare
        assert values["bits_per_byte/raw"]["value"] == pytest.approx(slow[label][0], rel=1e-4)
        assert values["bits_per_byte/raw"]["n"] == slow[label][1]
        per_token = slow["teacher"][1] / slow["teacher"][2]
        expected = math.exp(slow[label][0] * math.log(2) * per_token)
        figure = values["perplexity_per_reference_token/raw"]
        assert figure["value"] == pytest.approx(expected, rel=1e-3)
    kl = next(figure for figure in figures["cut"] if figure["name"] == "kl/raw")
    cut_ids = Checkpoint(place / "cut").tokenizer()(text)["input_ids"]
    total = sum(
        slow_kl(place, place / "cut", one_window(part), torch.float64) * (len(part) - 1)
        for part in parts(cut_ids)
        if len(part) > 1
    )
    assert kl["value"] == pytest.approx(total / kl["n"], rel=1e-3)
    assert "renormalised" in kl["convention"]


def parts(ids: list[int]) -> list[list[int]]:
    return [ids[at : at + 32] for at in range(0, len(ids), 32)]


def one_window(ids: list[int]) -> dict[str, Any]:
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(len(ids))[None],
        "labels": input_ids,
    }


def bits_per_byte(folder: Path, ids: list[int] | None, text: str) -> tuple[float, int, int]:
    """Σ −log2 q ÷ bytes, bytes and tokens, over all but the first token of windows of 32."""
    tokenizer = Checkpoint(folder).tokenizer()
    ids = ids if ids is not None else tokenizer(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    bits, size, count, at = 0.0, 0, 0, 0
    for part in parts(ids):
        with torch.no_grad():
            log_q = model(torch.tensor([part])).logits[0].log_softmax(-1)
        for t, token in enumerate(part):
            if t:
                bits -= float(log_q[t - 1, token]) / math.log(2)
                size += begun(tokenizer, ids[: at + 1], text) - begun(tokenizer, ids[:at], text)
                count += 1
            at += 1
    return bits / size, size, count


def begun(tokenizer: Any, ids: list[int], text: str) -> int:
    """UTF-8 bytes of the characters that these first tokens hold, or hold a part of."""
    decoded = tokenizer.decode(ids)
    complete = decoded.rstrip("�")
    return len(text[: len(complete) + (decoded != complete)].encode())


def test_bad_vocabulary_sizes_are_refused_on_the_command_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*arguments: object) -> str:
        command = ["prune", place / "model", "--profile", place / "profile", "--out", place / "x"]
        return refused(capsys, *command, *arguments)

    total = len(tiny_tokenizer()) + 4
    assert f"allowed are 1 to {total}" in ask("--vocab-size", total + 8)
    minimum = "260 tokens of this model are always kept"
    assert minimum in ask("--vocab-size", 256)
    assert minimum in ask("--vocab-size", 256, "--dry-run")
    assert "must be a multiple of 32; use 288 or 320" in ask("--vocab-size", 300)
    message = ask("--plan", other_plan(place), "--no-repair")
    assert "plan: it was made for the model" in message
    compared = ["compare", place / "model", "--profile", place / "profile", "--data"]
    text = place / "text.jsonl"
    message = refused(capsys, *compared, text, "--vocab-size", 320, "--sequence-length", 32)
    assert "criteria are compared on the same tokens" in message


def other_plan(place: Path) -> Path:
    """A plan that cuts the vocabulary of another model of this shape."""
    path = place / "other.json"
    plan_of(place).model_copy(update={"fingerprint": "0" * 64}).write(path)
    return path


def test_a_search_on_the_parents_tokens_refuses_the_plan(place: Path) -> None:
    checkpoint, data = Checkpoint(place / "model"), data_of(place / "text.jsonl")
    trial = CutScorer(checkpoint, Profile(place / "profile"), data, OPTIONS, 2)
    with pytest.raises(UserError, match="leave vocab_size out here"):
        trial.kl(plan_of(place))
