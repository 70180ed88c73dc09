"""The table of all storage formats: how each stores a tensor, and which programs open it.

- `TYPES`: how one tensor is stored, and how many bytes it takes. A type packs the values of a row
  in blocks; a tensor whose row length is not a multiple of the block size gets the type's fallback.
- `SCHEMES`: the types that `regrow quantize` writes as compressed-tensors.
- `FORMATS`: which type each tensor of a model gets: in a Hugging Face folder (lower-case names) and
  in a GGUF file (llama.cpp's names).

The sizes of GGUF types are those of the gguf package (GGML_QUANT_SIZES). The mixes of K-quants
follow llama.cpp's quantizer (llama_tensor_get_type in llama-quant.cpp, without importance matrix).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from regrow.errors import unknown

Sizes = Mapping[str, int]
"""Sizes of a model by name of the dimension: layers, heads, kv_heads, experts, … (`families`)."""
SCALE_BITS = 16


@dataclass(frozen=True)
class TensorType:
    """How the values of one tensor are stored."""

    name: str
    block: int
    """Number of values of a row that are packed together."""
    bits: int
    """Bits of a block, including its scales and zero point."""
    fallback: str = ""
    """Type for a tensor whose row length is not a multiple of `block`."""
    row_bits: int = 0
    """Bits of the scale of each row, for types with one scale per row."""

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a tensor of this shape; `columns` must be a multiple of `block`."""
        assert columns % self.block == 0, (columns, self.block)
        return math.ceil(rows * (columns // self.block * self.bits + self.row_bits) / 8)


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors stores the weights of a linear layer."""

    name: str
    bits: int
    kind: Literal["int", "float"] = "int"
    group: int | None = None
    """Number of columns of a row that share a scale; None if the whole row shares one."""
    symmetric: bool = True
    """Whether the grid is centred on zero; otherwise each group has a zero point."""
    dynamic: bool = False
    """Whether the layer's inputs are quantized too, with a scale for each token."""
    fallback: str = ""
    """Scheme for a layer whose number of columns is not a multiple of `group`."""
    vllm_on_cpu: bool = False
    """Whether vLLM 0.32 opens it on a CPU (transformers opens every scheme)."""

    @property
    def needs_text(self) -> bool:
        """Whether calibration on text is useful: plain rounding to 8 bits already loses little."""
        return self.bits < 8

    @property
    def type(self) -> TensorType:
        """The scheme as a tensor type for `TYPES`."""
        if self.group is None:
            return TensorType(self.name, 1, self.bits, row_bits=SCALE_BITS)
        zero_point = 0 if self.symmetric else self.bits
        bits = self.group * self.bits + SCALE_BITS + zero_point
        return TensorType(self.name, self.group, bits, self.fallback)

    def groups(self, columns: int) -> int:
        """Number of scales of a row; `columns` must be a multiple of `group`."""
        assert self.group is None or columns % self.group == 0, (columns, self.group)
        return 1 if self.group is None else columns // self.group

    def fitting(self, columns: int) -> Scheme:
        """This scheme, or its fallback if it does not fit rows of `columns` weights."""
        return SCHEMES[fitting(self.name, columns)]


def _int4(group: int, fallback: str) -> list[Scheme]:
    """The schemes of a group size, without and with zero points; so are their int4 fallbacks."""
    name = f"int4-g{group}"
    with_zeros = fallback + ASYMMETRIC if fallback.startswith("int4") else fallback
    return [
        Scheme(name, 4, group=group, fallback=fallback, vllm_on_cpu=True),
        Scheme(
            name + ASYMMETRIC,
            4,
            group=group,
            symmetric=False,
            fallback=with_zeros,
            vllm_on_cpu=True,
        ),
    ]


ASYMMETRIC = "-asym"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, vllm_on_cpu=False),
        Scheme("int8-dynamic", 8, dynamic=True, vllm_on_cpu=True),
        Scheme("fp8", 8, "float", dynamic=True, vllm_on_cpu=True),
        *_int4(32, "int8"),
        *_int4(64, "int4-g32"),
        *_int4(128, "int4-g64"),
    )
}
SHORT = {"int4": "int4-g64"}
"""Short names of schemes."""


def _ggml(name: str, block: int, size: int, fallback: str = "F16") -> TensorType:
    """A GGUF type that packs `block` values into `size` bytes."""
    return TensorType(name, block, 8 * size, fallback)


TYPES = {
    kind.name: kind
    for kind in (
        *(TensorType("F32", 1, 32), TensorType("F16", 1, 16), TensorType("BF16", 1, 16)),
        *(_ggml("Q8_0", 32, 34), _ggml("Q5_1", 32, 24), _ggml("Q5_0", 32, 22)),
        *(_ggml("Q4_1", 32, 20), _ggml("Q4_0", 32, 18), _ggml("IQ4_NL", 32, 18)),
        *(_ggml("Q6_K", 256, 210, "Q8_0"), _ggml("Q5_K", 256, 176, "Q5_1")),
        *(_ggml("Q4_K", 256, 144, "Q5_0"), _ggml("Q3_K", 256, 110, "Q4_0")),
        _ggml("Q2_K", 256, 84, "Q4_0"),
        *(scheme.type for scheme in SCHEMES.values()),
    )
}


def fitting(type_name: str, columns: int) -> str:
    """The type `type_name`, or its first fallback that can pack rows of `columns` values."""
    while columns % TYPES[type_name].block:
        type_name = TYPES[type_name].fallback
    return type_name


Rule = tuple[str, str, Callable[[int, Sizes], bool]]
"""Last part of a linear layer's name, type of its weight, whether it applies to (layer, sizes)."""


@dataclass(frozen=True)
class StorageFormat:
    """A rule for the type of each tensor of a model."""

    name: str
    linear: str
    """Type of the linear layers' weights to which no rule applies."""
    embedding: str
    head: str
    """Type of the head, and of an embedding that is also the head."""
    other: str
    """Type of norms, biases, and the routers of a mixture of experts."""
    rules: tuple[Rule, ...] = ()
    """Exceptions among the linear layers; the first rule that applies decides."""
    by_llama_cpp: bool = False
    """Whether llama.cpp's quantizer writes the format, which is then a mix of K-quants."""

    def type_of(self, role: str, layer: int, sizes: Sizes) -> str:
        """The type that the format wants for a tensor, whether or not its rows fit the type.

        `role` is head, embedding, other, or the last part of a linear layer's name. down_proj means
        the last projection of every MLP and expert; v_proj also means a fused qkv_proj.
        """
        if role in ("head", "embedding", "other"):
            return str(getattr(self, role))
        fitting_rules = (
            kind for module, kind, applies in self.rules if module == role and applies(layer, sizes)
        )
        kind = next(fitting_rules, self.linear)
        return self._raised(role, kind, sizes) if self.by_llama_cpp else kind

    def _raised(self, role: str, kind: str, sizes: Sizes) -> str:
        """llama.cpp's type of attention weights in models with 8 experts or 70 B parameters."""
        if sizes.get("experts") == 8:
            if role in ("v_proj", "k_proj"):
                return "Q8_0"
            if role == "o_proj":
                return "Q5_K" if self.name in EIGHT_EXPERTS_Q5_K else self.linear
        of_70b = sizes["layers"] == 80 and sizes["heads"] != sizes["kv_heads"]
        return "Q5_K" if of_70b and role == "v_proj" and kind in ("Q3_K", "Q4_K") else kind

    def layers_by_type(self, role: str, sizes: Sizes) -> dict[str, int]:
        """Number of layers for each type of the linear layer `role`."""
        if not any(module == role for module, _, _ in self.rules):
            return {self.type_of(role, 0, sizes): sizes["layers"]}
        kinds = [self.type_of(role, layer, sizes) for layer in range(sizes["layers"])]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


EIGHT_EXPERTS_Q5_K = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
"""Mixes in which o_proj of a model with 8 experts gets Q5_K."""


def _everywhere(layer: int, sizes: Sizes) -> bool:
    return True


def _first(count: int) -> Callable[[int, Sizes], bool]:
    return lambda layer, sizes: layer < count


def _first_share(parts: int) -> Callable[[int, Sizes], bool]:
    return lambda layer, sizes: layer < sizes["layers"] // parts


def _more_bits(layer: int, sizes: Sizes) -> bool:
    """The first and the last eighth of the layers, and every third layer between them."""
    layers = sizes["layers"]
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _few_kv_heads(layer: int, sizes: Sizes) -> bool:
    return sizes["heads"] >= 4 * sizes["kv_heads"]


def _folder(name: str, linear: str, rest: str) -> StorageFormat:
    return StorageFormat(name, linear, rest, rest, rest)


def _gguf(name: str, head: str) -> StorageFormat:
    return StorageFormat(name, name, name, head, "F32")


def _k_quants(name: str, linear: str, *rules: Rule) -> StorageFormat:
    return StorageFormat(name, linear, linear, "Q6_K", "F32", rules, by_llama_cpp=True)


FOLDER_FORMATS = {
    each.name: each
    for each in (
        *(_folder(name, name.upper(), name.upper()) for name in ("f32", "f16", "bf16")),
        *(_folder(name, name, "BF16") for name in SCHEMES),
    )
}
"""Formats of Hugging Face folders, opened by transformers, and by vLLM as the schemes say."""
GGUF_FORMATS = {
    each.name: each
    for each in (
        *(_gguf(name, name) for name in ("F32", "F16", "BF16", "Q8_0")),
        *(_gguf(name, "Q8_0") for name in ("Q5_1", "Q5_0", "Q4_1", "Q4_0")),
        _k_quants("Q6_K", "Q6_K"),
        _k_quants(
            "Q5_K_M",
            "Q5_K",
            ("v_proj", "Q6_K", _more_bits),
            ("down_proj", "Q6_K", _more_bits),
        ),
        _k_quants("Q5_K_S", "Q5_K"),
        _k_quants(
            "Q4_K_M",
            "Q4_K",
            ("v_proj", "Q6_K", _more_bits),
            ("down_proj", "Q6_K", _more_bits),
        ),
        _k_quants(
            "Q4_K_S",
            "Q4_K",
            ("v_proj", "Q5_K", _first(4)),
            ("down_proj", "Q5_K", _first_share(8)),
        ),
        _k_quants(
            "Q3_K_L",
            "Q3_K",
            *((module, "Q5_K", _everywhere) for module in ("v_proj", "down_proj", "o_proj")),
        ),
        _k_quants(
            "Q3_K_M",
            "Q3_K",
            ("v_proj", "Q5_K", _first(2)),
            ("down_proj", "Q5_K", _first_share(16)),
            *((module, "Q4_K", _everywhere) for module in ("v_proj", "down_proj", "o_proj")),
        ),
        _k_quants("Q3_K_S", "Q3_K"),
        _k_quants(
            "Q2_K",
            "Q2_K",
            ("v_proj", "Q4_K", _few_kv_heads),
            *((module, "Q3_K", _everywhere) for module in ("v_proj", "down_proj", "o_proj")),
        ),
    )
}
"""Formats of GGUF files, opened by llama.cpp and Ollama on CPUs and GPUs."""
FORMATS = FOLDER_FORMATS | GGUF_FORMATS


def find(name: str) -> StorageFormat:
    """The format of that name, in upper or lower case; raises UserError when there is none.

    The names f32, f16 and bf16 mean folders; F32, F16 and BF16 mean GGUF files.
    """
    for candidate in (SHORT.get(name, name), name.lower(), name.upper()):
        if candidate in FORMATS:
            return FORMATS[candidate]
    others = (candidate for candidate in GGUF_FORMATS if candidate.lower() not in FOLDER_FORMATS)
    raise unknown("format", name, [*FOLDER_FORMATS, *others])


def find_scheme(name: str) -> Scheme:
    """The scheme of that name; raises UserError when there is none."""
    if SHORT.get(name, name) not in SCHEMES:
        raise unknown("scheme", name, [*SHORT, *SCHEMES])
    return SCHEMES[SHORT.get(name, name)]


def find_gguf(name: str) -> StorageFormat:
    """The GGUF format of that name, upper or lower case; raises UserError when there is none."""
    if name.upper() not in GGUF_FORMATS:
        raise unknown("type", name, GGUF_FORMATS)
    return GGUF_FORMATS[name.upper()]


@dataclass(frozen=True)
class StoredTensor:
    """The storage of one tensor, or of several tensors of one shape."""

    name: str
    shape: tuple[int, ...]
    """In torch's order: the last axis runs along a row."""
    wanted: str
    """Type that the format wants for the tensor."""
    type: str
    """Type that the tensor gets: `wanted` or a fallback."""
    count: int = 1

    @property
    def weights(self) -> int:
        """Number of values of all tensors."""
        return self.count * math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        rows = math.prod(self.shape[:-1])
        return self.count * TYPES[self.type].bytes(rows, self.shape[-1])


def fallback_lines(tensors: Iterable[StoredTensor]) -> list[str]:
    """A line for each type that rows did not fit: the tensors, the type they get, and the cost."""
    groups: dict[tuple[str, str, int], list[StoredTensor]] = {}
    for tensor in tensors:
        if tensor.wanted != tensor.type:
            key = (tensor.wanted, tensor.type, tensor.shape[-1])
            groups.setdefault(key, []).append(tensor)
    lines = []
    for (wanted, kind, columns), members in sorted(groups.items()):
        block, bits = TYPES[wanted].block, TYPES[wanted].bits
        size = sum(tensor.bytes for tensor in members)
        more = size - sum(tensor.weights for tensor in members) * bits / block / 8
        names = ", ".join(dict.fromkeys(tensor.name.split(".")[-2] for tensor in members))
        count = sum(tensor.count for tensor in members)
        reason = f"not a multiple of {block}" if columns % block else "as other experts need"
        lines.append(
            f"{count} tensors ({names}) with rows of {columns}, {reason}: {kind} instead of "
            f"{wanted}, {size / 1e6:.2f} MB, {more / 1e6:.2f} MB more"
        )
    return lines
