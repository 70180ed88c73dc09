"""The norms of a tiny model: which are RMSNorms, and what they add to their weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regrow.families._derive.axes import Found
from regrow.families._derive.table import Facts
from regrow.families._derive.tiny import template_of


@torch.no_grad()
def find_norms(model: Any, found: Found, config: dict[str, Any]) -> Facts:
    """The RMSNorms over hidden or over all heads, and the config key of their epsilon.

    Refuses `hidden` if a norm over it is no RMSNorm.
    """
    facts, names, offsets = Facts(), set(), set()
    for name, parameter in model.named_parameters():
        template = template_of(name)[0]
        layouts = found.layouts[template]
        if parameter.dim() != 1 or template in names or not layouts[0]:
            continue
        (dims, usual), *_ = layouts[0]
        if not name.endswith("weight") or len(dims) > 1 or not usual:
            continue
        if dims[0] not in ("hidden", "heads", "kv_heads", "mlp"):
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        offset = _offset_of(module, parameter)
        if offset is None:
            found.refused.setdefault(
                dims[0], f"{template.removesuffix('.weight')} is no RMSNorm: a cut would change "
                "its output, as it also uses the channels that are dropped"
            )  # fmt: skip
            continue
        names.add(template)
        offsets.add(offset)
        if dims[0] == "hidden":
            facts = replace(facts, eps=_eps_key(module, config) or facts.eps)
            if ".layers." not in template:
                facts = replace(facts, final_norm=template)
    if len(offsets) > 1:
        found.refused["hidden"] = "some of its norms add 1 to their weights and others do not"
    return replace(facts, norms=frozenset(names), norm_offset=max(offsets, default=0.0))


def _offset_of(module: nn.Module, weight: Tensor) -> float | None:
    """What an RMSNorm adds to its weight; None for a module that is no RMSNorm."""
    x = torch.randn(5, weight.numel(), generator=torch.Generator().manual_seed(3)) * 10
    x = x + 4
    try:
        out = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes other inputs
        return None
    if not isinstance(out, Tensor) or out.shape != x.shape:
        return None
    plain = x / x.square().mean(-1, keepdim=True).sqrt()
    for offset in (0.0, 1.0):
        if torch.allclose(out, plain * (weight + offset), rtol=1e-3, atol=1e-3):
            return offset
    return None


def _eps_key(module: nn.Module, config: dict[str, Any]) -> str | None:
    """The config key of a norm's epsilon: the one with its value."""
    names = vars(module)
    eps = next((names[n] for n in ("eps", "variance_epsilon") if n in names), None)
    keys = [k for k, v in config.items() if k.endswith(("eps", "epsilon")) and v == eps]
    return next(iter(sorted(keys, key=lambda key: key != "rms_norm_eps")), None)
