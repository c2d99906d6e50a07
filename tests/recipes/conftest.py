"""Recipes are scripts that import their neighbours, as `python recipes/x.py` lets them; the tests see them alike."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
