"""Size: number of parameters, and bytes of the weights."""

from __future__ import annotations

import torch

from regrow import families
from regrow.checkpoint.bitmask import SERVED, stored_bytes
from regrow.sparsity import zeros
from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.gguf_model import GgufEvalModel, GgufFile


def measure(model: EvalModel, context: Context) -> MetricResult:
    """Count the parameters, tied ones once, and the bytes of the tensors in the safetensors files.

    For a GGUF file, the bytes are those of the whole file. Quantized models also get bits per
    weight. Sparse models also get the share of zeros, and the bytes without them.
    """
    if isinstance(model, GgufEvalModel):
        return _of_file(model.file)
    assert isinstance(model, FolderEvalModel)
    checkpoint = model.checkpoint
    if checkpoint.quantized:  # scales and zero points are not parameters
        parameters = families.of(checkpoint).count(checkpoint.config)
    else:
        parameters = sum(p.numel() for p in model.model.parameters())
    stored = sum(checkpoint.bytes(name) for name in checkpoint.names())
    dtypes = ", ".join(sorted({checkpoint.dtype(name) for name in checkpoint.names()}))
    convention = f"tensors in the safetensors files; as {dtypes}"
    figures = _figures(parameters, stored, "tied weights counted once", convention)
    if checkpoint.quantized:
        figures.append(_bits(stored, parameters))
    return MetricResult([*figures, *_zeros(model, parameters, stored)])


def _zeros(model: FolderEvalModel, parameters: int, stored: int) -> list[Figure]:
    """Share of zeros and bytes as bitmasks; none of these figures for a model that is dense."""
    sparse = [
        weight
        for name, weight in model.model.named_parameters()
        if ".layers." in name and weight.ndim > 1 and zeros.is_sparse(weight)
    ]
    if not sparse:
        return []
    count = sum(int((weight == 0).sum()) for weight in sparse)
    convention = "exact zeros in the sparse matrices ÷ all parameters"
    figures = [Figure(name="zeros", value=count / parameters, convention=convention)]
    if model.checkpoint.quantized or any(weight.ndim != 2 for weight in sparse):
        return figures  # bitmasks are written for plain matrices only
    size = getattr(torch, model.checkpoint.main_dtype).itemsize
    saved = sum(
        weight.numel() * size - stored_bytes(tuple(weight.shape), int((weight != 0).sum()), size)
        for weight in sparse
    )
    convention = f"as regrow export --type bitmask stores them; {SERVED}"
    name = "bytes_as_bitmask"
    return [
        *figures,
        Figure(name=name, value=stored - saved, unit="bytes", convention=convention),
    ]


def _of_file(file: GgufFile) -> MetricResult:
    figures = _figures(
        file.parameters,
        file.bytes,
        "weights of all tensors in the file",
        f"the whole GGUF file, its tokenizer included; {file.kind}",
    )
    return MetricResult([*figures, _bits(file.tensor_bytes, file.parameters)])


def _figures(parameters: int, stored: int, counted: str, convention: str) -> list[Figure]:
    return [
        Figure(name="parameters", value=parameters, convention=counted),
        Figure(name="bytes", value=stored, unit="bytes", convention=convention),
    ]


def _bits(stored: int, parameters: int) -> Figure:
    return Figure(
        name="bits_per_weight",
        value=8 * stored / parameters,
        unit="bits",
        convention="bytes of all tensors × 8 ÷ parameters",
    )
