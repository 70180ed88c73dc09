"""The prune stage: plans applied again, plans that follow each other, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cache import weights
from tiny_folders import data_of, write_model
from tiny_pruning import OPTIONS, chosen, write_place

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.plan import Plan, compose
from regrow.pruning.config import PruneConfig
from regrow.stage import RecipePlan, parse_step
from regrow.stage_dir import read
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile
from regrow.stages.prune.dry_run import estimate
from regrow.stages.prune.stage import prune

SIZES = PruneConfig(intermediate_size=40, num_layers=3, multiple_of=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def test_a_plan_applied_again_gives_the_same_weights(place: Path, tmp_path: Path) -> None:
    first = prune(place / "model", tmp_path / "first", SIZES, place / "profile")
    config = PruneConfig(plan=str(first / "plan.json"))
    second = prune(place / "model", tmp_path / "again", config, place / "profile")
    expected = weights(first)
    assert weights(second).keys() == expected.keys()
    for name, value in weights(second).items():
        assert torch.equal(value, expected[name]), name
    assert (second / "plan.json").read_text() == (first / "plan.json").read_text()
    before = (second / "model.safetensors").stat().st_mtime_ns
    moved = shutil.copyfile(first / "plan.json", tmp_path / "moved.json")
    prune(place / "model", second, PruneConfig(plan=str(moved)), place / "profile")
    assert (second / "model.safetensors").stat().st_mtime_ns == before  # the same plan: unchanged
    plain = PruneConfig(plan=str(first / "plan.json"), repair=False)
    changed = weights(prune(place / "model", tmp_path / "plain", plain))
    differing = {name for name, value in changed.items() if not torch.equal(value, expected[name])}
    narrower, others = (
        {f"model.layers.{n}.{reader}.weight" for n in range(3)}
        for reader in ("mlp.down_proj", "self_attn.o_proj")
    )
    assert narrower <= differing <= narrower | others


def test_repair_and_choice_need_the_right_profile(place: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", data_of(place / "text.jsonl")
    bare = profile(
        place / "model", data, tmp_path / "bare", ProfileConfig(samples=4, gram_tokens=0), OPTIONS
    )
    by_gram = SIZES.model_copy(update={"repair_method": "gram"})
    with pytest.raises(UserError, match="bare has no Gram matrices, which repair by gram needs"):
        prune(place / "model", out, by_gram, bare)
    with pytest.raises(UserError, match=r"bare has 4 sequences .* takes 8 or more: profile with"):
        prune(place / "model", out, SIZES, bare)
    unknown = SIZES.model_copy(update={"repair_method": "sequentiel"})
    with pytest.raises(UserError, match=r"no repair named 'sequentiel'.*sequential"):
        prune(place / "model", out, unknown, bare)
    with pytest.raises(UserError, match="choosing what to keep needs a profile"):
        prune(place / "model", out, SIZES)
    other = write_model(tmp_path / "other", num_hidden_layers=4, head_dim=8, vocab_size=384)
    with pytest.raises(UserError, match="is the profile of another model"):
        prune(other, out, SIZES, place / "profile")
    with pytest.raises(UserError, match="profile again with --criteria minitron"):
        prune(
            place / "model",
            out,
            SIZES.model_copy(update={"criterion": "minitron"}),
            place / "profile",
        )
    assert not out.exists()
    prune(place / "model", out, SIZES.model_copy(update={"repair": False}), bare)
    assert Checkpoint(out).config["intermediate_size"] == 40


def test_another_profile_means_another_cut(place: Path, tmp_path: Path) -> None:
    """A profile on other text, in the same folder, does not count as the one used before."""
    data, folder = data_of(place / "text.jsonl"), tmp_path / "profile"
    config = ProfileConfig(samples=8, gram_tokens=8 * 32)
    profile(place / "model", data, folder, config, OPTIONS)
    prune(place / "model", tmp_path / "out", SIZES, folder)
    first = read(tmp_path / "out")
    other = data.model_copy(update={"seed": 3})
    profile(place / "model", other, folder, config, OPTIONS)
    prune(place / "model", tmp_path / "out", SIZES, folder)
    second = read(tmp_path / "out")
    assert first is not None
    assert second is not None
    assert first["inputs"]["profile"] != second["inputs"]["profile"]
    assert first["finished"] <= second["finished"]
    assert first["repair"] != second["repair"]


def test_plans_of_several_rounds_lead_back_to_the_first_model(place: Path, tmp_path: Path) -> None:
    """Three cuts in a row equal the one cut of the first model that plan-from-first.json says."""
    data = data_of(place / "text.jsonl")
    rounds = [
        PruneConfig(intermediate_size=80, multiple_of=8, repair=False),
        PruneConfig(num_layers=3, intermediate_size=40, multiple_of=8, repair=False),
        PruneConfig(num_key_value_heads=1, intermediate_size=32, multiple_of=8, repair=False),
    ]
    parent, plans = place / "model", []
    for number, config in enumerate(rounds):
        profile_config = ProfileConfig(samples=8, gram_tokens=0, seed=number)
        measured = profile(parent, data, tmp_path / f"profile-{number}", profile_config, OPTIONS)
        out = prune(parent, tmp_path / str(number), config, measured)
        plans.append(Plan.read(out / "plan.json"))
        assert (out / "plan-from-first.json").exists() == (number > 0)
        parent = out
    composed = Plan.read(parent / "plan-from-first.json")
    assert composed == compose(compose(plans[0], plans[1]), plans[2])
    assert composed.fingerprint == Checkpoint(place / "model").fingerprint
    at_once = PruneConfig(plan=str(parent / "plan-from-first.json"), repair=False)
    direct = weights(prune(place / "model", tmp_path / "direct", at_once))
    for name, value in weights(parent).items():
        assert torch.equal(direct[name], value), name


def test_a_stored_plan_for_this_model_is_not_merged(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    chosen(place, mlp=40).write(tmp_path / "model" / "plan.json")
    config = PruneConfig(plan=str(tmp_path / "model" / "plan.json"), repair=False)
    out = prune(tmp_path / "model", tmp_path / "out", config)
    assert not (out / "plan-from-first.json").exists()


def test_a_history_that_does_not_fit_is_refused_first(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    fields = json.loads(chosen(place, mlp=40).model_dump_json(exclude_none=True))
    fields["fingerprint"] = "0" * 64
    (tmp_path / "model" / "plan.json").write_text(json.dumps(fields))
    config = SIZES.model_copy(update={"repair": False})
    with pytest.raises(UserError, match="plans do not follow each other"):
        prune(tmp_path / "model", tmp_path / "out", config, place / "profile")
    assert not (tmp_path / "out").exists()


def fine_tuned(place: Path, folder: Path) -> Checkpoint:
    """The place's model with other weights of the same shapes."""
    model = Checkpoint(shutil.copytree(place / "model", folder)).model(torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    model.save_pretrained(str(folder))
    return Checkpoint(folder)


def test_a_plan_edited_by_hand_is_what_is_cut(place: Path, tmp_path: Path) -> None:
    """One channel and one layer swapped in the file, as a user would with an editor."""
    path = tmp_path / "plan.json"
    chosen(place, mlp=40, layers=3).write(path)
    fields = json.loads(path.read_text())
    first = str(fields["layers"][0])
    (new,) = {*range(4)} - set(fields["layers"])
    fields["mlp"][str(new)] = fields["mlp"].pop(first)
    fields["layers"] = sorted([*fields["layers"][1:], new])
    fields["mlp"][str(new)] = ids = sorted([*fields["mlp"][str(new)][1:], *missing(fields, new)])
    path.write_text(json.dumps(fields))
    out = prune(place / "model", tmp_path / "out", PruneConfig(plan=str(path), repair=False))
    position = fields["layers"].index(new)
    parent, cut = weights(place / "model"), weights(out)
    name = "model.layers.{}.mlp.gate_proj.weight"
    assert torch.equal(cut[name.format(position)], parent[name.format(new)][ids])
    assert Plan.read(out / "plan.json") == Plan.read(path)
    fields["mlp"][str(new)][0] = 999
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"plan: mlp\.{new} names 999; allowed are 0 to 159"):
        prune(place / "model", tmp_path / "other", PruneConfig(plan=str(path), repair=False))


def missing(fields: dict[str, Any], layer: int) -> list[int]:
    """One channel that the plan does not keep."""
    return sorted(set(range(160)) - set(fields["mlp"][str(layer)]))[:1]


def test_a_plan_for_a_sibling_is_applied_when_allowed(place: Path, tmp_path: Path) -> None:
    sibling, path = fine_tuned(place, tmp_path / "tuned"), tmp_path / "plan.json"
    plan = chosen(place, mlp=40, layers=3)
    plan.write(path)
    config = PruneConfig(plan=str(path), repair=False)
    with pytest.raises(UserError, match=r"make a plan for this model, or.* with --allow-sibling"):
        prune(sibling, tmp_path / "out", config)
    allowed = PruneConfig(plan=str(path), repair=False, allow_sibling=True)
    out = prune(sibling, tmp_path / "out", allowed)
    for name, value in weights(prune(place / "model", tmp_path / "own", config)).items():
        assert torch.equal(weights(out)[name], value * 1.01), name
    carried = Plan.read(out / "plan.json")
    assert (carried.fingerprint, carried.siblings) == (sibling.fingerprint, (plan.fingerprint,))
    assert (carried.layers, carried.mlp) == (plan.layers, plan.mlp)
    written = (out / "model.safetensors").stat().st_mtime_ns
    own_plan = PruneConfig(plan=str(out / "plan.json"), repair=False)  # it is the sibling's own now
    prune(sibling, out, own_plan)
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_a_stored_plan_of_a_sibling_is_not_merged(place: Path, tmp_path: Path) -> None:
    sibling = fine_tuned(place, tmp_path / "tuned")
    chosen(place, mlp=40).write(sibling.folder / "plan.json")
    config = PruneConfig(plan=str(sibling.folder / "plan.json"), repair=False, allow_sibling=True)
    out = prune(sibling, tmp_path / "out", config)
    assert not (out / "plan-from-first.json").exists()


def test_siblings_stay_known_over_rounds(place: Path, tmp_path: Path) -> None:
    sibling, path = fine_tuned(place, tmp_path / "tuned"), tmp_path / "plan.json"
    plan = chosen(place, mlp=40)
    plan.write(path)
    config = PruneConfig(plan=str(path), repair=False, allow_sibling=True)
    first = prune(sibling, tmp_path / "first", config)
    measured = profile(
        first,
        data_of(place / "text.jsonl"),
        tmp_path / "profile",
        ProfileConfig(samples=4, gram_tokens=0),
        OPTIONS,
    )
    fewer = PruneConfig(num_layers=3, repair=False)
    second = prune(first, tmp_path / "second", fewer, measured)
    composed = Plan.read(second / "plan-from-first.json")
    assert (composed.fingerprint, composed.siblings) == (sibling.fingerprint, (plan.fingerprint,))


def test_a_sibling_of_other_sizes_or_family_is_refused(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    chosen(place, mlp=40).write(path)
    config = PruneConfig(plan=str(path), repair=False, allow_sibling=True)
    wider = write_model(tmp_path / "wider", num_hidden_layers=4, head_dim=8, intermediate_size=168)
    with pytest.raises(UserError, match=r"before.mlp is 160, but the model has 168"):
        prune(wider, tmp_path / "out", config)
    same = {"num_hidden_layers": 4, "head_dim": 8, "intermediate_size": 160}
    other = write_model(tmp_path / "other", "qwen3", **same)
    with pytest.raises(UserError, match="made for a llama model, not for a qwen3"):
        prune(other, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_the_dry_run_counts_the_text_that_a_repair_will_read(place: Path) -> None:
    """The profile has 768 tokens; with a smaller repair_tokens that number is the limit."""
    checkpoint = Checkpoint(place / "model")

    def tokens_of(config: PruneConfig, profile_tokens: int | None) -> str:
        lines = "\n".join(estimate(checkpoint, config, 32, profile_tokens))
        match = re.search(r"repair: sequential, on ((?:up to )?[\d,]+) tokens", lines)
        assert match is not None, lines
        return match[1]

    assert tokens_of(SIZES, 768) == "768"
    assert tokens_of(SIZES, None) == "up to 131,072"
    assert tokens_of(SIZES.model_copy(update={"repair_tokens": 100}), 768) == "100"
    step = parse_step({"prune": SIZES.model_dump(exclude_unset=True)}, 0)
    data = data_of(place / "text.jsonl")
    plan = RecipePlan(str(place / "model"), checkpoint, data, OPTIONS, [step])
    plan.calibration_sequences = 24
    assert "on 768 tokens" in "\n".join(step.stage.dry_run(step, plan))
