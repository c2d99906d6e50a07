"""Turns trajectories into new weights, for control tasks and language models alike."""
