"""The figures of `python -m gym_baselines plot`, one module each."""
