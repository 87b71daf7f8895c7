"""One file per quantisation scheme: the stored layout, dequantisation of rows, and requantisation of weights."""
