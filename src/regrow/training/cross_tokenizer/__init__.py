"""Distillation from a teacher with another tokenizer: compares probabilities of common text spans.

`align.py` tokenizes a batch for the teacher and finds the spans. `teacher.py` computes the
log-probabilities of their tokens in both models, and the loss.
"""
