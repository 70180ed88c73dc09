"""The export stage: a Hugging Face folder in, a GGUF file with Modelfile and model card out.

The output is a stage's folder, or a .gguf file of any name among other files.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regrow import families, llama_cpp
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig
from regrow.data.sequences import build_sequences
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.families import Family
from regrow.quantization import gguf_types
from regrow.quantization.gguf_types import Stored
from regrow.runtime.progress import say
from regrow.stage_dir import Figure, refuse_input
from regrow.stages.export import card, chat, limits, tensors, tokenizer, verify
from regrow.stages.export.card import lineage_of
from regrow.stages.export.config import ExportConfig
from regrow.stages.export.place import CARD, MODELFILE, stage_at

LONGEST = 512
"""Tokens of a window that is compared."""


def export(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: ExportConfig | None = None,
    data: DataConfig | None = None,
) -> Path:
    """Write a GGUF file, prove it by llama.cpp, and return its path.

    `out` is a folder or the file's name, NAME.gguf. Raises UserError for what llama.cpp cannot
    hold, for a missing extra, and for a file whose distributions are not the checkpoint's.
    """
    config, out = config or ExportConfig(), Path(out)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    source = check(checkpoint, config, None if isinstance(model, Checkpoint) else str(model))
    refuse_input(out, checkpoint.folder)
    inputs = {"model": checkpoint.fingerprint}
    if data is not None:
        inputs["data"] = data_digest(data)
    stage, file = stage_at(out, "export", config, inputs, f"{source.name}-{config.type}.gguf")
    target = out if out.suffix == ".gguf" else out / file
    if stage.complete:
        say(f"export: {target} is complete and unchanged")
        return target
    windows, text = _text(checkpoint, source, config, data)
    with stage as folder:
        stored = tensors.write(folder / file, source, config.type)
        stage.figures += _sizes(stored, folder / file, config.type)
        stage.extra["fallbacks"] = [str(f) for f in gguf_types.fallbacks(stored, config.type)]
        if _verifies(config):
            proof = verify.prove(
                folder / file, checkpoint, windows, text, config.prompt, config.new_tokens
            )
            verify.check(proof, config.type, folder / file)
            stage.figures += proof.figures()
            stage.extra["verified"] = proof.lines()
        (folder / MODELFILE).write_text(chat.text(source, file))
        told = card.text(source.name, source.lineage, source.family, stage.manifest(), file)
        (folder / CARD).write_text(told)
    _tell(target, stage.figures, stage.extra)
    return target


def check(
    checkpoint: Checkpoint, config: ExportConfig, given: str | None = None
) -> tensors.ExportSource:
    """All that can be known to fail before the slow work, raised as UserError; what is to do.

    `given` is how the model was named, from which its name and licence are told.
    """
    from transformers import AutoConfig

    family = families.of(checkpoint)
    if find_spec("gguf") is None:
        raise UserError("writing GGUF needs the gguf package: pip install 'regrow[gguf]'")
    if config.type in gguf_types.BY_LLAMA_CPP:
        llama_cpp.require(f"type {config.type}")
    if config.verify == "always":
        llama_cpp.require("verifying an export")
    loaded = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    limits.check(checkpoint, family, loaded)
    vocab_size = family.sizes(checkpoint.config)["vocab"]
    vocabulary = tokenizer.vocabulary(checkpoint, vocab_size, config.pre)
    lineage = lineage_of(checkpoint.folder, given)
    name = config.name or lineage.name
    source = tensors.ExportSource(checkpoint, family, loaded, vocabulary, name, lineage)
    gguf_types.check_holds({entry.name: entry.shape for entry in source.entries}, config.type)
    if reason := limits.context(loaded, str(family.gguf))[1]:
        say(f"export: {reason}")
    return source


def _verifies(config: ExportConfig) -> bool:
    if config.verify == "never":
        return False
    if not llama_cpp.installed():
        say("export: not verified, llama.cpp is not installed: pip install 'regrow[llama]'")
        return False
    return True


def _text(
    checkpoint: Checkpoint,
    source: tensors.ExportSource,
    config: ExportConfig,
    data: DataConfig | None,
) -> tuple[list[list[int]], tuple[str, str]]:
    """Windows of token ids to compare on, and a text whose tokens are, with the windows' name."""
    most = min(LONGEST, limits.context(source.config, str(source.family.gguf))[0])
    tokenizer: Any = checkpoint.tokenizer()
    if data is None:
        ids = tokenizer(verify.SAMPLE)["input_ids"]
        return [ids[: min(most, config.verify_tokens)]], (verify.SAMPLE, "a built-in text")
    wanted = -(-config.verify_tokens // min(most, data.sequence_length))
    blocks = build_sequences(data, tokenizer, "heldout", wanted)
    rows = zip(blocks.input_ids, blocks.real, strict=True)
    windows = [ids[real][:most].tolist() for ids, real in rows]
    left = config.verify_tokens
    kept = []
    for window in windows:
        kept.append(window[:left])
        left -= len(kept[-1])
        if left <= 0:
            break
    name = f"held-out text of the data, in windows of {min(most, data.sequence_length)}"
    return kept, (tokenizer.decode(windows[0], skip_special_tokens=True), name)


def _sizes(stored: list[Stored], path: Path, type_name: str) -> list[Figure]:
    return [
        Figure(name="file_bytes", value=path.stat().st_size, unit="bytes", convention=type_name),
        Figure(
            name="bits_per_weight",
            value=gguf_types.bits_per_weight(stored),
            unit="bits",
            convention="bytes of all tensors × 8 ÷ weights",
        ),
    ]


def _tell(target: Path, figures: list[Figure], extra: dict[str, Any]) -> None:
    sizes = {figure.name: figure.value for figure in figures}
    say(
        f"export: {target}, {sizes['file_bytes'] / 1e6:.1f} MB, "
        f"{sizes['bits_per_weight']:.2f} bits per weight"
    )
    for line in (*extra["fallbacks"], *extra.get("verified", [])):
        say(f"  {line}")


def describe(checkpoint: Checkpoint, config: ExportConfig, given: str | None) -> list[str]:
    """What an export would write, for --dry-run; raises UserError for what cannot be."""
    source = check(checkpoint, config, given)
    family: Family = source.family
    if config.type in gguf_types.DIRECT:
        stored = source.stored(config.type)
        size = f"{sum(t.bytes for t in stored) / 1e6:.1f} MB, "
        size += f"{gguf_types.bits_per_weight(stored):.2f} bits per weight"
        told = [f"  {each}" for each in gguf_types.fallbacks(stored, config.type)]
    else:
        size, told = "as llama.cpp's quantizer chooses", []
    return [
        f"export: {source.name}-{config.type}.gguf, architecture {family.gguf}, {size}",
        *told,
        f"  tokenizer {source.vocabulary.model} ({source.vocabulary.pre})",
    ]
