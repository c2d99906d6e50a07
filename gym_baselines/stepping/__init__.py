"""Faster optimizer steps for small networks: on flat vectors, or compiled."""
