"""Packs rounded weights as compressed-tensors stores them, and builds their config.json entry.

Shapes: R rows, C columns, G groups of columns per row.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regrow.errors import UserError
from regrow.quantization.formats import Scheme
from regrow.quantization.grid import Grid


def check_extra() -> None:
    """Raise UserError when compressed-tensors is not installed."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(
            "quantized folders are written and read by compressed-tensors: "
            "pip install 'regrow[quantize]'"
        )


def packed(weight_RC: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The tensors to store for a rounded weight; the keys are the last part of their names."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = grid.scheme
    state = {"weight": weight_RC.float(), "weight_scale": grid.scale_RG}
    if grid.zero_RG is not None:
        state["weight_zero_point"] = grid.zero_RG
    compressor: Any = BaseCompressor.get_value_from_registry(format_of(scheme))
    stored: dict[str, Tensor] = compressor.compress(state, _scheme(scheme, ["Linear"]))
    return {name: tensor.contiguous() for name, tensor in sorted(stored.items())}


def layout(
    shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that `packed` returns for a weight of this shape."""
    rows, columns = shape
    groups = scheme.groups(columns)
    scale = {"weight_scale": ((rows, groups), dtype)}
    if format_of(scheme) != "pack-quantized":
        stored = torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn
        return dict(sorted({**scale, "weight": ((rows, columns), stored)}.items()))
    words = math.ceil(columns * scheme.bits / 32)
    packed = {"weight_packed": ((rows, words), torch.int32), "weight_shape": ((2,), torch.int64)}
    if not scheme.symmetric:
        words = math.ceil(rows * scheme.bits / 32)
        packed["weight_zero_point"] = ((words, groups), torch.int32)
    return dict(sorted({**scale, **packed}.items()))


def format_of(scheme: Scheme) -> str:
    """The compressed-tensors format of a scheme."""
    if not scheme.dynamic:
        return "pack-quantized"
    return "int-quantized" if scheme.kind == "int" else "float-quantized"


def quantization_config(chosen: dict[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json; `kept` are the linear modules that stay unquantized."""
    from compressed_tensors.quantization import QuantizationConfig

    names = sorted({scheme.name for scheme in chosen.values()})
    by_name = {scheme.name: scheme for scheme in chosen.values()}
    groups = {}
    for number, name in enumerate(names):
        targets = ["Linear"] if len(names) == 1 else _targets(chosen, name)
        groups[f"group_{number}"] = _scheme(by_name[name], targets)
    formats = {format_of(scheme) for scheme in by_name.values()}
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=sorted(kept),
    )
    entry: dict[str, Any] = config.model_dump(mode="json")
    if not all(scheme.symmetric for scheme in by_name.values()):
        # transformers' modules for packed weights have no tensor for packed zero points; with this
        # key it unpacks the weights while loading. vLLM ignores the key.
        entry["dequantize"] = True
    return entry


def _scheme(scheme: Scheme, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind = {"num_bits": scheme.bits, "type": scheme.kind}
    strategy = "channel" if scheme.group is None else "group"
    weights = QuantizationArgs(
        **kind, symmetric=scheme.symmetric, strategy=strategy, group_size=scheme.group
    )
    inputs = None
    if scheme.dynamic:
        inputs = QuantizationArgs(**kind, symmetric=True, strategy="token", dynamic=True)
    return QuantizationScheme(
        targets=targets, weights=weights, input_activations=inputs, format=format_of(scheme)
    )


def _targets(chosen: dict[str, Scheme], name: str) -> list[str]:
    """The modules of a scheme: a pattern where all layers have the same one, otherwise names."""
    kinds: dict[str, list[str]] = {}
    for module in chosen:
        kinds.setdefault(re.sub(r"\.\d+\.", ".#.", module), []).append(module)
    targets = []
    for kind, modules in kinds.items():
        members = [module for module in modules if chosen[module].name == name]
        if len(members) == len(modules) > 1:
            targets.append(f"re:{re.escape(kind).replace(re.escape('.#.'), r'[.][0-9]+[.]')}$")
        else:
            targets += members
    return targets
