"""The export stage: converts a Hugging Face folder to a GGUF file, Modelfile and model card.

The output is the folder of a stage, or a .gguf file of any name in a folder with other files.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regrow import card, families, llama_cpp, stage_dir
from regrow.card import CARD, lineage_of
from regrow.checkpoint import Checkpoint, load
from regrow.config import Config
from regrow.cost.units import size_text
from regrow.data import DataConfig
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.quantization.formats import (
    GGUF_FORMATS,
    TYPES,
    StorageFormat,
    StoredTensor,
    fallback_lines,
)
from regrow.runtime.progress import say
from regrow.stage_dir import Figure, StageDir, refuse_input
from regrow.stages.export import (
    BITMASK,
    ExportConfig,
    bitmask_folder,
    chat,
    hyperparameters,
    tensors,
    tokenizer,
    verify,
)
from regrow.stages.export.chat import MODELFILE
from regrow.training.text import text_for

LONGEST = 512
"""Most tokens of a window for the comparison."""


def export(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: ExportConfig | None = None,
    data: DataConfig | None = None,
) -> Path:
    """Write a GGUF file, verify it with llama.cpp, and return its path; or a folder of bitmasks.

    `out` is a folder or the file's name, NAME.gguf. Raises UserError for a model that llama.cpp
    does not support, for a missing extra, and when the file's next-token distributions differ too
    much from the checkpoint's.
    """
    config, out = config or ExportConfig(), Path(out)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    if config.type == BITMASK:
        return bitmask_folder.write(checkpoint, out, config)
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
    format = GGUF_FORMATS[config.type]
    with stage as folder:
        stored = tensors.write(folder / file, source, format)
        stage.figures += _sizes(stored, folder / file, config.type)
        stage.extra["fallbacks"] = fallback_lines(stored)
        if _verifies(config):
            proof = verify.prove(
                folder / file, checkpoint, windows, text, config.prompt, config.new_tokens
            )
            verify.check(proof, config.type, folder / file)
            stage.figures += proof.figures()
            stage.extra["verified"] = proof.lines()
        (folder / MODELFILE).write_text(chat.text(source, file))
        readme = card.text(source.name, source.lineage, checkpoint.config, stage.manifest(), file)
        (folder / CARD).write_text(readme, encoding="utf-8")
    _tell(target, stage.figures, stage.extra)
    return target


def check(
    checkpoint: Checkpoint, config: ExportConfig, model_name: str | None = None
) -> tensors.ExportSource:
    """Check everything that can be checked before the slow work, and return the export's source.

    `model_name` is the model as the user named it; its name and licence are derived from it. Raises
    UserError.
    """
    family = families.of(checkpoint)
    if find_spec("gguf") is None:
        raise UserError("writing GGUF needs the gguf package: pip install 'regrow[gguf]'")
    if GGUF_FORMATS[config.type].by_llama_cpp:
        llama_cpp.require(f"type {config.type}")
    if config.verify == "always":
        llama_cpp.require("verifying an export")
    loaded = checkpoint.stock_config()
    hyperparameters.check(checkpoint, family, loaded)
    vocab_size = family.sizes(checkpoint.config)["vocab"]
    vocabulary = tokenizer.vocabulary(checkpoint, vocab_size, config.pre)
    lineage = lineage_of(checkpoint.folder, model_name)
    name = config.name or lineage.name
    source = tensors.ExportSource(checkpoint, family, loaded, vocabulary, name, lineage)
    _check_rows(source.stored(GGUF_FORMATS[config.type]), GGUF_FORMATS[config.type])
    if reason := hyperparameters.context(loaded, str(family.gguf))[1]:
        say(f"export: {reason}")
    return source


def _verifies(config: ExportConfig) -> bool:
    if config.verify == "never":
        return False
    if not llama_cpp.installed():
        say("export: not verified, because llama.cpp is missing: pip install 'regrow[llama]'")
        return False
    return True


def _text(
    checkpoint: Checkpoint,
    source: tensors.ExportSource,
    config: ExportConfig,
    data: DataConfig | None,
) -> tuple[list[list[int]], tuple[str, str]]:
    """Windows of token ids for the comparison, and a text with a description of the windows."""
    window_tokens = min(LONGEST, hyperparameters.context(source.config, str(source.family.gguf))[0])
    tokenizer: Any = checkpoint.tokenizer()
    if data is None:
        ids = tokenizer(verify.SAMPLE)["input_ids"]
        return [ids[: min(window_tokens, config.verify_tokens)]], (verify.SAMPLE, "a built-in text")
    num_sequences = -(-config.verify_tokens // min(window_tokens, data.sequence_length))
    blocks = text_for([checkpoint.config], data, tokenizer, "heldout", num_sequences, checkpoint)
    rows = zip(blocks.input_ids, blocks.real, strict=True)
    windows = [ids[real][:window_tokens].tolist() for ids, real in rows]
    left = config.verify_tokens
    kept = []
    for window in windows:
        kept.append(window[:left])
        left -= len(kept[-1])
        if left <= 0:
            break
    name = f"held-out text of the data, in windows of {min(window_tokens, data.sequence_length)}"
    return kept, (tokenizer.decode(windows[0], skip_special_tokens=True), name)


def _check_rows(stored: list[StoredTensor], format: StorageFormat) -> None:
    """Raise UserError when more than half of the weights are in rows that the type cannot pack.

    K-quants first fall back to a type with blocks of 32, which fits most rows.
    """
    block = min(TYPES[format.linear].block, 32)
    matrices = [tensor for tensor in stored if len(tensor.shape) > 1]
    misfits = [tensor for tensor in matrices if tensor.shape[-1] % block]
    share = sum(t.weights for t in misfits) / sum(t.weights for t in matrices)
    if share > 0.5:
        columns = ", ".join(map(str, sorted({tensor.shape[-1] for tensor in misfits})))
        plain = ", ".join(f.name for f in GGUF_FORMATS.values() if TYPES[f.linear].block == 1)
        raise UserError(
            f"type {format.name} stores rows in blocks of {block} weights, but {share:.0%} of this "
            f"model's weights are in rows of {columns}, not a multiple of {block}: use {plain}, or "
            f"prune to widths that are a multiple of {block}"
        )


def _bits_per_weight(stored: list[StoredTensor]) -> float:
    return 8 * sum(t.bytes for t in stored) / sum(t.weights for t in stored)


def _sizes(stored: list[StoredTensor], path: Path, type_name: str) -> list[Figure]:
    return [
        Figure(name="file_bytes", value=path.stat().st_size, unit="bytes", convention=type_name),
        Figure(
            name="bits_per_weight",
            value=_bits_per_weight(stored),
            unit="bits",
            convention="bytes of all tensors × 8 ÷ weights",
        ),
    ]


def _tell(target: Path, figures: list[Figure], extra: dict[str, Any]) -> None:
    sizes = {figure.name: figure.value for figure in figures}
    say(
        f"export: {target}, {size_text(sizes['file_bytes'])}, "
        f"{sizes['bits_per_weight']:.2f} bits per weight"
    )
    for line in (*extra["fallbacks"], *extra.get("verified", [])):
        say(f"  {line}")


def describe(checkpoint: Checkpoint, config: ExportConfig, model_name: str | None) -> list[str]:
    """The file that an export would write, for --dry-run; raises UserError as `check` does."""
    if config.type == BITMASK:
        return bitmask_folder.describe(checkpoint)
    source = check(checkpoint, config, model_name)
    stored = source.stored(GGUF_FORMATS[config.type])
    size = sum(tensor.bytes for tensor in stored)
    return [
        f"export: {source.name}-{config.type}.gguf, architecture {source.family.gguf}, "
        f"{size_text(size)}, {_bits_per_weight(stored):.2f} bits per weight",
        *(f"  {line}" for line in fallback_lines(stored)),
        f"  tokenizer {source.vocabulary.model} ({source.vocabulary.pre})",
    ]


class FileStageDir(StageDir):
    """A stage that writes NAME.gguf, and NAME.* beside it, into a folder with other files.

    Each file is put in place by a rename, the large file last. After a kill, the folder contains
    the old files or the new ones, and a hidden folder that the next run removes.
    """

    def __init__(self, file: Path, name: str, config: Config, inputs: dict[str, str]) -> None:
        self.file = file = stage_dir.output_file(file)
        super().__init__(file.parent / f".{file.name}.export", name, config, inputs)
        if file.exists() and self._manifest_beside() is None:
            raise UserError(
                f"{file} exists and was not written by regrow export: give --out another name"
            )

    @property
    def _result(self) -> Path:
        return self.file

    def _sibling(self, name: str) -> Path:
        return self.file.with_name(f"{self.file.stem}.{name}")

    def _earlier(self) -> dict[str, object] | None:
        return self._manifest_beside()

    def _manifest_beside(self) -> dict[str, object] | None:
        path = self._sibling(stage_dir.NAME)
        return stage_dir.read_file(path) if path.exists() else None

    @property
    def complete(self) -> bool:
        """Whether the file exists and was produced by this config from these inputs."""
        manifest = self._manifest_beside()
        return self.file.exists() and manifest is not None and manifest.get("digest") == self.digest

    def _finish(self) -> None:
        stage_dir.write_json(self.partial / stage_dir.NAME, self.manifest())
        (self.partial / stage_dir.MARK).unlink()
        for path in sorted(self.partial.iterdir(), key=lambda path: path.suffix == ".gguf"):
            path.replace(self.file if path.suffix == ".gguf" else self._sibling(path.name))
        shutil.rmtree(self.partial)


def stage_at(
    out: Path, name: str, config: Config, inputs: dict[str, str], default: str
) -> tuple[StageDir, str]:
    """The stage directory for `out` (a folder or NAME.gguf), and the name of the GGUF file."""
    if out.suffix == ".gguf":
        return FileStageDir(out, name, config, inputs), out.name
    return StageDir(out, name, config, inputs), default
