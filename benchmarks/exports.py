"""llama.cpp on exported files against transformers on the folder: KL for each type.

    python benchmarks/exports.py --texts ../shared/data --work runs/gguf --out benchmarks/results

Exports a model (SmolLM2-135M-Instruct by default) as each type and compares next-token
distributions on the first 2,000 tokens of held-out C4 text, in windows of 500, and a greedy
continuation. The default model lay on a 4-bit grid before it came here: say so beside its Q4 rows,
or give a distilled student by `--model`. A type that is done is not done again: stopped, the same
command goes on. Writes `gguf.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from protocol import DENSE, TESTS

from regrow import DataConfig, ExportConfig, export
from regrow.quantization.formats import GGUF_FORMATS

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0")
HEAD = "| type | MB | bits per weight | KL, nats | worst | same top token | greedy | fell back |\n"


def main() -> None:
    arguments = _arguments()
    source = {"source": str(arguments.texts / TESTS["c4"])}
    fields = {"sources": [source], "sequence_length": 500, "heldout_fraction": 0.5}
    data = DataConfig.model_validate(fields)
    rows = []
    for name in arguments.types:
        config = ExportConfig(type=name, name="model", verify="always", verify_tokens=arguments.n)
        export(arguments.model, arguments.work / name, config, data)
        rows.append(_row(name, json.loads((arguments.work / name / "manifest.json").read_text())))
    text = f"{HEAD}|---|---:|---:|---:|---:|---:|---:|---|\n" + "\n".join(rows) + "\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gguf.md").write_text(text)
    print(text)


def _row(name: str, manifest: dict[str, Any]) -> str:
    measured = {row["name"]: row for row in manifest["figures"]}
    value = {key: row["value"] for key, row in measured.items()}
    greedy = f"{value['greedy_equal']:.0f} of {measured['greedy_equal']['n']}"
    fell = "; ".join(manifest["fallbacks"]) or "–"
    return (
        f"| {name} | {value['file_bytes'] / 1e6:.1f} | {value['bits_per_weight']:.2f} "
        f"| {value['kl']:.2e} | {value['kl_worst']:.1e} | {value['same_top_token']:.1%} "
        f"| {greedy} | {fell} |"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", default=DENSE)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", choices=GGUF_FORMATS, default=list(TYPES))
    parser.add_argument("--n", type=int, default=2000, help="positions")
    return parser.parse_args()


if __name__ == "__main__":
    main()
