"""Between messages and tokens: chat templates, level cuts, thinking blocks."""
