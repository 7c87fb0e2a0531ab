"""Sampling from a prefix tree: token sampling, jitted decode chunks, and the host loop around them."""
