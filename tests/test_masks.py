"""Hard-concrete masks and their Lagrangian, by hand in float64, and a masked model as a cut one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import NAMES, float64_norms, logits, random_plan, tiny_model
from torch import Tensor

from regrow import families
from regrow.plan import Plan
from regrow.pruning.cut import cut_model
from regrow.training import masks as m

LOG_ALPHAS = torch.tensor([-6.0, -1.5, -0.2, 0.0, 0.7, 2.0, 5.0], dtype=torch.float64)


def slow_mask(log_alpha: float, u: float) -> float:
    """The paper's formulas (10) and (11) for one number."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, s * (1.1 - -0.1) + -0.1))


def test_drawn_masks() -> None:
    u = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [slow_mask(float(a), float(x)) for a, x in zip(LOG_ALPHAS, u, strict=True)]
    assert m.sampled(LOG_ALPHAS, u).tolist() == pytest.approx(expected, abs=1e-12)
    middle = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in LOG_ALPHAS.tolist()]
    assert m.certain(LOG_ALPHAS).tolist() == pytest.approx(middle, abs=1e-12)


def test_the_expected_l0_norm() -> None:
    """Against the share of a fine grid of u for which the mask is above 0."""
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for log_alpha, share in zip(LOG_ALPHAS, m.open_share(LOG_ALPHAS), strict=True):
        drawn = m.sampled(log_alpha.expand_as(grid), grid)
        assert float(share) == pytest.approx(float((drawn > 0).double().mean()), abs=1e-5)


def masks_of(after: dict[str, int], **fields: Any) -> m.Masks:
    model = tiny_model("llama", **fields)
    config = model.config.to_dict()
    masks = m.Masks(families.of_config(config), config, after).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for log_alpha in masks.log_alphas.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=draw, dtype=torch.float64))
    return masks


AFTER = {"layers": 2, "hidden": 24, "mlp": 14, "kv_heads": 1, "heads": 2}


def slow_lagrangian(masks: m.Masks, progress: float) -> float:
    """One term for each layer and dimension; query heads have one for each KV head."""
    total, number = 0.0, 0
    shares = {"layers": 2 / 3, "hidden": 1 / 2, "mlp": 1 / 4, "kv_heads": 1 / 2, "heads": 2 / 3}
    for key, log_alpha in masks.log_alphas.items():
        dim = key.split("/")[0]
        values = log_alpha.tolist()
        for group in [values[:3], values[3:]] if dim == "heads" else [values]:
            each = [1 / (1 + math.exp(-(a - 2 / 3 * math.log(0.1 / 1.1)))) for a in group]
            gap = sum(each) / len(each) - (1 - min(1.0, progress) * (1 - shares[dim]))
            total += float(masks.linear_J[number]) * gap
            total += float(masks.quadratic_J[number]) * gap**2
            number += 1
    assert number == len(masks.linear_J) == 1 + 1 + 3 * (1 + 1 + 2)
    return total


@pytest.mark.parametrize("progress", [0.3, 2.0])
def test_the_lagrangian_and_its_gradients(progress: float) -> None:
    masks = masks_of(AFTER)
    draw = torch.Generator().manual_seed(2)
    masks.linear_J += torch.randn(14, generator=draw, dtype=torch.float64)
    masks.quadratic_J += torch.rand(14, generator=draw, dtype=torch.float64)
    loss = masks.loss(progress)
    assert loss.item() == pytest.approx(slow_lagrangian(masks, progress), abs=1e-12)
    loss.backward()
    for key, unit in (("hidden/all", 5), ("mlp/1", 2), ("heads/2", 4), ("layers/all", 0)):
        gradient = masks.log_alphas[key].grad
        assert gradient is not None
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                masks.log_alphas[key][unit] += sign * 1e-5
                values.append(slow_lagrangian(masks, progress))
                masks.log_alphas[key][unit] -= sign * 1e-5
        slope = (values[0] - values[1]) / 2e-5
        assert float(gradient[unit]) == pytest.approx(slope, abs=1e-9)
    before = (masks.linear_J.clone(), masks.quadratic_J.clone())
    gaps = [0.0] * 14
    for number in range(14):  # the slopes of the Lagrangian in λ and in φ
        for name in ("linear_J", "quadratic_J"):
            buffer: Tensor = getattr(masks, name)
            values = []
            for sign in (1, -1):
                buffer[number] += sign * 1e-4
                values.append(slow_lagrangian(masks, progress))
                buffer[number] -= sign * 1e-4
            slope = (values[0] - values[1]) / 2e-4
            if name == "linear_J":
                gaps[number] = slope
            else:
                assert slope == pytest.approx(gaps[number] ** 2, abs=1e-8)
    masks.ascend(0.5, progress)
    assert (masks.linear_J - before[0]).tolist() == pytest.approx([g / 2 for g in gaps], abs=1e-8)
    squares = [g * g / 2 for g in gaps]
    assert (masks.quadratic_J - before[1]).tolist() == pytest.approx(squares, abs=1e-8)


def opened(plan: Plan, masks: m.Masks) -> dict[str, Tensor]:
    """Masks of 0 and 1 that keep what the plan keeps."""
    values = {}
    for key, log_alpha in masks.log_alphas.items():
        dim, layer = key.split("/")
        kept = vars(plan)[dim] if layer == "all" else vars(plan)[dim].get(int(layer), [])
        values[key] = torch.zeros_like(log_alpha.detach())
        values[key][kept] = 1
    return values


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_masks_of_0_and_1_is_the_cut_model(name: str) -> None:
    model = float64_norms(tiny_model(name))
    config = model.config.to_dict()
    family = families.get(name)
    sizes: dict[str, Any] = {"layers": [0, 2], "hidden": 24, "heads": 2, "kv_heads": 1}
    if "mlp" in family.observe:
        sizes["mlp"] = 16
    plan = random_plan(config, **sizes)
    masks = m.Masks(family, config, {dim: plan.after[dim] for dim in sizes}).double()
    assert {key.split("/")[0] for key in masks.log_alphas} == set(sizes)
    masks.set(opened(plan, masks))
    student, dense = float64_norms(cut_model(model, plan)), logits(model)
    with m.masked(model, masks):
        torch.testing.assert_close(logits(model), logits(student), rtol=1e-9, atol=1e-9)
        masks.set({key: torch.ones_like(value) for key, value in masks.values.items()})
        torch.testing.assert_close(logits(model), dense, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits(model), dense)  # nothing stays behind


def test_every_mask_gets_the_gradient_of_the_loss() -> None:
    """By finite differences of the model's own logits, at masks between 0 and 1."""
    model: Any = float64_norms(tiny_model("llama"))
    config = model.config.to_dict()
    masks = m.Masks(families.get("llama"), config, AFTER).double()
    draw = torch.Generator().manual_seed(3)
    values = {
        key: (0.2 + 0.6 * torch.rand(a.shape, generator=draw, dtype=torch.float64)).requires_grad_()
        for key, a in masks.log_alphas.items()
    }
    ids = torch.randint(0, 384, (1, 12), generator=draw)

    def loss() -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :, 7].sum()
        return result

    masks.set(values)
    with m.masked(model, masks):
        loss().backward()
        for key, value in values.items():
            gradient = value.grad
            assert gradient is not None, key
            unit = int(gradient.abs().argmax())
            assert float(gradient[unit]) != 0, key
            found = []
            for sign in (1, -1):
                with torch.no_grad():
                    value[unit] += sign * 1e-6
                    found.append(float(loss()))
                    value[unit] -= sign * 1e-6
            slope = (found[0] - found[1]) / 2e-6
            assert float(gradient[unit]) == pytest.approx(slope, rel=1e-5), key


def test_the_chosen_masks_keep_the_best_of_each_group() -> None:
    masks = masks_of(AFTER)
    chosen = masks.chosen()
    assert int(chosen["mlp/0"].sum()) == 14
    log_alpha = masks.log_alphas["mlp/0"].detach()
    assert float(log_alpha[chosen["mlp/0"] == 1].min()) > float(
        log_alpha[chosen["mlp/0"] == 0].max()
    )
    assert chosen["heads/1"].view(2, 3).sum(1).tolist() == [2, 2]
