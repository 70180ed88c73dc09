"""A teacher with another tokenizer: the likelihoods of the same bytes of text are compared.

`token_bytes.py` what a token says, `align.py` where tokens of both end at the same byte,
`likelihood.py` log-probabilities of given tokens, `loss.py` the loss of a span, `teacher.py` all
of it on a batch.
"""
