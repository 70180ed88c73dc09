"""What zeros cost and what they buy: SmolLM2-135M-Instruct, sparse by three methods.

    python benchmarks/sparsity.py --texts ../shared/data --out runs/sparsity --tokens 30000
    python benchmarks/sparsity.py --texts ../shared/data --out runs/sparsity --only speed

Resumable: run it again and it goes on. Each model is calibrated on `--samples` sequences of 512
tokens of the blend of protocol P1 (protocol.py), an eighth of them held out. With `--tokens N` the
models named by `--train` are then distilled towards the dense model on N tokens of that blend, with
their zeros kept. Perplexity ÷ that of the dense model, on the first `--text-tokens` tokens of
WikiText-2 raw test and of the C4 sample, on which nothing was calibrated or trained. The KL is to
the dense model, on the held-out eighth. `speed` times matrix products on this machine: dense, with
zeros, and in torch's compressed rows (lower quartile of ten rounds). Writes `sparsity.md`,
`sparsity.svg` and `sparsity_speed.md` into `--out`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import DENSE, TESTS, blend, figures
from torch import Tensor

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    Options,
    SparsifyConfig,
    distill,
    evaluate,
    sparsify,
    stage_dir,
)
from regrow.sparsity.pattern import Sparsity
from regrow.stages.sparsify.methods.magnitude import sparsify as by_magnitude

TEXTS = ("wikitext2", "c4")
TARGETS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "70 %": {"sparsity": 0.7},
    "90 %": {"sparsity": 0.9},
}
METHODS = ("magnitude", "sparsegpt", "wanda")
TRAINED = ("sparsegpt 50 %", "sparsegpt 2:4", "sparsegpt 70 %")
OPTIONS = Options(batch_size=4)
Row = tuple[str, dict[str, float], dict[str, float]]
"""A model, what evaluate measured, and the figures of the stage that made it."""
SHAPES = ((1536, 576), (576, 1536), (4096, 4096))
"""Rows and columns: the MLP of SmolLM2-135M, and a matrix of a model of about 7 B parameters."""


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    parts = {"quality": quality, "speed": speed}
    for name, part in parts.items():
        if arguments.only in (None, name):
            part(arguments)


def quality(arguments: argparse.Namespace) -> None:
    """Perplexity, KL and bytes of every model, before and after training; rewritten for each."""
    dense = _perplexities("dense", DENSE, arguments)
    rows: list[Row] = [("dense", dense, {})]
    for name, folder in _models(arguments):
        found = {f["name"]: f["value"] for f in (stage_dir.read(folder) or {})["figures"]}
        rows.append((name, _perplexities(name, folder, arguments), found))
        (arguments.out / "sparsity.md").write_text(_table(rows))
        (arguments.out / "sparsity.svg").write_text(_picture(rows))


def _models(arguments: argparse.Namespace) -> Any:
    """Name and folder of each model, the trained ones of a sparsity after the others."""
    data = blend(arguments.texts)
    for target, fields in TARGETS.items():
        for method in METHODS:
            name = f"{method} {target}"
            config = SparsifyConfig(method=method, samples=arguments.samples, **fields)
            folder = arguments.out / _file(name)
            yield name, sparsify(DENSE, folder, config, data, OPTIONS)
        for name in arguments.train if arguments.tokens else ():
            if name.endswith(f" {target}"):
                yield f"{name} + {arguments.tokens:,} tokens", _trained(name, data, arguments)


def _trained(name: str, data: DataConfig, arguments: argparse.Namespace) -> Path:
    """A sparse model after distillation with its zeros kept."""
    config = DistillConfig(
        tokens=arguments.tokens,
        learning_rate=arguments.learning_rate,
        eval_tokens=arguments.tokens,
        heldout_sequences=8,
    )
    out = arguments.out / f"{_file(name)}-trained"
    return distill(arguments.out / _file(name), DENSE, data, out, config, OPTIONS)


def _perplexities(name: str, model: Path | str, arguments: argparse.Namespace) -> dict[str, float]:
    config = EvaluateConfig(
        metrics=("size", "perplexity"),
        texts={text: str(arguments.texts / TESTS[text]) for text in TEXTS},
        text_tokens=arguments.text_tokens,
    )
    place = arguments.out / "evaluations" / _file(name)
    return figures(evaluate({name: model}, place, None, None, config, OPTIONS))[name]


def _table(rows: list[Row]) -> str:
    dense = rows[0][1]
    lines = [
        "| model | WikiText-2 ppl | × dense | C4 ppl | × dense | KL | MB | MB as bitmask |",
        "|---|" + "---:|" * 7,
    ]
    for name, measured, found in rows:
        cells = [name]
        for text in TEXTS:
            value = measured[f"perplexity/{text}"]
            cells += [f"{value:,.2f}", f"{value / dense[f'perplexity/{text}']:,.3f}"]
        kl, packed = found.get("kl"), found.get("bytes as bitmask")
        cells += ["–" if kl is None else f"{kl:.3f}", f"{measured['bytes'] / 1e6:.1f}"]
        cells.append("–" if packed is None else f"{packed / 1e6:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(rows: list[Row]) -> str:
    """Bars of WikiText-2 perplexity ÷ dense, on a logarithmic scale, as SVG."""
    text = f"perplexity/{TEXTS[0]}"
    ratios = {name: measured[text] / rows[0][1][text] for name, measured, _ in rows[1:]}
    scale = 420 / math.log10(max(10.0, *ratios.values()))
    colours = {"magnitude": "#b0b0b0", "wanda": "#7aa6d8", "sparsegpt": "#1f5fa8"}
    height = 24 * len(ratios) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<text x="10" y="16">WikiText-2 perplexity ÷ dense (bars on a logarithmic scale)</text>',
    ]
    for number, (name, ratio) in enumerate(ratios.items()):
        top, width = 26 + 24 * number, max(1.0, scale * math.log10(ratio))
        colour = colours[name.split()[0]]
        parts += [
            f'<text x="210" y="{top + 13}" text-anchor="end">{name}</text>',
            f'<rect x="218" y="{top}" width="{width:.0f}" height="18" fill="{colour}"/>',
            f'<text x="{224 + width:.0f}" y="{top + 13}">{ratio:,.3g} ×</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def speed(arguments: argparse.Namespace) -> None:
    """Milliseconds of y = x Wᵀ for 1 and 128 tokens."""
    torch.set_num_threads(arguments.threads)
    lines = [
        "| matrix | tokens | zeros | dense bf16 | zeros in bf16 | dense f32 | zeros in f32 | "
        "compressed rows f32 |",
        "|---|" + "---:|" * 7,
    ]
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        for tokens in (1, 128):
            for share in (0.5, 0.7, 0.9):
                cells = _times(weight, by_magnitude(weight, Sparsity(share)), tokens)
                head = [f"{rows} × {columns}", str(tokens), f"{share:.0%}"]
                lines.append("| " + " | ".join([*head, *(f"{ms:.3f}" for ms in cells)]) + " |")
    (arguments.out / "sparsity_speed.md").write_text("\n".join(lines) + "\n")
    print((arguments.out / "sparsity_speed.md").read_text())


def _times(weight: Tensor, sparse: Tensor, tokens: int) -> list[float]:
    x = torch.randn(tokens, weight.shape[1])
    x_t, half = x.T.contiguous(), x.bfloat16()
    compressed = sparse.to_sparse_csr()
    error = (compressed @ x_t - sparse @ x_t).abs().max()
    assert error < 1e-2, "the same product"
    dense_half, zeros_half = weight.bfloat16(), sparse.bfloat16()
    ways: list[Callable[[], Tensor]] = [
        lambda: torch.nn.functional.linear(half, dense_half),
        lambda: torch.nn.functional.linear(half, zeros_half),
        lambda: torch.nn.functional.linear(x, weight),
        lambda: torch.nn.functional.linear(x, sparse),
        lambda: compressed @ x_t,
    ]
    times: list[list[float]] = [[] for _ in ways]
    repeats = 10 if tokens == 1 else 1
    for _ in range(10):  # in turn, so that other work on the machine disturbs all of them alike
        for way, found in zip(ways, times, strict=True):
            way()
            start = time.perf_counter()
            for _ in range(repeats):
                way()
            found.append((time.perf_counter() - start) / repeats * 1e3)
    return [statistics.quantiles(found, n=4)[0] for found in times]


def _file(name: str) -> str:
    return name.replace(" %", "").replace(" ", "-").replace(":", "of")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--only", choices=("quality", "speed"), help="one part of it")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 512")
    parser.add_argument("--tokens", type=int, default=0, help="training tokens of each")
    parser.add_argument("--train", nargs="*", default=list(TRAINED), help="models to train")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--text-tokens", type=int, default=8192, help="test tokens of each text")
    parser.add_argument("--threads", type=int, default=1, help="for speed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
