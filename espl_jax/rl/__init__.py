"""Advantages, losses and logprobs: arrays in, arrays out."""
