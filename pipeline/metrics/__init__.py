"""Segmentation and latency figures in pure numpy."""
