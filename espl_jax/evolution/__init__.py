"""System prompts as an evolving population: ratings, selection, edits, mutation and crossover (no jax)."""
