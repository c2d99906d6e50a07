"""Optimizer steps that pay off for small networks: on vectors, and compiled."""
