"""Size: parameters, and bytes of the weights."""

from __future__ import annotations

from regrow import families
from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.gguf_model import GgufEvalModel, GgufFile


def measure(subject: EvalModel, context: Context) -> MetricResult:
    """Parameters, tied ones counted once, and the bytes of the tensors in the safetensors files.

    Of a GGUF file those of the whole; of what is quantized also bits per weight.
    """
    if isinstance(subject, GgufEvalModel):
        return _of_file(subject.file)
    assert isinstance(subject, FolderEvalModel)
    checkpoint = subject.checkpoint
    if checkpoint.quantized:  # scales and zero points are no parameters
        parameters = families.of(checkpoint).count(checkpoint.config)
    else:
        parameters = sum(p.numel() for p in subject.model.parameters())
    stored = sum(checkpoint.bytes(name) for name in checkpoint.names())
    dtypes = ", ".join(sorted({checkpoint.dtype(name) for name in checkpoint.names()}))
    how = f"tensors in the safetensors files; as {dtypes}"
    found = _figures(parameters, stored, "tied weights counted once", how)
    if checkpoint.quantized:
        found.append(_bits(stored, parameters))
    return MetricResult(found)


def _of_file(file: GgufFile) -> MetricResult:
    found = _figures(
        file.parameters,
        file.bytes,
        "weights of all tensors in the file",
        f"the whole GGUF file, its tokenizer included; {file.kind}",
    )
    return MetricResult([*found, _bits(file.tensor_bytes, file.parameters)])


def _figures(parameters: int, stored: int, counted: str, how: str) -> list[Figure]:
    return [
        Figure(name="parameters", value=parameters, convention=counted),
        Figure(name="bytes", value=stored, unit="bytes", convention=how),
    ]


def _bits(stored: int, parameters: int) -> Figure:
    return Figure(
        name="bits_per_weight",
        value=8 * stored / parameters,
        unit="bits",
        convention="bytes of all tensors × 8 ÷ parameters",
    )
