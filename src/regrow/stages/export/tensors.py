"""Converts the tensors of a Hugging Face folder one by one and writes them to a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow import llama_cpp
from regrow.card import Lineage
from regrow.checkpoint import Checkpoint
from regrow.cost import role_of
from regrow.errors import UserError
from regrow.families import Family
from regrow.quantization.formats import StorageFormat, StoredTensor, find_gguf, fitting
from regrow.runtime.progress import progress
from regrow.stage_dir import require_space
from regrow.stages.export import hyperparameters, tokenizer
from regrow.stages.export.tokenizer import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import torch

INTERLEAVED = ("llama",)
"""Architectures for which llama.cpp rotates each pair of neighbouring rows of a head. For all other
architectures llama.cpp pairs a row of the first half with one of the second, as transformers does
for every architecture."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the GGUF file and the checkpoint's tensors that it is built from."""

    name: str
    """Name in the GGUF file."""
    shape: tuple[int, ...]
    """In torch's order: rows before columns; stacked experts have a leading axis for the expert."""
    template: str
    """Key of the tensor in the family's table."""
    layer: int
    """Index of the layer; 0 for a tensor outside the layers."""
    parts: tuple[str, ...]
    """Names in the checkpoint: one name, or the name of each expert's tensor."""


def entries(checkpoint: Checkpoint, family: Family) -> list[GgufTensor]:
    """All tensors of the file that come from the checkpoint, in the order of the layers."""
    from gguf import get_tensor_name_map

    config = checkpoint.config
    layers = family.sizes(config)["layers"]
    names = get_tensor_name_map(_architecture(family), layers)
    grouped: dict[tuple[int, str], list[str]] = {}
    for template in family.tensors:
        for place in family.places(template, config):
            layer = -1 if place.layer is None else place.layer
            grouped.setdefault((layer, template), []).append(place.name)
    tensors = []
    for (layer, template), parts in sorted(grouped.items(), key=lambda item: item[0][0]):
        hf_name = template.replace("{layer}", str(layer)).replace("experts.{expert}", "experts")
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf names no {hf_name} of {family.gguf}"
        shape = checkpoint.shapes[parts[0]]
        stacked = (len(parts), *shape) if "{expert}" in template else shape
        tensors.append(GgufTensor(name, stacked, template, max(0, layer), tuple(parts)))
    return tensors


def read(checkpoint: Checkpoint, family: Family, entry: GgufTensor) -> np.ndarray:
    """The values of an entry in float32 [entry.shape], with rows in llama.cpp's order."""
    import torch

    parts = [checkpoint.tensor(name).float() for name in entry.parts]
    tensor = torch.stack(parts) if "{expert}" in entry.template else parts[0]
    values: np.ndarray = _changed(tensor, family, entry, checkpoint.config).contiguous().numpy()
    return values


def _changed(
    tensor: torch.Tensor, family: Family, entry: GgufTensor, config: dict[str, Any]
) -> torch.Tensor:
    name = entry.template.rsplit(".", 1)[0]
    if name.endswith("norm") and family.norm_offset:
        tensor = tensor + family.norm_offset  # llama.cpp adds no offset
    if name.endswith("q_norm") and family.model_type == "gemma3_text":
        return tensor * _query_factor(family, config)
    if family.gguf in INTERLEAVED and name.endswith(("q_proj", "k_proj")):
        (dim, *_) = family.tensors[entry.template].axes
        assert isinstance(dim, str)
        return interleaved(tensor, family.sizes(config)[dim])
    return tensor


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads × head_dim, …] with each head's two halves interleaved: 0, h/2, 1, h/2 + 1, …

    transformers rotates row i together with row i + h/2. llama.cpp's `llama` architecture rotates
    row 2i together with row 2i + 1.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _query_factor(family: Family, config: dict[str, Any]) -> float:
    """Factor that turns llama.cpp's query scale for Gemma 3 into query_pre_attn_scalar^-1/2.

    llama.cpp scales the queries by 1/√head_dim, and by 1/√(hidden/heads) in a model of 62 layers
    (the 27B).
    """
    sizes = family.sizes(config)
    llama_cpp_scalar = sizes["head_dim"]
    if sizes["layers"] == 62:
        llama_cpp_scalar = sizes["hidden"] // sizes["heads"]
    scalar = config.get("query_pre_attn_scalar", 256)
    return float((llama_cpp_scalar / scalar) ** 0.5)


def _architecture(family: Family) -> Any:
    from gguf import MODEL_ARCH_NAMES

    return next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.gguf)


INTERMEDIATE = {"float16": "F16", "bfloat16": "BF16"}
"""GGUF type for each dtype of a checkpoint's matrices; other dtypes and mixed dtypes need F32."""
NEEDED = 1.1
"""Required disk space ÷ bytes of the tensors; the excess leaves room for the vocabulary."""


class ExportSource:
    """A checkpoint together with all metadata that its GGUF file contains."""

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
        self.entries = entries(checkpoint, family)
        head_dim = family.sizes(checkpoint.config)["head_dim"]
        self.extra = dict(hyperparameters.rope_tensors(config, head_dim))
        """Tensors of the file that have no counterpart in the checkpoint, by name."""

    def lossless_type(self) -> str:
        """The smallest lossless type for all matrices; llama.cpp's quantizer reads such a file."""
        shapes, dtype = self.checkpoint.shapes, self.checkpoint.dtype
        dtypes = {dtype(name) for name in shapes if len(shapes[name]) > 1}
        return INTERMEDIATE.get(dtypes.pop(), "F32") if len(dtypes) == 1 else "F32"

    def stored(self, format: StorageFormat) -> list[StoredTensor]:
        """The tensors of a file of this format."""
        config = self.checkpoint.config
        sizes = self.family.sizes(config)
        stored = [StoredTensor(name, x.shape, "F32", "F32") for name, x in self.extra.items()]
        for entry in self.entries:
            role = role_of(self.family, entry.template, config)
            type_name = format.type_of(role, entry.layer, sizes)
            kind = fitting(type_name, entry.shape[-1])
            stored.append(StoredTensor(entry.name, entry.shape, type_name, kind))
        return stored


def write(path: Path, source: ExportSource, format: StorageFormat) -> list[StoredTensor]:
    """Write the GGUF file and return its tensors.

    For K-quants, a temporary file of plain floats is written first, and llama.cpp quantizes it.
    Raises UserError when the disk has too little space or a value does not fit the type.
    """
    stored = source.stored(format)
    if not format.by_llama_cpp:
        require_space(path.parent, int(NEEDED * sum(tensor.bytes for tensor in stored)))
        _write(path, source, format.name, stored)
        return stored
    plain = find_gguf(source.lossless_type())
    intermediate = path.with_name(f"{path.stem}.{plain.name}.intermediate.gguf")
    unquantized = source.stored(plain)
    space = sum(tensor.bytes for tensor in (*unquantized, *stored))
    require_space(path.parent, int(NEEDED * space))
    try:
        _write(intermediate, source, plain.name, unquantized)
        llama_cpp.quantize(intermediate, path, file_type(format.name))
    finally:
        intermediate.unlink(missing_ok=True)
    wanted_types = {tensor.name: tensor.wanted for tensor in stored}
    return [
        StoredTensor(name, shape, wanted_types[name], kind) for name, shape, kind in contents(path)
    ]


def contents(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of a GGUF file's tensors; raises UserError for a broken file."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, IndexError, OSError, KeyError) as error:
        raise UserError(
            f"{path} is truncated or not a GGUF file: {error}; export it again"
        ) from None
    return [(t.name, tuple(map(int, t.shape[::-1])), t.tensor_type.name) for t in tensors]


def file_type(type_name: str) -> int:
    """llama.cpp's number for a file of this type."""
    from gguf import LlamaFileType

    prefix = "ALL" if type_name == "F32" else "MOSTLY"
    return int(LlamaFileType[f"{prefix}_{type_name}"])


def _write(path: Path, source: ExportSource, type_name: str, stored: list[StoredTensor]) -> None:
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
            float32 = np.dtype(np.float32)  # not a byte dtype: the shape counts values
            writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.bytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        entries = {entry.name: entry for entry in source.entries}
        with progress(f"export: {path.name}", sum(t.bytes for t in stored), "bytes") as counter:
            for tensor in stored:
                values = source.extra.get(tensor.name)
                if values is None:
                    values = read(source.checkpoint, family, entries[tensor.name])
                writer.write_tensor_data(_packed(values, tensor))
                counter.advance(tensor.bytes)
    finally:
        writer.close()


def _packed(values: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """The values packed in the tensor's type; raises UserError for values beyond F16's range."""
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
    assert packed.nbytes == tensor.bytes, tensor
    return packed
