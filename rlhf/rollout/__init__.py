"""Prompts -> completions -> scores -> `Trajectories`."""
