"""Output losses, one file each, named by the file.

A loss is `loss(student_logits_NV, teacher_logits_NV, targets_N, temperature)` over N scored tokens
and V vocabulary entries, in float32. It returns the value of each token [N] in nats and its
gradient with respect to the student's logits [N, V], and may overwrite its inputs.
`NEEDS_TEACHER` says whether the teacher's logits are read.
"""
