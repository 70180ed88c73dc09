"""Methods of choosing the weights that become zero, one file each.

`NEEDS_GRAM` says whether the method reads the second moment of a layer's inputs. A method that
compares the weights of each row alone has `PER_ROW = True`.
`sparsify(weight, sparsity, gram, damping)` returns the new weight in float32.
"""
