"""Scores of completions, from reward functions and reward models."""
