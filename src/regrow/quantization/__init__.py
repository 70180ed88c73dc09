"""Named schemes of quantized weights and the grids they put weights on."""
