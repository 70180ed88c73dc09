"""Size: number of parameters, and bytes of the weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
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
    own = _zeros_loaded(model.model) if checkpoint.quantized else _zeros_stored(checkpoint)
    return MetricResult([*figures, *_zeros(*own, parameters, stored)])


def _zeros_stored(checkpoint: Checkpoint) -> tuple[int, int]:
    """Zeros in the sparse matrices of a checkpoint, and the bytes that bitmasks save."""
    count = saved = 0
    least = max(zeros.least_share(checkpoint), 1e-9)
    for _, weight in zeros.weights(checkpoint):
        if not zeros.is_sparse(weight, least):
            continue
        here = int((weight == 0).sum())
        small = stored_bytes(tuple(weight.shape), weight.numel() - here, weight.itemsize)
        count, saved = count + here, saved + max(0, weight.nbytes - small)
    return count, saved


def _zeros_loaded(model: PreTrainedModel) -> tuple[int, int]:
    """Zeros in the sparse matrices of a quantized model, for which there are no bitmasks."""
    sparse = [
        weight
        for name, weight in model.named_parameters()
        if ".layers." in name and weight.ndim > 1 and zeros.is_sparse(weight)
    ]
    return sum(int((weight == 0).sum()) for weight in sparse), 0


def _zeros(count: int, saved: int, parameters: int, stored: int) -> list[Figure]:
    """Share of zeros and bytes as bitmasks; none of these figures for a model that is dense."""
    if not count:
        return []
    convention = "exact zeros in the sparse matrices ÷ all parameters"
    figures = [Figure(name="zeros", value=count / parameters, convention=convention)]
    if saved:
        figures.append(
            Figure(
                name="bytes_as_bitmask",
                value=stored - saved,
                unit="bytes",
                convention=f"as regrow export --type bitmask stores them; {SERVED}",
            )
        )
    return figures


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
