"""How weights are rounded: one file a method.

`NEEDS_GRAM` says whether it wants the second moment of a layer's inputs; `quantize(weight, scheme,
dtype, gram, damping)` gives the weight on a grid, float32, and the grid.
"""
