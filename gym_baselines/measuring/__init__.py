"""Measured runs: several algorithms over several seeds, Stable-Baselines3's among them, each run in its own process."""
