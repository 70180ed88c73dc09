"""Feature losses compare hidden states of the two models. Each is one file, named by the loss.

A feature loss is `loss(student, teacher, mapping, mask_BT)`. Its arguments are the `ModelFeatures`
of both models, the `LayerMapping` between them, and a mask of the tokens that count. It returns the
sum over those tokens, averaged over the mapped layers and heads: a scalar in float32 or float64,
differentiable with respect to the student, 0 for equal models. `NEEDS` names its inputs: `outputs`
(of layers, in the teacher's channels), `embeddings`, `attentions`, and `lens` (layers at chosen
depths, each read through its own model's final norm and head).
"""
