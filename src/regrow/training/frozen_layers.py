"""The first blocks of a student, frozen; run once for both models where they are the teacher's.

A student whose layers were cut further up begins as its teacher does. Frozen there, it needs no
gradients there, and what its first blocks would compute the teacher has just computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regrow.errors import UserError

# In a config, what may differ between models whose first blocks compute the same.
ELSEWHERE = {
    *("num_hidden_layers", "layer_types", "max_window_layers", "mlp_only_layers", "vocab_size"),
    *("tie_word_embeddings", "dtype", "use_cache", "architectures", "transformers_version"),
    *("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def check(model: PreTrainedModel, count: int) -> None:
    """Raise UserError unless 0 ≤ count < blocks; `model` may be on the meta device."""
    most = len(decoder_layers(model)) - 1
    if count > most:
        raise UserError(f"freeze_layers {count}: allowed are 0 to {most}, one block must train")


def freeze(model: PreTrainedModel, count: int) -> None:
    """Embedding, a head tied to it, and the first `count` blocks train no more."""
    for module in (model.get_input_embeddings(), *decoder_layers(model)[:count]):
        module.requires_grad_(False)


def same(student: PreTrainedModel, teacher: PreTrainedModel, count: int) -> bool:
    """Whether embedding and first `count` blocks are the teacher's, in the teacher's dtype."""
    ours, theirs = student.config.to_dict(), teacher.config.to_dict()
    if {k: v for k, v in ours.items() if k not in ELSEWHERE} != {
        k: v for k, v in theirs.items() if k not in ELSEWHERE
    }:
        return False
    if (ours.get("layer_types") or [])[:count] != (theirs.get("layer_types") or [])[:count]:
        return False
    pairs = [(student.get_input_embeddings(), teacher.get_input_embeddings())]
    pairs += zip(decoder_layers(student)[:count], decoder_layers(teacher)[:count], strict=True)
    return all(_equal(one.state_dict(), other.state_dict()) for one, other in pairs)


class SharedPrefix:
    """Lets the teacher run the first `count` blocks for both; it must run first in each step.

    With `all_layers` the student's layers each give what the teacher's gave, for feature losses
    that read them; else only the last one's output is held.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, count: int, all_layers: bool
    ) -> None:
        self.states: dict[int, Tensor] = {}
        self.wanted = set(range(count)) if all_layers else {count - 1}
        self.layers = decoder_layers(student)[:count]
        self.hooks = []
        for n, (ours, theirs) in enumerate(
            zip(self.layers, decoder_layers(teacher)[:count], strict=True)
        ):
            self.hooks.append(theirs.register_forward_hook(partial(self._keep, n)))
            ours.forward = partial(self._recall, n)

    def close(self) -> None:
        """Let the student run its own blocks again."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers:
            del layer.forward
        self.states.clear()

    def _keep(self, n: int, layer: nn.Module, given: Any, state_BTH: Tensor) -> None:
        if n in self.wanted:
            self.states[n] = state_BTH

    def _recall(self, n: int, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The teacher's state in the student's dtype; taken once, so that no old one is read."""
        if n not in self.wanted:
            return hidden_states
        return self.states.pop(n).to(hidden_states.device, hidden_states.dtype)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """A model's decoder blocks; raises UserError where they are no list."""
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
