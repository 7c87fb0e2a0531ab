"""Converts messages to tokens and back: chat templates, tree levels, thinking blocks, tool calls."""
