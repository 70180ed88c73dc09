"""Output losses, one file each, named by the file.

A loss is `loss(student_logits_NV, teacher_logits_NV, targets_N, temperature)` over N scored tokens
and V vocabulary entries, in float32. It returns the value of each token [N] in nats and its
gradient with respect to the student's logits [N, V], and may overwrite its inputs.
`NEEDS_TEACHER` says whether the teacher's logits are read, `OPTIONS` which settings of
`LossWeights` the
loss takes as further keyword arguments.

P is the teacher's distribution and Q the student's, the softmax of the logits over T; what compares
them counts T² times, in the value and in the gradient (Hinton et al., 2015, arXiv:1503.02531).
"""
