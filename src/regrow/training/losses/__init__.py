"""Output losses: each is one file, and the file's name is the loss's name.

A loss is `loss(student_NV, teacher_NV, targets_N, temperature)`: a formula on the logits of N
scored tokens over V vocabulary entries, in float32 or float64, that returns one value per token
[N]. Its gradient is taken by autograd, chunk by chunk. Where speed counts, a file defines
`loss_and_gradient` instead: it takes the same arguments, may overwrite the logits, and returns the
values [N] and their gradient with respect to the student's logits [N, V].

`NEEDS_TEACHER` says whether the loss reads the teacher's logits. `OPTIONS` names the settings of
`LossWeights` that it takes as further keyword arguments.

P is the teacher's distribution and Q the student's: the softmax of the logits divided by the
temperature T. A loss that compares P with Q is multiplied by T², so that the size of its gradient
does not depend on T (Hinton et al., 2015, arXiv:1503.02531).
"""
