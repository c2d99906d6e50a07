"""The parts wired up for language models."""
