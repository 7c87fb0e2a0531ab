"""Writes the page that shows one run, or several side by side."""
