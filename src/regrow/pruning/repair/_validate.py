"""Measure whether a repair helps the whole model, on text that was not used to fit it.

The error of every single layer can fall while the model gets worse: the errors of layers interact,
and a norm after attention or MLP (Gemma 3) amplifies them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regrow.data.sequences import Sequences, fit_and_validate
from regrow.layerwise import LayerByLayer
from regrow.pruning.cut import cut_layers
from regrow.pruning.repair import Repaired, RepairSetup
from regrow.training.head import head_of
from regrow.training.teacher import mean_loss, reference_states

TOKENS = 4096  # enough to see a relevant difference in KL, as both models read the same text


@torch.no_grad()
def validation_kl(
    setup: RepairSetup, repairs: Sequence[Repaired | None]
) -> tuple[list[float], int]:
    """KL(dense ‖ cut) in nats per token for each repair (None: no repair), and the token count.

    The text is up to 4,096 tokens of the profile's validation sequences. One layer of a model is in
    memory at a time.
    """
    setup = setup.with_whole_vocabulary()
    batch = _validation_batch(setup)
    device = setup.options.torch_device()
    cut_arguments = (setup.checkpoint, setup.plan, setup.family, device)
    dense = LayerByLayer.of(setup.checkpoint, setup.family, device)
    model = dense.streamed()
    reference = reference_states(model, [batch])
    values = []
    for repair in repairs:
        student = cut_layers(*cut_arguments, replace=repair, like=dense).streamed()
        values.append(mean_loss(student, [batch], reference, head_of(model), "forward_kl"))
    return values, len(reference[0])


def _validation_batch(setup: RepairSetup) -> dict[str, Tensor]:
    """One batch, so that each layer is read once; all tokens but the first of a text are scored."""
    sequences = Sequences.load(setup.profile.sequences_path())
    count = max(1, TOKENS // sequences.length)
    subsets = dict(fit_and_validate(sequences, len(sequences), len(sequences)))
    batch = {name: tensor[:count] for name, tensor in subsets["validate"].items()}
    follows = batch["real"] & (batch["position_ids"] > 0)
    return {**batch, "labels": batch["input_ids"].masked_fill(~follows, -100)}
