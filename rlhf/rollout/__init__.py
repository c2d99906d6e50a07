"""Rollouts: prompts -> completions -> scores -> `Trajectories`."""
