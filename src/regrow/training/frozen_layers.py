"""Freezes the first layers of a student; if they equal the teacher's, they run once for both.

If only later layers of a student were cut, it begins with its teacher's layers. While these are
frozen, the student needs no gradients there, and the teacher has already computed their outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.errors import UserError

MAY_DIFFER = {
    *("num_hidden_layers", "layer_types", "max_window_layers", "mlp_only_layers", "vocab_size"),
    *("tie_word_embeddings", "dtype", "use_cache", "architectures", "transformers_version"),
    *("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Config keys that may differ between two models whose first layers are equivalent."""


def check(model: PreTrainedModel, count: int) -> None:
    """Raise UserError if not 0 ≤ count < number of layers; `model` may be on the meta device."""
    most = len(decoder_layers(model)) - 1
    if count > most:
        raise UserError(
            f"freeze_layers {count}: allowed are 0 to {most}, at least one layer must train"
        )


def freeze(model: PreTrainedModel, count: int) -> None:
    """Freeze the embedding, a head tied to it, and the first `count` layers."""
    for module in (model.get_input_embeddings(), *decoder_layers(model)[:count]):
        module.requires_grad_(False)


def same(student: PreTrainedModel, teacher: PreTrainedModel, count: int) -> bool:
    """Whether embedding and first `count` layers equal the teacher's, in the teacher's dtype."""
    configs = [model.config.to_dict() for model in (student, teacher)]
    kinds = [(config.get("layer_types") or [])[:count] for config in configs]
    kept = [{k: v for k, v in config.items() if k not in MAY_DIFFER} for config in configs]
    if kinds[0] != kinds[1] or kept[0] != kept[1]:
        return False
    pairs = [(student.get_input_embeddings(), teacher.get_input_embeddings())]
    pairs += zip(decoder_layers(student)[:count], decoder_layers(teacher)[:count], strict=True)
    return all(_equal(one.state_dict(), other.state_dict()) for one, other in pairs)


class SharedPrefix:
    """Runs the first `count` layers only in the teacher, which must run first in each step.

    With `all_layers` each of the student's layers returns the teacher's output, for feature losses
    that read it. Otherwise only the output of the last shared layer is kept.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, count: int, all_layers: bool
    ) -> None:
        self.states: dict[int, Tensor] = {}
        self.wanted = set(range(count)) if all_layers else {count - 1}
        self.layers = decoder_layers(student)[:count]
        self.hooks = []
        pairs = zip(self.layers, decoder_layers(teacher)[:count], strict=True)
        for n, (student_layer, teacher_layer) in enumerate(pairs):
            self.hooks.append(teacher_layer.register_forward_hook(partial(self._keep, n)))
            student_layer.forward = partial(self._recall, n)

    def close(self) -> None:
        """Remove the hooks, so that the student runs its own layers again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            del layer.forward
        self.states.clear()

    def _keep(self, n: int, layer: nn.Module, arguments: Any, state_BTH: Tensor) -> None:
        if n in self.wanted:
            self.states[n] = state_BTH

    def _recall(self, n: int, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The teacher's state in the student's dtype; removes it, so that it is not used twice."""
        if n not in self.wanted:
            return hidden_states
        return self.states.pop(n).to(hidden_states.device, hidden_states.dtype)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """A model's decoder layers; raises UserError if `base_model.layers` is not a list."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        name = model.config.model_type
        raise UserError(
            f"a {name} model has no list of layers: leave out freeze_layers and torch_compile"
        )
    return layers


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.shape == other[name].shape
        and torch.equal(value.to(other[name].device, other[name].dtype), other[name])
        for name, value in one.items()
    )
