"""A GGUF file written tensor by tensor, and what lies in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow import llama_cpp
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family
from regrow.manifest import require_space
from regrow.progress import progress
from regrow.stages.export import hyperparameters, tensors, tokenizer
from regrow.stages.export.lineage import Lineage
from regrow.stages.export.tokenizer import Vocabulary
from regrow.stages.export.types import DIRECT, Stored, bytes_of, type_of

if TYPE_CHECKING:
    import numpy as np

INTERMEDIATE = {"float16": "F16", "bfloat16": "BF16"}
"""What llama.cpp's quantizer is given, by the checkpoint's dtype: no rounding before its own."""
NEEDED = 1.1
"""Disk to ask for, as a share of the tensors' bytes: the vocabulary takes some, too."""


class Source:
    """A checkpoint with all that its file says of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        config: Any,
        vocabulary: Vocabulary,
        name: str,
        lineage: Lineage,
    ) -> None:
        self.checkpoint, self.family, self.config = checkpoint, family, config
        self.vocabulary, self.name, self.lineage = vocabulary, name, lineage
        self.entries = tensors.entries(checkpoint, family)
        head_dim = family.sizes(checkpoint.config)["head_dim"]
        self.extra = dict(tensors.extra(config, head_dim))

    def stored(self, wanted: str) -> list[Stored]:
        """The tensors of a file of type `wanted`, one of DIRECT."""
        head = tensors.head_name(self.entries)
        shapes = {e.name: e.shape for e in self.entries}
        shapes = {**{name: values.shape for name, values in self.extra.items()}, **shapes}
        return [Stored(n, shape, type_of(n, shape, wanted, head)) for n, shape in shapes.items()]


def write(path: Path, source: Source, type_name: str) -> list[Stored]:
    """Write the file and return what lies in it; K-quants by way of a file of plain floats.

    Raises UserError when the disk has no space for it or a value does not fit the type.
    """
    if type_name in DIRECT:
        stored = source.stored(type_name)
        require_space(path.parent, int(NEEDED * sum(tensor.bytes for tensor in stored)))
        _write(path, source, type_name, stored)
        return stored
    plain = INTERMEDIATE.get(source.checkpoint.dtype(source.checkpoint.names()[0]), "F32")
    between = path.with_name(f"{path.stem}.{plain}.intermediate.gguf")
    stored = source.stored(plain)
    require_space(path.parent, int(2 * NEEDED * sum(tensor.bytes for tensor in stored)))
    try:
        _write(between, source, plain, stored)
        llama_cpp.quantize(between, path, file_type(type_name))
    finally:
        between.unlink(missing_ok=True)
    return contents(path)


def contents(path: Path) -> list[Stored]:
    """The tensors of a GGUF file; raises UserError for one that is broken."""
    from gguf import GGUFReader

    try:
        found = GGUFReader(path).tensors
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(f"{path} is truncated or no GGUF file: {error}; export it again") from None
    return [Stored(t.name, tuple(map(int, t.shape[::-1])), t.tensor_type.name) for t in found]


def file_type(type_name: str) -> int:
    """llama.cpp's number for a file of this type."""
    from gguf import LlamaFileType

    prefix = "ALL" if type_name == "F32" else "MOSTLY"
    return int(LlamaFileType[f"{prefix}_{type_name}"])


def _write(path: Path, source: Source, type_name: str, stored: list[Stored]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    family = source.family
    writer = GGUFWriter(path, str(family.gguf))
    try:
        licence = source.lineage.licence.id
        hyperparameters.write_general(writer, source.name, file_type(type_name), licence)
        hyperparameters.write(writer, source.checkpoint, family, source.config)
        tokenizer.write(writer, source.checkpoint, source.vocabulary)
        for tensor in stored:
            kind = GGMLQuantizationType[tensor.type]
            float32 = np.dtype(np.float32)  # no bytes: the shape is that of the values
            writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        entries = {entry.name: entry for entry in source.entries}
        with progress(f"export: {path.name}", sum(t.bytes for t in stored), "bytes") as counter:
            for tensor in stored:
                values = source.extra.get(tensor.name)
                if values is None:
                    values = tensors.read(source.checkpoint, family, entries[tensor.name])
                writer.write_tensor_data(_packed(values, tensor))
                counter.advance(tensor.bytes)
    finally:
        writer.close()


def _packed(values: np.ndarray, tensor: Stored) -> np.ndarray:
    """The tensor's bytes in its type; raises UserError for values that F16 cannot hold."""
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    if tensor.type == "F16":
        with np.errstate(over="ignore"):
            packed = values.astype(np.float16)
        if not np.isfinite(packed).all():
            raise UserError(
                f"{tensor.name} has values beyond ±65504, which F16 cannot hold: use BF16 or F32"
            )
        return packed
    packed = quants.quantize(np.ascontiguousarray(values), GGMLQuantizationType[tensor.type])
    assert packed.nbytes == bytes_of(tensor.shape, tensor.type), tensor
    return packed
