"""Cut students, what hooks see inside them, and every feature loss written slowly, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import float64_norms, random_plan, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from regrow import plugins
from regrow.plan import Plan
from regrow.pruning.cut import cut_model
from regrow.training.features import FEATURE_LOSSES, FeatureLosses, LayerMapping, give_attentions
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import Teacher, scored

NAMES = plugins.names(FEATURE_LOSSES)
KL = LossWeights({"forward_kl": 1.0})
KEPT = [0, 2, 3, 5]
# What stands before each kept layer in the teacher: blocks 1, 2 and 4.
OUTPUTS = ((0, 1), (1, 2), (2, 4))
LENS = ((0, 1), (2, 4))
FAMILIES: dict[str, dict[str, int]] = {
    "llama": {"hidden": 36, "heads": 4, "mlp": 20},
    "qwen3": {"kv_heads": 1},
    "gemma3_text": {"hidden": 36},
}


def family(
    model_type: str = "llama", shaken: float = 0.05, **after: int | list[int]
) -> tuple[PreTrainedModel, Teacher, Plan]:
    """A student cut from a teacher of six layers, shaken a little; both eager, all of float64."""
    sliding = [*["sliding_attention"] * 2, "full_attention"] * 2
    special = {"layer_types": sliding} if model_type == "gemma3_text" else {}
    model = tiny_model(model_type, torch.float64, seed=4, num_hidden_layers=6, **special)
    plan = random_plan(model.config.to_dict(), **{"layers": KEPT, **after})
    student = cut_model(model, plan)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(shaken * noise)
    for part in (model, student):
        give_attentions(float64_norms(part))
    return student, Teacher(model), plan


def match_of(plan: Plan) -> LayerMapping:
    return LayerMapping.of_plan(plan).read_at(LENS)


def loss_weights_of(plan: Plan, *names: str, weight: float = 3.0) -> FeatureLosses:
    return FeatureLosses(dict.fromkeys(names, weight), match_of(plan))


@dataclass
class Seen:
    """What hooks saw of one forward pass, and how the model reads a state out."""

    model: Any
    embedded: list[Tensor] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)

    def read(self, state_H: Tensor) -> Tensor:
        """log-probabilities of the next token."""
        logits_V: Tensor = self.model.lm_head(self.model.base_model.norm(state_H)).log_softmax(-1)
        return logits_V


def see(model: Any, ids_BT: Tensor, position_ids: Tensor) -> Seen:
    recorder, base = Seen(model), model.base_model
    handles = [base.embed_tokens.register_forward_hook(lambda *a: recorder.embedded.append(a[2]))]
    for layer in base.layers:
        hooks = (
            (layer, lambda *a: recorder.sequences.append(a[2])),
            (layer.self_attn, lambda *a: recorder.attentions.append(a[2][1])),
        )
        handles += [module.register_forward_hook(hook) for module, hook in hooks]
    base(input_ids=ids_BT, position_ids=position_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return recorder


def _relative(s_H: Tensor, t_H: Tensor) -> Tensor:
    return (s_H - t_H).square().sum() / t_H.square().sum()


def _channels(plan: Plan) -> list[int]:
    return list(range(plan.before["hidden"])) if plan.hidden is None else plan.hidden


def _states(s: Seen, t: Seen, plan: Plan, at: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for student_layer, teacher_layer in OUTPUTS:
        yield s.sequences[student_layer][at], t.sequences[teacher_layer][at][_channels(plan)]


def _hidden(s: Seen, t: Seen, plan: Plan, at: Any) -> Tensor:
    return sum(_relative(*pair) for pair in _states(s, t, plan, at)) / len(OUTPUTS)


def _hidden_cosine(s: Seen, t: Seen, plan: Plan, at: Any) -> Tensor:
    angles = (1 - a @ b / (a.norm() * b.norm()) for a, b in _states(s, t, plan, at))
    return sum(angles) / len(OUTPUTS)


def _embeddings(s: Seen, t: Seen, plan: Plan, at: Any) -> Tensor:
    return _relative(s.embedded[0][at], t.embedded[0][at][_channels(plan)])


def _attention(s: Seen, t: Seen, plan: Plan, at: Any) -> Tensor:
    b, query = at
    total, count = torch.zeros((), dtype=torch.float64), 0
    for student_layer, teacher_layer in enumerate(KEPT):
        heads = plan.kept("heads", teacher_layer) or range(plan.before["heads"])
        for student_head, head in enumerate(heads):
            count += 1
            for key in range(query + 1):
                p, q = (
                    t.attentions[teacher_layer][b, head, query, key],
                    s.attentions[student_layer][b, student_head, query],
                )
                if p > 0:
                    total = total + p * (p.log() - q[key].log())
    return total / count


def _read(s: Seen, t: Seen, at: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for student_layer, teacher_layer in LENS:
        yield s.read(s.sequences[student_layer][at]), t.read(t.sequences[teacher_layer][at])


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum()


def _logit_lens(s: Seen, t: Seen, plan: Plan, at: Any) -> Tensor:
    return sum(_kl(log_p, log_q) for log_q, log_p in _read(s, t, at)) / len(LENS)


def _logit_lens_symmetric(s: Seen, t: Seen, plan: Plan, at: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for log_q, log_p in _read(s, t, at):
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        total = total + (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return total / len(LENS)


SLOW: dict[str, Callable[[Seen, Seen, Plan, Any], Tensor]] = {
    "hidden": _hidden,
    "hidden_cosine": _hidden_cosine,
    "embeddings": _embeddings,
    "attention": _attention,
    "logit_lens": _logit_lens,
    "logit_lens_symmetric": _logit_lens_symmetric,
}


def slow(name: str, student: Any, teacher: Teacher, plan: Plan, batch: dict[str, Tensor]) -> Tensor:
    """The feature loss's sum over the scored tokens, token by token."""
    ids, positions = batch["input_ids"], batch["position_ids"]
    s = see(student, ids, positions)
    t = see(teacher.model, ids if teacher.ids_V is None else teacher.ids_V[ids], positions)
    places = scored(batch).nonzero().tolist()
    return sum(SLOW[name](s, t, plan, tuple(at)) for at in places)
