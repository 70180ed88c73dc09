"""Teacher caches: bytes per token against error, and what a student loses by them.

    python benchmarks/cache.py --texts ../shared/data --out runs/cache
    python benchmarks/cache.py --texts ../shared/data --out runs/cache --tokens 250000

Resumable: run it again and it goes on. Teacher SmolLM2-135M-Instruct in bfloat16, held-out
sequences of 512 tokens of protocol P1's blend; each format stores them, and is compared with what
it stored:

- topk: KL(teacher ‖ stored) over k + 1 buckets, the mass of the last one, and the KL over the whole
  vocabulary if the tail is spread evenly: what a reader that knows nothing else would lose;
- samples: KL(stored ‖ teacher), noise of zero mean;
- hidden: KL(teacher ‖ stored).

With `--tokens` a student, the teacher with its MLPs cut to 1,024 channels and repaired, is
distilled on so many tokens by the live teacher and by each cache of STUDENTS. Held-out KL is always
against exact states; less that with the live teacher it is the added one. Writes `cache.md` and
`cache.html` into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from protocol import DENSE, blend

from regrow import (
    CacheConfig,
    Checkpoint,
    DistillConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    cache,
    distill,
    load,
    profile,
    prune,
)
from regrow.data.sequences import Sequences, build_sequences
from regrow.stage_dir import read
from regrow.stages.cache.stage import errors, header_of
from regrow.training.cache.folder import sequence_keys
from regrow.training.cache.teacher import head_from
from regrow.training.teacher import Teacher, scored

VARIANTS: list[dict[str, Any]] = [
    *({"format": "topk", "k": k, "bits": 8} for k in (8, 18, 64)),
    *({"format": "topk", "k": 18, "bits": bits} for bits in (4, 6)),
    {"format": "topk", "k": 20, "bits": 6},
    *({"format": "samples", "draws": draws} for draws in (16, 32, 40, 64, 255)),
    *({"format": "samples", "draws": n, "sampling": "multinomial"} for n in (32, 64)),
    {"format": "hidden", "dtype": "int8"},
    {"format": "hidden", "dtype": "bfloat16"},
]
STUDENTS = ("topk k=18 bits=8", "topk k=64 bits=8", "samples draws=40", "hidden dtype=int8")
Rows = dict[str, dict[str, Any]]


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"rows-{arguments.sequences}.json"
    rows: Rows = json.loads(path.read_text()) if path.exists() else {}
    _store(rows, path, arguments.texts, arguments.sequences)
    if arguments.tokens:
        _teach(rows, path, arguments)
    (arguments.out / "cache.md").write_text(_table(rows))
    _plot(rows, arguments.out / "cache.html")
    print(_table(rows))


def _name(variant: dict[str, Any]) -> str:
    kind, *rest = variant.items()
    return " ".join([kind[1], *(f"{name}={value}" for name, value in rest)])


def _store(rows: Rows, path: Path, texts: Path, count: int) -> None:
    """What each variant takes, and how far it lies from the teacher, over the same states."""
    todo = [variant for variant in VARIANTS if _name(variant) not in rows]
    if not todo:
        return
    master, data = load(DENSE), blend(texts)
    sequences = build_sequences(data, master.tokenizer(), "heldout", count)
    states, head = _states(master, sequences), head_from(master, torch.device("cpu"))
    for variant in todo:
        header = header_of(master, data, CacheConfig(**variant))
        form = header.formats()["train"]
        sums: dict[str, float] = {}
        tokens = 0
        for key, states_NH in states.items():
            stored = form.encode(states_NH, head, key)
            found = errors(form, states_NH, head, key, header.vocab_size)
            tokens += len(states_NH)
            for name, value_N in found.items():
                sums[name] = sums.get(name, 0.0) + float(value_N.double().sum())
            size = sum(value.numel() * value.element_size() for value in stored.values())
            sums["bytes"] = sums.get("bytes", 0.0) + size
        means = {name: value / tokens for name, value in sums.items()}
        rows[_name(variant)] = {"format": variant["format"], "tokens": tokens, **means}
        path.write_text(json.dumps(rows, indent=1))
        print(_name(variant), means, flush=True)


def _states(master: Checkpoint, sequences: Sequences) -> dict[bytes, torch.Tensor]:
    """By key, each block's final hidden states of the scored tokens."""
    teacher = Teacher(master.model(torch.bfloat16))
    found = {}
    for batch in sequences.batches(4):
        masks, keys = scored(batch), sequence_keys(batch)
        for key, states_TH, mask_T in zip(keys, teacher.hidden(batch).final, masks, strict=True):
            found[key] = states_TH[mask_T]
    return found


def _teach(rows: Rows, path: Path, arguments: argparse.Namespace) -> None:
    """Held-out KL of the same student after equal training, by the live teacher and by caches."""
    out, data, options = arguments.out, blend(arguments.texts), Options(batch_size=4)
    measured = profile(DENSE, data, out / "profile", ProfileConfig(samples=96, gram_tokens=0))
    student = prune(DENSE, out / "student", PruneConfig(intermediate_size=1024), measured)
    name = f"held-out KL {arguments.tokens}"
    config = DistillConfig(tokens=arguments.tokens)
    budget = {"tokens": arguments.tokens, "heldout_sequences": config.heldout_sequences}
    chosen = {_name(v): v for v in VARIANTS if _name(v) in STUDENTS}
    for label, variant in {"live": None, **chosen}.items():
        row = rows.setdefault(label, {"format": "live", "bytes": 0.0, "error": 0.0})
        if name in row:
            continue
        place, fields = label.replace(" ", "-"), {}
        if variant is not None:
            folder = out / "caches" / place
            cache(DENSE, data, folder, CacheConfig(**budget, **variant), options)
            fields["cache"] = str(folder)
        better = distill(
            student,
            DENSE,
            data,
            out / f"distilled-{arguments.tokens}" / place,
            config.model_copy(update=fields),
            options,
        )
        figures = {each["name"]: each["value"] for each in (read(better) or {})["figures"]}
        row[name] = figures["held-out KL"]
        path.write_text(json.dumps(rows, indent=1))


def _table(rows: Rows) -> str:
    """One row each, the smallest first."""
    trained = sorted({name for row in rows.values() for name in row if name.startswith("held")})
    lines = [
        "| stored | bytes per token | error, nats | tail mass | tail spread evenly, nats |"
        + "".join(f" {name} tokens | added |" for name in trained),
        "|---|" + "---:|" * (4 + 2 * len(trained)),
    ]
    for label, row in sorted(rows.items(), key=lambda item: item[1]["bytes"]):
        cells = [label, f"{row['bytes']:.1f}", f"{row['error']:.5f}"]
        for name in ("tail", "tail evenly"):
            cells.append(f"{row[name]:.4f}" if name in row else "–")
        for name in trained:
            added = name in row and label != "live"
            cells.append(f"{row[name]:.4f}" if name in row else "–")
            cells.append(f"{row[name] - rows['live'][name]:+.4f}" if added else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(rows: Rows, path: Path) -> None:
    """Bytes against error, both logarithmic; what is exact stands at the foot."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for kind in ("topk", "samples", "hidden"):
        some = {label: row for label, row in rows.items() if row["format"] == kind}
        figure.add_scatter(
            x=[row["bytes"] for row in some.values()],
            y=[max(row["error"], 1e-6) for row in some.values()],
            text=list(some),
            mode="markers+text",
            textposition="top center",
            name=kind,
        )
    figure.update_xaxes(type="log", title="bytes per token")
    figure.update_yaxes(type="log", title="error, nats (0 drawn at 1e-6)")
    figure.add_vline(60, line_dash="dot")
    figure.add_hline(0.01, line_dash="dot")
    figure.write_html(path, include_plotlyjs=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--sequences", type=int, default=8, help="held-out sequences to store")
    parser.add_argument("--tokens", type=int, default=0, help="distil a student on so many")
    return parser.parse_args()


if __name__ == "__main__":
    main()
