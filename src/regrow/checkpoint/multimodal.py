"""A multimodal checkpoint: a text model, which the stages see, among other tensors.

A folder's config.json has the text model in `text_config`. The stages see the config and the
tensors of the text model alone, under the names of its own class: `model.layers.0…`, `lm_head.…`.
A folder that is written again has the whole config, and the other tensors byte for byte.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.checkpoint.from_config import on_meta, stock_config
from regrow.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

TEXT = "text_config"
PARTS = ("vision_config", "audio_config", TEXT)
"""Keys by which a config is told to be multimodal."""
LOCAL = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Fields of a text_config that are left as they are in the file."""
BASE, EMBED, HEAD = "model.", "embed_tokens.weight", "lm_head.weight"


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with more than a text model in it."""
    return any(config.get(key) for key in PARTS)


@dataclass(frozen=True)
class Multimodal:
    """What is around the text model of a folder: the whole config, and names on disk."""

    config: dict[str, Any]
    """The fields of config.json."""
    text_config: dict[str, Any]
    """The text model's fields, with those that its class fills in."""
    disk_names: dict[str, str]
    """The name on disk of each tensor of the text model."""
    others: tuple[str, ...]
    """Names on disk of all other tensors, which are carried over."""
    base: str
    """What names on disk have in place of `model.`."""
    head: str
    """The name on disk of the text model's head."""

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor of the text model, or of a cut text model."""
        if name == HEAD:
            return self.head
        assert name.startswith(BASE), name
        return self.base + name.removeprefix(BASE)

    def whole_config(self, text_config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json for a text model with other fields."""
        new, before = copy.deepcopy(self.config), self.config[TEXT]
        kept = (*LOCAL, "tie_word_embeddings")
        text = {key: value for key, value in text_config.items() if key not in kept}
        new[TEXT] = {**text, **{key: before[key] for key in kept if key in before}}
        if text_config["tie_word_embeddings"] != self.text_config["tie_word_embeddings"]:
            new["tie_word_embeddings"] = text_config["tie_word_embeddings"]
        return new


def read_multimodal(
    config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> Multimodal:
    """Tell the text model of a multimodal folder from the rest; `shapes` are by name on disk.

    Raises UserError for a model of which transformers has no text model alone, and for tensors
    among which no text model is found.
    """
    text = text_config_of(stock_config(config, folder), folder)
    rows = text["vocab_size"], text["hidden_size"]
    found = [name for name in shapes if name.endswith(f".{EMBED}") and shapes[name] == rows]
    if len(found) != 1:
        raise UserError(
            f"{folder} is multimodal, and {len(found)} of its tensors are an embedding of "
            f"{rows[0]} tokens in {rows[1]} channels: its text model is not found"
        )
    base = found[0].removesuffix(EMBED)
    heads = [name for name in shapes if name == HEAD or name.endswith(f".{HEAD}")]
    inside = _parts_of(text)
    disk_names, others = {}, []
    for name in shapes:
        rest = name.removeprefix(base)
        if rest != name and rest.partition(".")[0] in inside:
            disk_names[BASE + rest] = name
        elif name in heads[:1]:
            disk_names[HEAD] = name
        else:
            others.append(name)
    head = (heads or [_head_for(base)])[0]
    return Multimodal(config, text, disk_names, tuple(others), base, head)


def text_config_of(stock: PretrainedConfig, place: Path) -> dict[str, Any]:
    """The fields of the text model of a stock config; raises UserError if it has no own class."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = getattr(stock, TEXT, None)
    if text is None or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = stock.model_type if text is None else text.model_type
        raise UserError(
            f"{place} is multimodal, and transformers has no class for its text model alone "
            f"({kind}): it is not supported"
        )
    fields: dict[str, Any] = text.to_dict()
    for key in LOCAL:
        fields.pop(key, None)
    fields["tie_word_embeddings"] = bool(getattr(stock, "tie_word_embeddings", False))
    return fields


def around(
    whole: Multimodal,
    layout: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    others: Mapping[str, torch.Tensor],
    read: Any,
) -> tuple[dict[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]:
    """Layout and stream of a whole folder, from those of its text model.

    `others` maps the other tensors to tensors of their shape and dtype; `read` reads one.
    """
    new = {whole.on_disk(name): tensor for name, tensor in layout.items()} | dict(others)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            yield whole.on_disk(name), tensor
        for name in others:
            yield name, read(name)

    return new, stream()


def open_whole(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The whole model of a folder, opened by its stock class, in eval mode.

    Raises AssertionError if the folder lacks a tensor of the class.
    """
    import transformers
    from transformers import AutoModelForImageTextToText

    kinds = [getattr(transformers, name, None) for name in config.get("architectures") or []]
    kind: Any = next(filter(None, kinds), AutoModelForImageTextToText)
    model, loaded = kind.from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
    )
    assert not loaded["missing_keys"], f"{folder} lacks {sorted(loaded['missing_keys'])[:3]}"
    opened: PreTrainedModel = model.eval()
    return opened


def _parts_of(text_config: dict[str, Any]) -> set[str]:
    """Names of the modules and parameters directly in the base of the text model."""
    base = on_meta(stock_config(text_config)).base_model
    return {*dict(base.named_children()), *dict(base.named_parameters(recurse=False))}


def _head_for(base: str) -> str:
    """Where the head would be beside a text model at `base`."""
    inner = base.removesuffix(BASE)
    return inner + HEAD if base.endswith(BASE) else HEAD
