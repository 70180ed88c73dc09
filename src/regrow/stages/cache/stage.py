"""The cache stage runs a teacher over text and stores its outputs for later distillations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from regrow import families, stage_dir
from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.data import DataConfig, Split
from regrow.data.sequences import IGNORED, Sequences
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.precision import half
from regrow.runtime.progress import Progress, progress, say
from regrow.stage_dir import Figure, StageDir, refuse_input, require_space
from regrow.stages.cache import CacheConfig
from regrow.training.cache.folder import (
    HEADER,
    SPLITS,
    VERSION,
    Header,
    missing_sequences,
    tokenizer_fingerprint,
)
from regrow.training.cache.formats import Format, log_probabilities, make
from regrow.training.cache.sparse import Sparse
from regrow.training.cache.store import Store, write_shard
from regrow.training.cache.teacher import head_from
from regrow.training.head import Head
from regrow.training.shared_tokens import shared_ids
from regrow.training.teacher import Teacher, scored
from regrow.training.text import text_for

CONVENTIONS = {
    "hidden": "KL(teacher || stored), held-out",
    "topk": "KL(teacher || stored) over k + 1 buckets, held-out",
    "samples": "KL(stored || teacher), held-out: noise of zero mean",
}


def errors(
    form: Format, hidden_NH: Tensor, head: Head, key: bytes, vocab_size: int
) -> dict[str, Tensor]:
    """The storage error of each token [N] of a sequence: `error` in nats, defined by CONVENTIONS.

    A distribution of k + 1 buckets also has `tail`, the mass of the last bucket, and `tail evenly`,
    the KL over the whole vocabulary if that mass is spread evenly over the bucket's ids.
    """
    stored = form.decode(form.encode(hidden_NH, head, key))
    parts: list[dict[str, Tensor]] = []
    done = 0
    for log_p_NV in log_probabilities(hidden_NH, head, vocab_size):
        part = slice(done, done + len(log_p_NV))
        done = part.stop
        if isinstance(stored, Sparse):
            sparse = stored[part].to(log_p_NV.device)
            parts.append(_of_sparse(log_p_NV, sparse))
        else:
            states_NH = stored[part].to(hidden_NH)
            (log_q_NV,) = log_probabilities(states_NH, head, vocab_size)
            parts.append({"error": _sum(log_p_NV.exp(), log_p_NV - log_q_NV)})
    return {name: torch.cat([each[name] for each in parts]) for name in parts[0]}


def _of_sparse(log_p_NV: Tensor, sparse: Sparse) -> dict[str, Tensor]:
    known_NK, share_NK = log_p_NV.gather(-1, sparse.ids_NK), sparse.probability_NK
    if sparse.tail_N is None:
        return {"error": (torch.xlogy(share_NK, share_NK) - share_NK * known_NK).sum(-1)}
    known = _sum(known_NK.exp(), known_NK - share_NK.log())
    rest_NV = log_p_NV.scatter(-1, sparse.ids_NK, -torch.inf)
    log_rest_N = rest_NV.logsumexp(-1)
    rest_N, log_tail_N = log_rest_N.exp(), sparse.tail_N.log()
    within = torch.xlogy(rest_NV.exp(), rest_NV.exp()).sum(-1)  # Σ p log p over the tail
    each = log_tail_N - torch.tensor(log_p_NV.shape[1] - known_NK.shape[1]).log()
    return {
        "error": known + rest_N * (log_rest_N - log_tail_N),
        "tail": rest_N,
        "tail evenly": known + within - rest_N * each,
    }


def _sum(p: Tensor, difference: Tensor) -> Tensor:
    return (p * difference).sum(-1)


SHARD_TOKENS = 1 << 15
"""The approximate number of tokens in a shard; a killed run loses at most one per process."""


def cache(
    teacher: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: CacheConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Run `teacher` over the sequences that a distillation on `data` uses, and store its outputs.

    Only scored tokens are stored. An interrupted run continues; a finished cache of the same
    teacher and format is extended. Several processes share the sequences and write the same files
    as a single one. Raises UserError for a teacher with outputs that are not finite, for a token id
    beyond its embedding, and for too little text or disk space.
    """
    out, config, options = Path(out), config or CacheConfig(), options or Options()
    device = options.torch_device()
    checkpoint = teacher if isinstance(teacher, Checkpoint) else load(teacher)
    refuse_input(out, checkpoint.folder)
    header = header_of(checkpoint, data, config)
    stage = _stage(out, config, header)
    if stage.complete:
        say(f"cache: {out} is complete and unchanged")
        return out
    tokenizer = checkpoint.tokenizer()
    counts: dict[Split, int] = {
        "validation": config.heldout_sequences,
        "train": -(-config.tokens // data.sequence_length),
    }
    sequences: dict[str, Sequences] = {
        "heldout" if split == "validation" else split: text_for(
            [checkpoint.config], data, tokenizer, split, count, checkpoint
        )
        for split, count in counts.items()
    }
    _check_space(stage, header, sequences)
    with stage as folder:
        if distributed.is_main():
            _tidy(folder, stage)
        distributed.wait()
        todo = {
            split: missing_sequences(b, Store(folder / split)) for split, b in sequences.items()
        }
        distributed.wait()  # before anything is written, so that all ranks see the same work
        if any(todo.values()):
            model = Teacher(checkpoint.model(half(device), device))
            stage.figures.append(_fill(folder, header, model, sequences, todo, options.batch_size))
        distributed.wait()
        if distributed.is_main():
            _finish(stage, folder, header, checkpoint, device)
    return out


def header_of(checkpoint: Checkpoint, data: DataConfig, config: CacheConfig) -> Header:
    """The header of a cache; raises UserError for invalid settings."""
    family = families.of(checkpoint)
    tokenizer = checkpoint.tokenizer()
    sizes = {
        "vocab_size": shared_ids(checkpoint, tokenizer),
        "hidden_size": family.sizes(checkpoint.config)["hidden"],
    }
    form = vars(make(config.format, {**vars(config), **sizes}))
    return Header(
        version=VERSION,
        format=config.format,
        settings={name: value for name, value in form.items() if name not in sizes},
        teacher=checkpoint.fingerprint,
        tokenizer=tokenizer_fingerprint(tokenizer),
        **sizes,
        sequence_length=data.sequence_length,
        data=data_digest(data),
    )


def _stage(out: Path, config: CacheConfig, header: Header) -> StageDir:
    inputs = {"teacher": header.teacher, "tokenizer": header.tokenizer, "data": header.data}
    # The resume digest leaves out budget and text, so that a larger cache extends a smaller one.
    return StageDir(out, "cache", config, inputs, resumable=True, resume_digest=header.fingerprint)


def _tidy(folder: Path, stage: StageDir) -> None:
    """Link a finished cache's shards into `folder`; delete the incomplete files of a killed run."""
    extends = _extends(stage)
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
        for path in sorted((stage.out / split).glob("*.safetensors")) if extends else ():
            if not (folder / split / path.name).exists():
                stage_dir.link(str(path), str(folder / split / path.name))
        for path in [*(folder / split).glob("*.partial-*"), *Store(folder / split).broken]:
            path.unlink()


def _check_space(stage: StageDir, header: Header, sequences: dict[str, Sequences]) -> None:
    """Require disk space for the sequences that are not yet stored.

    A sequence may be stored by an interrupted run, or by the finished cache that this run extends.
    """
    folders = [stage.partial, stage.out] if _extends(stage) else [stage.partial]
    needed = 0.0
    for split, form in header.formats().items():
        todo = missing_sequences(sequences[split], *(Store(folder / split) for folder in folders))
        labels = sequences[split].select(list(todo.values())).labels
        needed += form.bytes_per_token() * int((labels[:, 1:] != IGNORED).sum())
    require_space(stage.out, int(needed))


def _extends(stage: StageDir) -> bool:
    """Whether a finished cache of the same teacher and format exists."""
    manifest = stage_dir.read(stage.out)
    return manifest is not None and manifest.get("resume_digest") == stage.resume_digest


def _fill(
    folder: Path,
    header: Header,
    teacher: Teacher,
    sequences: dict[str, Sequences],
    todo: dict[str, dict[bytes, int]],
    batch_size: int,
) -> Figure:
    """Write this rank's shards of the missing sequences; returns the tokens/s of all ranks."""
    forms, length = header.formats(), header.sequence_length
    count = sum(map(len, todo.values())) * length
    with progress("cache", count) as counter:
        for split, missing in todo.items():
            shards = list(_shards(missing, max(1, SHARD_TOKENS // length)))
            for shard in shards[distributed.rank() :: distributed.world_size()]:
                rows = _encode(forms[split], teacher, sequences[split], shard, batch_size, counter)
                write_shard(folder / split, dict(rows))
        seconds = counter.seconds()
    return Figure(name="speed", value=count / max(seconds, 1e-9), unit="tokens/s")


def _shards(missing: dict[bytes, int], size: int) -> Iterator[dict[bytes, int]]:
    """Group the missing sequences by shard; a shard is for `size` consecutive sequence numbers."""
    groups: dict[int, dict[bytes, int]] = {}
    for key, number in sorted(missing.items(), key=lambda item: item[1]):
        groups.setdefault(number // size, {})[key] = number
    yield from groups.values()


def _encode(
    form: Format,
    teacher: Teacher,
    sequences: Sequences,
    shard: dict[bytes, int],
    batch_size: int,
    counter: Progress,
) -> Iterator[tuple[bytes, dict[str, torch.Tensor]]]:
    """Yield each sequence's key and the tensors to store."""
    chosen, keys = sequences.select(list(shard.values())), iter(shard)
    device = teacher.model.device
    for batch in chosen.batches(batch_size):
        states_BTH, mask_BT = teacher.hidden(batch).final, scored(batch).to(device)
        if not bool(states_BTH.isfinite().all()):
            raise UserError(
                f"the teacher {teacher.model.config._name_or_path} gives hidden states that are "
                "not finite: check its weights"
            )
        for states_TH, mask_T in zip(states_BTH, mask_BT, strict=True):
            key = next(keys)
            stored = form.encode(states_TH[mask_T], teacher.head, key)
            yield key, {**stored, "tokens": mask_T.sum()[None].cpu()}
        counter.advance(batch["input_ids"].numel() * distributed.world_size())


def _finish(
    stage: StageDir, folder: Path, header: Header, checkpoint: Checkpoint, device: torch.device
) -> None:
    """Measure the error of the stored distributions, and write the header."""
    stores = {split: Store(folder / split) for split in SPLITS}
    tokens, size = stores["train"].tokens(), stores["train"].bytes()
    measured = _errors(header, stores["heldout"], checkpoint, device)
    unit = {"tail": "share"}
    for name, value in measured.items():
        convention = CONVENTIONS[header.format] if name == "error" else ""
        stage.figures.append(
            Figure(name=name, value=value, unit=unit.get(name, "nats"), convention=convention)
        )
    stage.figures += [
        Figure(name="tokens", value=tokens, unit="tokens", convention="scored, to train on"),
        Figure(name="bytes of the training text", value=size, unit="bytes"),
        Figure(name="bytes per token", value=size / tokens, unit="bytes", n=tokens),
        Figure(
            name="bytes of the held-out text",
            value=stores["heldout"].bytes(),
            unit="bytes",
            convention="stored exactly",
        ),
    ]
    figures = {**measured, "bytes per token": size / tokens}
    header = header.model_copy(update={"figures": figures})
    stage_dir.write_json(folder / HEADER, header.model_dump(mode="json"))
    for figure in stage.figures:
        number = f"{figure.value:,.{0 if figure.value >= 1000 else 5}f}"
        say(f"cache: {figure.name} {number} {figure.unit} {figure.convention}".rstrip())


def _errors(
    header: Header, heldout: Store, checkpoint: Checkpoint, device: torch.device
) -> dict[str, float]:
    """The mean errors over the held-out tokens. These are stored exactly, so no model runs."""
    forms, head = header.formats(), head_from(checkpoint, device)
    sums: dict[str, float] = {}
    tokens = 0
    for key in heldout.keys():  # noqa: SIM118
        states_NH = forms["heldout"].decode(heldout.read(key))
        assert isinstance(states_NH, torch.Tensor)
        each = errors(forms["train"], states_NH.to(device), head, key, header.vocab_size)
        tokens += len(states_NH)
        for name, value_N in each.items():
            sums[name] = sums.get(name, 0.0) + float(value_N.double().sum())
    return {name: value / tokens for name, value in sums.items()}
