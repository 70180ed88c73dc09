"""Size: parameters, and bytes of the weights."""

from __future__ import annotations

from regrow import families
from regrow.manifest import Figure
from regrow.stages.evaluate.subject import Context, Measured, Subject


def measure(subject: Subject, context: Context) -> Measured:
    """Parameters, tied ones counted once, and the bytes of the tensors in the safetensors files."""
    checkpoint = subject.checkpoint
    if checkpoint.quantized:  # scales and zero points are no parameters
        parameters = families.of(checkpoint).count(checkpoint.config)
    else:
        parameters = sum(p.numel() for p in subject.model.parameters())
    stored = sum(checkpoint.bytes(name) for name in checkpoint.names())
    dtypes = ", ".join(sorted({checkpoint.dtype(name) for name in checkpoint.names()}))
    return Measured(
        [
            Figure(name="parameters", value=parameters, convention="tied weights counted once"),
            Figure(
                name="bytes",
                value=stored,
                unit="bytes",
                convention=f"tensors in the safetensors files; as {dtypes}",
            ),
        ]
    )
