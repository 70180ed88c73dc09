"""The report's choice of shape: every candidate in a table, KL over what it costs, the front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import random_plan, tiny_config

from regrow.stages.report.charts import front
from regrow.stages.report.page import Chart, Details, Table
from regrow.stages.report.run_folder import Cut, Run
from regrow.stages.report.sections.candidates import section


def row(n: int, **fields: Any) -> dict[str, Any]:
    """Shape n of growing size and falling KL."""
    return {
        "name": f"shape {n}",
        "sizes": {"mlp": 10 + n},
        "parameters": 1_000_000 + 1000 * n,
        "keep": 0.7 + n / 1000,
        "format": "q4_0",
        "bytes": 600_000 + 500 * n,
        "ram": 900_000,
        "kl": 2.0 - n / 100,
        "round": 1,
        "chosen": False,
        **fields,
    }


def rows_of(count: int) -> list[dict[str, Any]]:
    """The last four reached the last round and were timed; the last is chosen."""
    rows = [row(n) for n in range(count)]
    for n, candidate in enumerate(rows[-4:]):
        candidate |= {"round": 3, "prefill_ms": 30.0 - n, "decode_ms": 3.0 + n}
    rows[-1]["chosen"] = True
    return rows


def tiny_sequences(rows: list[dict[str, Any]]) -> list[Any]:
    plan = random_plan(tiny_config("llama").to_dict(), mlp=20)
    made_section = section([Run(Path("."), cuts=[Cut("02-prune", plan, rows, None)])])
    assert made_section is not None
    return made_section.blocks


def test_the_pareto_front_equals_a_hand_made_one() -> None:
    assert front([(3, 1), (1, 3), (2, 2), (2.5, 2.5), (4, 1), (1, 4)]) == [(1, 3), (2, 2), (3, 1)]
    assert front([]) == []


def test_every_candidate_is_in_a_table() -> None:
    blocks = tiny_sequences(rows_of(30))
    table, rest, *_ = blocks
    assert isinstance(table, Table) and isinstance(rest, Details)
    assert len(table.rows) == 20 and table.marked == {0}
    assert table.head == [
        "02-prune", "parameters", "kept", "size", "RAM", "prefill", "decode", "KL, nats",
    ]  # fmt: skip
    assert [cell.text for cell in table.rows[0]] == [
        "shape 29 (chosen)", "1.0 M", "72.9%", "0.6 MB q4_0", "0.9 MB", "27 ms",
        "6 ms", "1.710",
    ]  # fmt: skip
    assert table.rows[0][0].small == "mlp 56 → 39"
    shown = {cells[0].text.removesuffix(" (chosen)") for cells in table.rows}
    folded = rest.text.splitlines()[1:]
    assert len(shown) == 20 and len(folded) == 10
    assert all(f"mlp 56 → {10 + n} ·" in rest.text for n in range(10))
    assert rest.summary == "the other 10 shapes"


def test_kl_is_drawn_over_each_cost_with_its_front() -> None:
    charts = [block for block in tiny_sequences(rows_of(30)) if isinstance(block, Chart)]
    titles = [chart.figure["layout"]["xaxis"]["title"]["text"] for chart in charts]
    assert titles == [
        "parameters kept, %", "size, MB", "prefill of the prompt, ms", "decode, ms per token",
    ]  # fmt: skip
    line, earlier, last, chosen = charts[0].figure["data"]
    assert [len(earlier["x"]), len(last["x"]), len(chosen["x"])] == [26, 3, 1]
    assert chosen["x"] == [pytest.approx(72.9)] and chosen["y"] == [pytest.approx(1.71)]
    assert line["name"] == "Pareto front"
    assert line["x"] == pytest.approx([72.6, 72.7, 72.8, 72.9])  # of the last round only
    assert "mlp 39" in chosen["customdata"][0][0]
    # prefill falls as the KL does: one shape is best in both
    assert charts[2].figure["data"][0]["x"] == [27.0]


def test_distilled_shapes_are_ranked_by_their_longest_distillation() -> None:
    rows = rows_of(4)
    distilled = [{"10": 0.9}, {"10": 0.5, "20": 0.4}, {"10": 0.6, "20": 0.3}]
    for candidate, kls in zip(rows[:3], distilled, strict=True):
        candidate["distilled"] = kls
    rows[3]["chosen"], rows[2]["chosen"] = False, True
    rows[0]["kl"] = None
    table = tiny_sequences(rows)[0]
    assert table.head[-2:] == ["KL, 10 tokens", "KL, 20 tokens"]
    assert [cells[0].text for cells in table.rows] == [
        "shape 2 (chosen)", "shape 1", "shape 0", "shape 3",
    ]  # fmt: skip
    assert [cell.text for cell in table.rows[2][-3:]] == ["", "0.900", ""]


def test_bytes_proportional_to_parameters_are_not_drawn() -> None:
    rows = [{**candidate, "format": "bf16"} for candidate in rows_of(4)]
    charts = [block for block in tiny_sequences(rows) if isinstance(block, Chart)]
    assert len(charts) == 3
