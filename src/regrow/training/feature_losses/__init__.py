"""Losses on features inside the models, beside the output losses: one file each.

A feature loss is `loss(student, teacher, mapping, mask_BT)`: two `ModelFeatures`, the
`LayerMapping` between them, and which tokens count. It returns a sum over those
tokens, a scalar of float32 at least with a graph to the student, 0 for equal models; a mean is
taken over the matched layers and heads. `NEEDS` says what it reads: `outputs` (of layers, in the
teacher's channels), `embeddings`, `attentions`, `lens` (of layers at chosen depths, each through
its own norm and head).
"""
