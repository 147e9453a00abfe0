"""Mixed precision: what INT8 costs by convolution, what leaving it costs in time, and the search between the two."""
