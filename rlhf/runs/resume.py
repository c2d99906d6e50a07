"""Whether a run may continue a saved one: its settings and fingerprints beside the present ones."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from rlhf.errors import InputError


def check_resumable(saved: Mapping[str, Any], current: Mapping[str, Any], *, must_match: set[str]) -> list[str]:
    """Compare a saved run's settings and fingerprints with the current ones; messages on what differs and may.

    Nested settings have dotted names ("ppo.clip_range"); a name in `must_match` covers all below it. Raises InputError
    listing every field of `must_match` that differs.
    """
    before, now = _flatten(saved), _flatten(current)
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


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> JSON text of each leaf; tuples equal lists, since the saved side went through JSON."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _json(value)
    return flat


def _json(value: Any) -> str:
    """As the manifest stores it: what JSON does not know (a path, an enumeration) by its text."""
    return json.dumps(json.loads(json.dumps(value, default=str)), sort_keys=True)
