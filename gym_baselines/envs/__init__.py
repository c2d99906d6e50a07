"""Environments: made, checked, seeded and stepped; their spaces."""
