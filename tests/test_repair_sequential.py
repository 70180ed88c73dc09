"""Repair layer after layer, against least squares on whole models run token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of, write_model
from tiny_models import random_plan
from tiny_pruning import OPTIONS, kl_between, write_trained
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families, layerwise
from regrow.checkpoint import Checkpoint
from regrow.data.sequences import Sequences, build_sequences
from regrow.families import Family
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.cut import cut_model
from regrow.pruning.repair import RepairSetup, sequential
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile

RIDGE = 1e-3
NAMES = ("llama", "gemma3_text", "qwen3")
PLANS: dict[str, dict[str, Any]] = {
    "mlp": {"mlp": 31},
    "heads": {"heads": 4},
    "kv_heads and hidden": {"kv_heads": 1, "heads": 2, "hidden": 36},
    "layers": {"layers": [0, 2]},
    "the first layer": {"layers": [1, 2], "mlp": 40},
}


def profiled(folder: Path, checkpoint: Checkpoint, text: Path, samples: int = 32) -> Profile:
    config = ProfileConfig(criteria=("random",), samples=samples, gram_tokens=0)
    return profile(checkpoint, data_of(text), folder, config, OPTIONS)


def repaired(
    checkpoint: Checkpoint, profile: Profile, plan: Plan, work: Path, **options: Any
) -> sequential.Sequential:
    limits = (options.pop("tokens", 10**6), options.pop("upstream", 1.0))
    job = RepairSetup(checkpoint, families.of(checkpoint), profile, plan, work, OPTIONS, *limits)
    return sequential.repair(job, **options)


class Seen:
    """Inputs of modules of a whole model on all the text [tokens, channels]."""

    def __init__(self, model: PreTrainedModel, names: list[str], sequences: Sequences) -> None:
        self.of: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[..., None]:
            return lambda _, inputs: self.of.__setitem__(name, inputs[0].flatten(0, 1))

        modules = [(name, model.get_submodule(name)) for name in names]
        handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules]
        inputs = {"input_ids": sequences.input_ids, "position_ids": sequences.position_ids}
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()


def streams(family: Family, layer: int, layers: int, dim: str, following: int) -> tuple[str, str]:
    """The modules whose inputs are the residual stream before a block and where it must lead."""
    before = family.residual[dim].format(layer=layer)
    if dim == "heads":
        return before, family.residual["mlp"].format(layer=layer)
    return before, family.residual["heads"].format(layer=following)


@torch.no_grad()
def slow(
    checkpoint: Checkpoint, plan: Plan, sequences: Sequences, upstream: float
) -> dict[str, Tensor]:
    """All new weights, by running both whole models again for each one. One layer is left out:
    the last, whose stream after the MLP no module reads before the final norm."""
    family, dense = families.of(checkpoint), checkpoint.model(torch.float64)
    kept, layers = plan.kept_layers(), plan.before["layers"]
    new: dict[str, Tensor] = {}
    fit_rows = (torch.arange(len(sequences)) % 8 != 7).repeat_interleave(
        sequences.input_ids.shape[1]
    )
    real = sequences.real.flatten()
    hidden = slice(None) if plan.hidden is None else plan.hidden
    for number, layer in enumerate(kept):
        following = [*kept, layers][number + 1]
        for dim in ("heads", "mlp"):
            (template,) = family.readers(dim)
            name, post = template.format(layer=layer), family.post_norm.get(dim)
            student = cut_model(dense, plan, lambda n, kept: new.get(n, kept))
            before, after = streams(family, layer, layers, dim, following)
            if dim == "mlp" and following == layers:
                after = family.final_norm.removesuffix(".weight")
            norms = [post.format(layer=layer)] if post else []
            teacher = Seen(dense, [before, after, *norms], sequences).of
            reader = template.removesuffix(".weight").format(layer=number)
            norm_name = family.residual[dim].format(layer=number)
            pupil = Seen(student, [reader, norm_name], sequences).of
            h = teacher[before][:, hidden]
            target = teacher[after][:, hidden] - h + upstream * (h - pupil[norm_name])
            if post:
                gain = 1 + dense.get_submodule(norms[0]).weight[hidden]  # type: ignore[index]
                scale = teacher[norms[0]].square().mean(-1, keepdim=True).sqrt()
                floor = 1e-6 * gain.square().mean()  # a gain of 0 must not divide
                target = target * gain / (gain.square() + floor) * scale
            module: Any = student.get_submodule(reader)
            x, old = pupil[reader], module.weight
            if module.bias is not None:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
                old = torch.cat([old, module.bias[:, None]], dim=1)
            w = 1 / teacher[before].norm(dim=-1, keepdim=True)
            x, target = x * w, target * w
            fit_mask, rest = fit_rows & real, ~fit_rows & real
            root = float((RIDGE * x[fit_mask].square().sum(0).mean()).sqrt())
            inputs = torch.cat([x[fit_mask], root * torch.eye(x.shape[1], dtype=x.dtype)])
            outputs = torch.cat([target[fit_mask], root * old.T])
            solution = torch.linalg.lstsq(inputs, outputs).solution.T
            errors = [float((x[rest] @ m.T - target[rest]).square().sum()) for m in (solution, old)]
            if errors[0] >= errors[1]:  # what does not serve unseen tokens is not done
                solution = old
            new[name] = solution[:, : module.weight.shape[1]]
            if module.bias is not None:
                new[name.removesuffix("weight") + "bias"] = solution[:, -1]
    return new


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("upstream", [1.0, 0.4])
def test_each_layer_is_solved_for_what_reaches_it(
    tmp_path: Path, text: Path, name: str, after: dict[str, Any], upstream: float
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if name == "llama" else {}
    checkpoint = write_model(tmp_path / "model", name, torch.float64, **biases)
    profile = profiled(tmp_path / "profile", checkpoint, text)
    model = checkpoint.model(torch.float64)
    plan = random_plan(model.config.to_dict(), checkpoint.fingerprint, **after)
    expected = slow(checkpoint, plan, Sequences.load(profile.sequences_path()), upstream)
    got = repaired(checkpoint, profile, plan, tmp_path / "work", ridges=(RIDGE,), upstream=upstream)
    assert set(got.solutions) == {key for key in expected if key.endswith("weight")}
    for key, value in expected.items():
        solved = got(key, torch.empty_like(value))
        torch.testing.assert_close(solved, value, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [{"mlp": 36}, {"layers": [0, 2]}, {"hidden": 36}])
def test_a_repaired_model_is_nearer_to_the_dense_one(
    tmp_path: Path, text: Path, name: str, after: dict[str, Any]
) -> None:
    checkpoint = write_trained(tmp_path / "model", text, name)
    profile = profiled(tmp_path / "profile", checkpoint, text, 64)
    dense = checkpoint.model(torch.float32)
    plan = random_plan(dense.config.to_dict(), checkpoint.fingerprint, **after)
    new = repaired(checkpoint, profile, plan, tmp_path / "work")
    unseen = build_sequences(data_of(text), checkpoint.tokenizer(), "heldout", 20)
    plain = kl_between(dense, cut_model(dense, plan), unseen)
    assert kl_between(dense, cut_model(dense, plan, replace=new), unseen) < 0.97 * plain


def test_one_layer_of_each_model_is_resident(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_model(tmp_path / "model", "llama", torch.float32)
    profile = profiled(tmp_path / "profile", checkpoint, text)
    plan = random_plan(checkpoint.config, checkpoint.fingerprint, mlp=31)
    counts: set[int] = set()
    step = layerwise.LayerByLayer.step

    def counted(self: layerwise.LayerByLayer, *arguments: Any) -> Tensor:
        real = [not next(layer.parameters()).is_meta for layer in self.layers]
        counts.add(sum(real))
        return step(self, *arguments)

    monkeypatch.setattr(layerwise.LayerByLayer, "step", counted)
    repaired(checkpoint, profile, plan, tmp_path / "work")
    assert counts == {1}


def test_it_runs_on_the_tokens_it_is_given(tmp_path: Path, text: Path) -> None:
    checkpoint = write_model(tmp_path / "model", "llama", torch.float64)
    plan = random_plan(checkpoint.config, checkpoint.fingerprint, mlp=31)
    more = profiled(tmp_path / "more", checkpoint, text, 32)
    fewer = profiled(tmp_path / "fewer", checkpoint, text, 16)
    length = more.info["sequence_length"]
    limited = repaired(checkpoint, more, plan, tmp_path / "some", tokens=16 * length)
    same = repaired(checkpoint, fewer, plan, tmp_path / "same")
    other = repaired(checkpoint, more, plan, tmp_path / "all")
    sequences = [Sequences.load(profile.sequences_path()) for profile in (more, fewer)]
    assert torch.equal(sequences[0].input_ids[:16], sequences[1].input_ids)
    assert limited.solutions == same.solutions != other.solutions


def test_a_smaller_vocabulary_changes_nothing_of_it(tmp_path: Path, text: Path) -> None:
    """The profile's text is in the parent's tokens, some of which the cut model has no more."""
    checkpoint = write_model(tmp_path / "model", "llama", torch.float64)
    profile = profiled(tmp_path / "profile", checkpoint, text)
    plan = random_plan(checkpoint.config, checkpoint.fingerprint, mlp=31)
    fewer = plan.model_copy(
        update={"vocab": list(range(200)), "after": {**plan.after, "vocab": 200}}
    )
    small_vocab, same = (
        repaired(checkpoint, profile, one_plan, tmp_path / str(n))
        for n, one_plan in enumerate((fewer, plan))
    )
    assert small_vocab.solutions == same.solutions


def test_what_comes_before_the_first_change_is_left_as_it_is(tmp_path: Path, text: Path) -> None:
    trained = write_trained(tmp_path / "model", text, num_hidden_layers=4).model(torch.bfloat16)
    trained.save_pretrained(str(tmp_path / "model"))  # its streams are rounded to bfloat16
    checkpoint = Checkpoint(tmp_path / "model")
    plan = random_plan(checkpoint.config, checkpoint.fingerprint, layers=[0, 1, 3])
    measured = profiled(tmp_path / "profile", checkpoint, text)
    solver = repaired(checkpoint, measured, plan, tmp_path / "work")
    for name, (ridge, _, _) in solver.solutions.items():
        same = torch.equal(solver(name, checkpoint.tensor(name)), checkpoint.tensor(name))
        untouched = "layers.0." in name or "layers.1.self_attn" in name
        assert (ridge is None) == same == untouched, name
