"""What zeros cost and what they buy: SmolLM2-135M-Instruct, sparse by three methods.

    python benchmarks/sparsity.py --texts ../shared/data --out runs/sparsity --samples 16
    python benchmarks/sparsity.py --texts ../shared/data --out runs/sparsity --samples 16 \\
        --rows "sparsegpt 50 %" "sparsegpt 50 % trained"
    python benchmarks/sparsity.py --texts ../shared/data --out runs/sparsity --only speed

`--list` prints the rows and which of them are complete. Resumable: the same command goes on where
it was stopped, a training from its last checkpoint (every 10,000 tokens). `--rows` measures only
those rows, and the tables and pictures have all rows that are complete in `--out`.

Each model is calibrated on `--samples` sequences of 512 tokens of the blend of protocol P1
(protocol.py). A row "trained" is the model of its name after distillation towards the dense model
on `--tokens` tokens of that blend, with its zeros kept; all are taught from one cache of the dense
model's exact hidden states. Perplexity ÷ that of the dense model and
KL(dense ‖ model), on the first `--text-tokens` tokens of WikiText-2 raw test and of the C4 sample,
on which nothing was calibrated or trained. `speed` times matrix products on this machine: dense,
with zeros, and in torch's compressed rows (lower quartile of ten rounds). Writes `sparsity.md`,
`sparsity_speed.md`, `sparsity.svg`, `sparsity_bytes.svg` and `sparsity_speed.svg` into `--out`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pictures import Line, line_chart
from protocol import DENSE, Figures, blend, figures, measure
from torch import Tensor

from regrow import (
    CacheConfig,
    DistillConfig,
    Options,
    SparsifyConfig,
    cache,
    distill,
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
METHODS = ("magnitude", "wanda", "sparsegpt")
PICTURED = {"50 %": 50, "70 %": 70, "90 %": 90}
SHAPES = ((1536, 576), (576, 1536), (4096, 4096))
"""Rows and columns: the MLP of SmolLM2-135M, and a matrix of a model of about 7 B parameters."""


class Row(NamedTuple):
    """One line of the table: the dense model if it has no method."""

    method: str = ""
    target: str = ""
    trained: bool = False

    @property
    def name(self) -> str:
        """Its name in the table, and for `--rows`."""
        return f"{self.method} {self.target}{' trained' * self.trained}" if self.method else "dense"

    @property
    def file(self) -> str:
        """Its name as a folder."""
        return self.name.replace(" %", "").replace(" ", "-").replace(":", "of")


ROWS = [
    Row(),
    *(Row(method, target) for target in TARGETS for method in METHODS),
    *(Row(method, target, True) for target in TARGETS for method in METHODS),
]


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.list:
        for row in ROWS:
            print(f"{row.name:24}{'complete' if _evaluation(row, arguments).exists() else ''}")
        return
    if arguments.only in (None, "quality"):
        quality(arguments)
    if arguments.only in (None, "speed"):
        speed(arguments)


def quality(arguments: argparse.Namespace) -> None:
    """Perplexity, KL and bytes of each chosen row; tables and pictures are rewritten for each."""
    for row in ROWS:
        if row.method and arguments.rows and row.name not in arguments.rows:
            continue
        model = _model(row, arguments)
        place = _evaluation(row, arguments).parent
        measure({row.name: model}, place, arguments.texts, TEXTS, arguments.text_tokens)
        _write_results(arguments)
    print((arguments.out / "sparsity.md").read_text())


def _write_results(arguments: argparse.Namespace) -> None:
    found: Figures = {}
    for row in ROWS:
        if _evaluation(row, arguments).exists():
            found[row.name] = figures(_evaluation(row, arguments).parent)[row.name]
    packed = {row.name: _packed_bytes(row, arguments) for row in ROWS}
    (arguments.out / "sparsity.md").write_text(_table(found, packed))
    (arguments.out / "sparsity.svg").write_text(_picture(found))
    (arguments.out / "sparsity_bytes.svg").write_text(_bytes_picture(found, packed))


def _evaluation(row: Row, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out) / "evaluations" / row.file / "evaluation.json"


def _model(row: Row, arguments: argparse.Namespace) -> Path | str:
    """The folder of a row's model; a trained one also needs its sparse model."""
    if not row.method:
        return DENSE
    data, options = blend(arguments.texts), Options(batch_size=4)
    config = SparsifyConfig(method=row.method, samples=arguments.samples, **TARGETS[row.target])
    sparse = row._replace(trained=False)
    start = sparsify(DENSE, arguments.out / sparse.file, config, data, options)
    if not row.trained:
        return start
    exact = CacheConfig(tokens=arguments.tokens, format="hidden")
    training = DistillConfig(
        cache=str(cache(DENSE, data, arguments.out / "cache", exact, options)),
        tokens=arguments.tokens,
        learning_rate=arguments.learning_rate,
        eval_tokens=10_000,
        heldout_sequences=8,
    )
    out = distill(start, DENSE, data, arguments.out / row.file, training, options)
    shutil.rmtree(out / "trainer", ignore_errors=True)  # its checkpoints take 3 GB for each row
    return out


def _packed_bytes(row: Row, arguments: argparse.Namespace) -> float | None:
    """Bytes as a bitmask; training keeps the zeros, and with them this number."""
    manifest = stage_dir.read(arguments.out / row._replace(trained=False).file) or {}
    values = {figure["name"]: figure["value"] for figure in manifest.get("figures", [])}
    return values.get("bytes as bitmask")


def _table(found: Figures, packed: dict[str, float | None]) -> str:
    lines = [
        "| model | WikiText-2 ppl | × dense | C4 ppl | × dense | KL WikiText-2 | KL C4 | MB "
        "| MB as bitmask |",
        "|---|" + "---:|" * 8,
    ]
    for name, measured in found.items():
        cells = [name]
        for text in TEXTS:
            value = measured[f"perplexity/{text}"]
            ratio = value / found["dense"][f"perplexity/{text}"]
            cells += [f"{value:,.2f}", f"{ratio:,.3f}"]
        cells += [f"{measured.get(f'kl/{text}', 0.0):.3f}" for text in TEXTS]
        small = packed[name]
        cells += [f"{measured['bytes'] / 1e6:.1f}", "–" if small is None else f"{small / 1e6:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(found: Figures) -> str:
    """WikiText-2 perplexity ÷ dense against the share of zeros, before and after training."""
    text = f"perplexity/{TEXTS[0]}"
    lines = []
    for trained in (False, True):
        for number, method in enumerate(reversed(METHODS)):
            names = {x: Row(method, target, trained).name for target, x in PICTURED.items()}
            points = [
                (float(x), found[name][text] / found["dense"][text])
                for x, name in names.items()
                if name in found
            ]
            label = f"{method}{', trained' if trained else ''}"
            lines.append(Line(label, points, colour=number, dashed=not trained))
    if not any(line.points for line in lines):
        return ""
    title = "WikiText-2 perplexity ÷ dense (logarithmic; cut off at 10,000)"
    return line_chart(title, "zeros in the layers' matrices, %", lines, log=True, limit=1e4)


def _bytes_picture(found: Figures, packed: dict[str, float | None]) -> str:
    """Megabytes of the folder and of the bitmask against the share of zeros."""
    sizes = {x: packed[Row("magnitude", target).name] for target, x in PICTURED.items()}
    dense = found["dense"]["bytes"] / 1e6
    as_bitmask = [(float(x), size / 1e6) for x, size in sizes.items() if size is not None]
    lines = [
        Line("folder", [(0.0, dense), *((x, dense) for x, _ in as_bitmask)], colour=2),
        Line("export --type bitmask", [(0.0, dense), *as_bitmask]),
    ]
    return line_chart("Megabytes (bfloat16)", "zeros in the layers' matrices, %", lines)


def speed(arguments: argparse.Namespace) -> None:
    """Milliseconds of y = x Wᵀ for 1 and 128 tokens."""
    torch.set_num_threads(arguments.threads)
    lines = [
        "| matrix | tokens | zeros | dense bf16 | zeros in bf16 | dense f32 | zeros in f32 | "
        "compressed rows f32 |",
        "|---|" + "---:|" * 7,
    ]
    times: dict[str, dict[float, list[float]]] = {}
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        for tokens in (1, 128):
            for share in (0.5, 0.7, 0.9):
                cells = _times(weight, by_magnitude(weight, Sparsity(share)), tokens)
                times.setdefault(f"{rows} × {columns}, {tokens}", {})[share] = cells
                head = [f"{rows} × {columns}", str(tokens), f"{share:.0%}"]
                lines.append("| " + " | ".join([*head, *(f"{ms:.3f}" for ms in cells)]) + " |")
    (arguments.out / "sparsity_speed.md").write_text("\n".join(lines) + "\n")
    (arguments.out / "sparsity_speed.svg").write_text(_speed_picture(times["4096 × 4096, 128"]))
    print((arguments.out / "sparsity_speed.md").read_text())


def _speed_picture(times: dict[float, list[float]]) -> str:
    """Milliseconds of the largest product against the share of zeros."""
    names = ("dense bf16", "zeros in bf16", "dense f32", "zeros in f32", "compressed rows f32")
    lines = [
        Line(
            name,
            [(100 * share, cells[number]) for share, cells in times.items()],
            colour=(2, 3, 2, 1, 0)[number],
            dashed=number == 2,
        )
        for number, name in enumerate(names)
    ]
    title = "Milliseconds of 128 tokens × (4096 × 4096), one core"
    return line_chart(title, "zeros, %", lines)


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--only", choices=("quality", "speed"), help="one part of it")
    parser.add_argument("--list", action="store_true", help="print the rows, measure nothing")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="ROW")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 512")
    parser.add_argument("--tokens", type=int, default=100_000, help="training tokens of each")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--text-tokens", type=int, default=8192, help="test tokens of each text")
    parser.add_argument("--threads", type=int, default=1, help="for speed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
