"""A teacher with another tokenizer: the probabilities of the same spans of text are compared.

`align.py` tokenizes a batch for the teacher and finds the spans. `teacher.py` computes the
log-probabilities of their tokens in both models, and the loss.
"""
