"""Draws the pictures of docs/concepts.md from measurements.

    python benchmarks/concepts.py --out docs            # draws, from benchmarks/results
    python benchmarks/concepts.py --out docs --measure  # first asks the teacher once more

`--measure` runs SmolLM2-135M-Instruct once on one sentence, and stores its most likely next tokens
in `results/next_token.json`. The other pictures are drawn from tables that other benchmarks wrote.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from pictures import bar_chart

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).with_name("README.md")
SENTENCE = "To bake a cake you need flour, sugar, butter and"
KEPT = 20
SHOWN = 8
TEMPERATURES = (1.0, 2.0, 4.0)


def main() -> None:
    arguments = _arguments()
    if arguments.measure:
        (RESULTS / "next_token.json").write_text(json.dumps(measure(SENTENCE)) + "\n")
    drawn = {
        "dark-knowledge.svg": dark_knowledge(json.loads((RESULTS / "next_token.json").read_text())),
        "width-depth.svg": width_or_depth(PAGE.read_text()),
        "prune-or-bits.svg": prune_or_bits((RESULTS / "pipeline.md").read_text()),
    }
    for name, picture in drawn.items():
        (arguments.out / name).write_text(picture)


def measure(sentence: str) -> dict[str, object]:
    """The teacher's `KEPT` most likely next tokens with their logits, and log Σ exp of all logits.

    `log_sum` has log Σ_v exp(z_v / T) over the whole vocabulary for each temperature T.
    """
    import torch
    from protocol import DENSE

    from regrow import load

    checkpoint = load(DENSE)
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits_V = checkpoint.model(torch.float32)(ids).logits[0, -1].double()
    values, tokens = logits_V.topk(KEPT)
    return {
        "sentence": sentence,
        "tokens": [tokenizer.decode([token]) for token in tokens[:SHOWN].tolist()],
        "logits": [round(value, 4) for value in values.tolist()],
        "log_sum": {str(t): float((logits_V / t).logsumexp(0)) for t in TEMPERATURES},
    }


def probabilities(found: dict[str, object], temperature: float) -> list[float]:
    """exp(z / T) / Σ exp(z / T) of the kept tokens; the sum is over the whole vocabulary."""
    logits, sums = found["logits"], found["log_sum"]
    assert isinstance(logits, list)
    assert isinstance(sums, dict)
    return [math.exp(z / temperature - sums[str(temperature)]) for z in logits]


def dark_knowledge(found: dict[str, object]) -> str:
    """Bars of the most likely next tokens at several temperatures, as shares of the first one."""
    tokens = found["tokens"]
    assert isinstance(tokens, list)
    bars = {}
    for temperature in TEMPERATURES:
        chances = probabilities(found, temperature)
        bars[f"T = {temperature:g}"] = [100 * each / chances[0] for each in chances[:SHOWN]]
    title = f"Next token after “{found['sentence']} …”, % of the most likely one"
    return bar_chart(title, [f"“{token.strip()}”" for token in tokens], bars)


def width_or_depth(page: str) -> str:
    """Bars of the perplexity of a narrower and a shallower student on three texts."""
    shown = {
        "narrower MLP": "mlp 1024, distilled",
        "fewer layers": "23 layers, distilled",
        "some of both": "27 layers, mlp 1184, distilled",
    }
    bars = {name: _cells(page, row)[1::2][:3] for name, row in shown.items()}
    title = "Perplexity ÷ teacher's, after 250 k tokens of distillation"
    return bar_chart(title, ["encyclopaedia", "stories", "web text"], bars)


def prune_or_bits(page: str) -> str:
    """Bars of WikiText-2 perplexity: the whole model in fewer and fewer bits, and a pruned one."""
    shown = {
        "teacher F16": "16 bits",
        "teacher Q4_K_M": "Q4_K_M",
        "teacher Q4_0, nearest in bytes": "Q4_0",
        "student Q4_K_M": "pruned, Q4_K_M",
    }
    rows = {name: _cells(page, row) for row, name in shown.items()}
    groups = [f"{name}, {cells[1]:.0f} MB" for name, cells in rows.items()]
    return bar_chart(
        "WikiText-2 perplexity", groups, {"perplexity": [cells[3] for cells in rows.values()]}
    )


def _cells(page: str, row: str) -> list[float]:
    """The cells of a table's row as numbers; a cell without one is NaN."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
    return [_number(cell) for cell in line.strip("|").split("|")]


def _number(cell: str) -> float:
    try:
        return float(cell.split("±")[0])
    except ValueError:
        return math.nan


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--measure", action="store_true", help="run the teacher again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
