"""Decoders as pure functions over a params pytree of plain nested dicts."""
