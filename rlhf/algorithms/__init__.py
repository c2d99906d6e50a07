"""The algorithms, one file each, and their interface (base.py): rewards -> advantages -> loss. Torch only."""
