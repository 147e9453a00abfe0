"""Activation ranges: histograms, the algorithms that choose amax, and TensorRT's cache text."""
