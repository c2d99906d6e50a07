"""Trainers for language models, their settings and their checks."""
