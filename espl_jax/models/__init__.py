"""Decoder models as pure functions over params, a pytree of nested dicts."""
