"""Methods of rounding weights, one file each.

`NEEDS_GRAM` says whether the method reads the second moment of a layer's inputs.
`quantize(weight, scheme, dtype, gram, damping, held)` returns the rounded weight in float32 and its
grid; `held` is True at the zeros of a sparse weight, which must stay zero.
"""
