"""Signals from inside the models, beside the output losses: one file each, named by the file.

A signal is `loss(student, teacher, match, mask_BT)`: two `Inside`s, the `Match` between them, and
which tokens count. It returns a sum over those tokens, a scalar of float32 at least with a graph to
the student, 0 for equal models; a mean is taken over the matched blocks, layers and heads. `NEEDS`
says what it reads: `outputs` (of blocks, in the teacher's channels), `embeddings`, `attentions`,
`lens` (of blocks at chosen depths, each through its own norm and head).
"""
