"""The prepare stage: text in, memory-mapped shards of tokens out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from regrow.checkpoint import Checkpoint, load
from regrow.data.config import SOURCES, DataConfig, SourceConfig
from regrow.data.documents import Passage, pieces, place_of, read_row
from regrow.data.files import local_files
from regrow.data.prepared import (
    new_index,
    shard_folder,
    shard_size,
)
from regrow.data.prepared_folder import INDEX, LAYOUT, Index, PreparedFolder
from regrow.data.sources import check_source, rows
from regrow.errors import UserError
from regrow.runtime.progress import Progress, say
from regrow.stage_dir import Figure, StageDir, digest, link, refuse_input, write_json
from regrow.stages.prepare import PrepareConfig
from regrow.stages.prepare.workers import Workers, number_of

Batch = list[tuple[Passage, float]]
"""Passages of a shard, each with the number in [0, 1) that decides its split."""


def prepare(
    model: str | Path,
    data: DataConfig,
    out: str | Path,
    config: PrepareConfig | None = None,
    workers: int = 0,
) -> Path:
    """Tokenize the sources of `data` with the tokenizer of `model`, and return `out`.

    `data` with `out` as its only source then gives the tokens of these sources, with their weights
    and losses. The splits are those of the text. A source that `out` has already is not tokenized
    again. `workers` is the number of processes; 0 is one for each core. Raises UserError for a
    source that cannot be read.
    """
    out, config = Path(out), config or PrepareConfig()
    workers = number_of(workers)
    checkpoint = _check(model, data, out)
    refuse_input(out, checkpoint.folder)
    tokenizer = checkpoint.tokenizer()
    indices = [new_index(source, data, tokenizer, config.order) for source in data.sources]
    names = [_folder_name(index) for index in indices]
    shares = [[source.weight, source.losses] for source in data.sources]
    inputs = {"text": digest([index.key for index in indices]), "shares": digest(names, shares)}
    kept = digest("prepare", LAYOUT, config.shard_characters)
    stage = StageDir(out, "prepare", config, inputs, resumable=True, resume_digest=kept)
    if stage.complete:
        say(f"prepare: {out} is complete and unchanged")
        return out
    with stage as folder, Workers(workers, tokenizer) as pool:
        _remove_others(folder, names)
        tokens = {
            name: _prepare_source(source, index, folder / name, out / name, config, pool)
            for name, source, index in zip(names, data.sources, indices, strict=True)
        }
        listed = zip(names, data.sources, strict=True)
        write_json(folder / SOURCES, [_entry(name, source) for name, source in listed])
        stage.figures.append(Figure(name="tokens", value=sum(tokens.values()), unit="tokens"))
    return out


def estimate(model: str | Path, data: DataConfig, out: Path, workers: int) -> list[str]:
    """The bytes of text and the number of processes; raises UserError like `prepare`."""
    _check(model, data, out)
    files = [file for source in data.sources for file in local_files(source.source)]
    size = sum(file.stat().st_size for file in files)
    return [
        f"prepare: {len(data.sources)} sources, {len(files):,} local files with {size / 1e9:.2f} "
        f"GB, {number_of(workers)} processes"
    ]


def _check(model: str | Path, data: DataConfig, out: Path) -> Checkpoint:
    """Open the model; raises UserError for sources that are missing, already prepared, or hold
    `out`: they would change by being prepared."""
    for source in data.sources:
        if Path(source.source).expanduser().resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"{out} is in the source {source.source}: give --out another folder")
        if PreparedFolder.of(source) is not None:
            raise UserError(f"{source.source} is prepared already: give the text itself")
        check_source(source)
    return load(model)


def _prepare_source(
    source: SourceConfig,
    index: Index,
    folder: Path,
    before: Path,
    config: PrepareConfig,
    pool: Workers,
) -> int:
    """Write what is missing of a source's folder; returns the number of its tokens.

    `before` is the folder of the same tokens in an earlier result, if there is one.
    """
    if not folder.exists() and (before / INDEX).exists():
        say(f"prepare: {source.source} is prepared already")
        linking = folder.with_name(f".{folder.name}.linking")
        shutil.rmtree(linking, ignore_errors=True)
        shutil.copytree(before, linking, copy_function=link)
        linking.rename(folder)
    if (folder / INDEX).exists():
        done = PreparedFolder(folder).index
        shards, tokens = done.shards, done.tokens
    else:
        shards, tokens = _write_shards(source, index, folder, config.shard_characters, pool)
    complete = index.model_copy(update={"shards": shards, "tokens": tokens})
    (folder / INDEX).unlink(missing_ok=True)  # it may be a link to that of the earlier result
    write_json(folder / INDEX, complete.model_dump(mode="json"))
    PreparedFolder(folder).check_source()
    return tokens


def _write_shards(
    source: SourceConfig, index: Index, folder: Path, characters: int, pool: Workers
) -> tuple[list[int], int]:
    """Write a source's shards; returns the number of passages in each, and of all tokens.

    Shards that are finished are kept: their text is read again, but not tokenized.
    """
    folder.mkdir(exist_ok=True)
    for partial in folder.glob(".*"):
        shutil.rmtree(partial)
    counter = Progress(f"tokenizing {source.source}", 0, "characters")
    kept = number = -1
    for number, batch in enumerate(_batches(source, index, characters)):
        if shard_folder(folder, number).exists():
            kept += 1
        else:
            pool.write(folder, number, batch)
        counter.advance(sum(passage.characters for passage, _ in batch))
    pool.finish()
    if number < 0:
        raise UserError(f"{source.source} has no text: leave it out")
    if kept >= 0:
        say(f"prepare: {kept + 1} finished shards of {source.source} were kept")
    counter.finish()
    sizes = [shard_size(folder, each) for each in range(number + 1)]
    return [passages for passages, _ in sizes], sum(tokens for _, tokens in sizes)


def _batches(source: SourceConfig, index: Index, characters: int) -> Iterator[Batch]:
    """Yield the source's passages in the order of its rows, a shard at a time."""
    batch: Batch = []
    size = 0
    for location, row in rows(source):
        passage = read_row(row, location)
        if not passage.text.strip():
            continue
        place = passage.split_at
        place = place_of(passage.text, index.seed) if place is None else place
        batch += [(piece, place) for piece in pieces(passage, index.piece)]
        size += passage.characters
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _folder_name(index: Index) -> str:
    """A short name that begins like the source, followed by the digest of the tokens."""
    path = Path(index.source.source)
    words = re.sub(r"[^\w-]+", "-", path.name.split(".")[0]).strip("-")
    return f"{words[:40] or 'text'}-{index.key[:12]}"


def _entry(name: str, source: SourceConfig) -> dict[str, object]:
    return {"folder": name, "weight": source.weight, "losses": source.losses}


def _remove_others(folder: Path, names: list[str]) -> None:
    """Delete what an interrupted run left of sources that are no longer asked for."""
    for place in folder.iterdir():
        if place.is_dir() and place.name not in names:
            shutil.rmtree(place)
