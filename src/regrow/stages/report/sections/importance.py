"""Section on the importance of units, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from regrow.profile_folder import SCORES, Profile, scores_for
from regrow.stages.report import charts
from regrow.stages.report.page import Block, Chart, Section
from regrow.stages.report.run_folder import Cut, Run

QUANTILES = 50
MANY = 96
"""Layers with more units than this are shown by quantiles."""
FEW = 20
"""Axes with at most this many units have a tick for each unit."""
POINTS = 400
NAMES = {
    "mlp": "MLP channels",
    "heads": "query heads",
    "kv_heads": "key/value heads",
    "experts": "experts",
}
NOTE = "Scores that the profile measured on calibration text: units with high scores are kept."


def section(runs: list[Run]) -> Section | None:
    """For each profile: block influence as bars, units as heat maps, hidden channels as a curve."""
    blocks: list[Block] = []
    profiles = [(name, profile, run.cuts) for run in runs for name, profile in run.profiles.items()]
    for name, profile, cuts in profiles:
        cut = next((c for c in cuts if c.profile and c.profile.folder == profile.folder), None)
        blocks += _charts(profile, cut, f" ({name})" if len(profiles) > 1 else "")
    return Section("importance", "What matters in the model", NOTE, blocks) if blocks else None


def criteria(profile: Profile) -> dict[str, str]:
    """For each dimension, the first criterion of the profile that scored it."""
    with safe_open(profile.folder / SCORES, framework="pt") as file:
        keys = [key.split("/") for key in file.keys()]  # noqa: SIM118  (no dict: cannot be iterated)
    order = profile.info["criteria"]
    return {dim: criterion for criterion, dim, _ in sorted(keys, key=lambda k: -order.index(k[0]))}


def _charts(profile: Profile, cut: Cut | None, suffix: str) -> list[Block]:
    blocks: list[Block] = []
    scored = criteria(profile)
    for dim in ("layers", *NAMES, "hidden"):
        if dim not in scored:
            continue
        scores = profile.scores(scored[dim], dim)
        criterion = f"{scored[dim]}{suffix}"
        if dim == "layers":
            blocks.append(_layers(scores["all"], cut, criterion))
        elif dim == "hidden":
            blocks.append(_hidden(scores["all"], cut, criterion))
        else:
            blocks.append(_heat(dim, scores, criterion))
    return blocks


def _layers(score_L: Tensor, cut: Cut | None, criterion: str) -> Chart:
    layers = list(range(len(score_L)))
    kept = set(cut.plan.kept_layers()) if cut is not None else set(layers)
    score_L = scores_for(score_L, len(layers) - len(kept))
    colours = [charts.ACCENT if layer in kept else "#c9d0d8" for layer in layers]
    bars = charts.bars(layers, rounded(score_L), colours)
    removed = "; layers in grey were removed" if len(kept) < len(layers) else ""
    y = charts.axis("score", **_scale(score_L))
    figure = charts.figure([bars], charts.axis("layer"), y)
    return Chart(figure, f"Layers, by {criterion}{removed}", 280)


def _hidden(score_d: Tensor, cut: Cut | None, criterion: str) -> Chart:
    ranked = score_d.double().sort(descending=True).values
    at = torch.linspace(0, len(ranked) - 1, min(POINTS, len(ranked))).long()
    line = {**charts.line("hidden", (at + 1).tolist(), rounded(ranked[at])), "mode": "lines"}
    more: dict[str, Any] = {}
    if cut is not None and cut.plan.hidden is not None:
        end = len(cut.plan.hidden) + 0.5
        style = {"color": charts.SOFT, "width": 1.5, "dash": "dash"}
        more["shapes"] = [
            {"type": "line", "x0": end, "x1": end, "yref": "paper", "y0": 0, "y1": 1, "line": style}
        ]
    y = charts.axis("score", **_scale(ranked))
    figure = charts.figure([line], charts.axis("channels, best first"), y, **more)
    ending = "; kept up to the dashed line" if more else ""
    return Chart(figure, f"Channels of the residual stream, by {criterion}{ending}", 280)


def _heat(dim: str, scores: dict[str, Tensor], criterion: str) -> Chart:
    layers = sorted(scores, key=int)
    units = len(scores[layers[0]])
    by_rank = units > MANY
    at = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    rows = [scores[layer].double() for layer in layers]
    if by_rank:
        rows = [row.quantile(at) for row in rows]
    z_LU = torch.stack(rows)
    # Scores span decades and have no natural unit, so they are divided by the model's median.
    z_LU = (z_LU / z_LU.median().clamp_min(1e-30)).clamp_min(1e-6).log10()
    x = [round(100 * q) for q in at.tolist()] if by_rank else list(range(units))
    heat = charts.heat(x, [int(layer) for layer in layers], [rounded(row) for row in z_LU])
    heat["hovertemplate"] = "layer %{y}, %{x}: %{z:.2f}<extra></extra>"
    heat["colorbar"]["title"] = {"text": "log10", "font": {"size": 11}}
    title = "percentile of the layer's units, least important left" if by_rank else "unit"
    x_axis = charts.axis(title, **({"dtick": 1} if units <= FEW else {}))
    y = charts.axis("layer", autorange="reversed")
    height = max(220, 10 * len(layers) + 90)
    name = NAMES[dim][0].upper() + NAMES[dim][1:]
    caption = f"{name}, by {criterion}: log10 of the score over the model's median"
    return Chart(charts.figure([heat], x_axis, y), caption, height)


def _scale(values: Tensor) -> dict[str, Any]:
    positive = values[values > 0]
    wide = len(positive) == len(values) and float(values.max()) > 30 * float(values.min())
    return {"type": "log", "dtick": "D2"} if wide else {"rangemode": "tozero"}


def rounded(values: Tensor) -> list[float]:
    """Round to four significant digits to keep the page small; NaN and infinity become 0."""
    return [float(f"{v:.4g}") if math.isfinite(v) else 0.0 for v in values.tolist()]
