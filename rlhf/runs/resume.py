"""Checks that a run may continue a saved one, by comparing their settings and fingerprints."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from rlhf.errors import InputError
from rlhf.settings import dotted


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], *, must_match: set[str]) -> list[str]:
    """Compare a saved run's settings and fingerprints with the current ones. Returns messages on allowed differences.

    Nested settings have dotted names ("ppo.clip_range"); a name in `must_match` covers all settings below it. Raises
    InputError listing every field of `must_match` that differs.
    """
    before, now = ({name: _json(value) for name, value in dotted(side)} for side in (saved, current))
    required: list[str] = []
    allowed: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, "absent"), now.get(name, "absent")
        if old != new:
            parents = itertools.accumulate(name.split("."), lambda parent, part: f"{parent}.{part}")
            (allowed if must_match.isdisjoint(parents) else required).append(f"{name}: {old} (saved), {new} (now)")
    if required:
        raise InputError(
            "This run cannot continue the saved one, which differs in\n  " + "\n  ".join(required) + "\nRestore these "
            "settings and data, or start a new run in another output_dir."
        )
    return allowed


def _json(value: Any) -> str:
    """The value as JSON text, as the manifest stores it; types that JSON lacks (paths, enumerations) become strings."""
    return json.dumps(json.loads(json.dumps(value, default=str)), sort_keys=True)
