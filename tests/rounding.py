"""A pytest plugin that measures how much of its tolerance each comparison of floats uses: the figures of `make test-isa`.

    RLHF_ROUNDING=/tmp/used python -m pytest -p tests.rounding tests

writes, for each test, the comparison that came closest to failing. Only tolerances for rounding are counted, not those for
sampling noise: at most LARGEST, and above 0.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EPS = torch.finfo(torch.float32).eps
"""Relative rounding of one float32 operation, 1.2e-7: the tests' float32 tolerances are multiples of it."""

LARGEST = 2e-3
"""A tolerance above this, relative to the value, is for something else than rounding."""

_used: dict[str, dict[str, Any]] = {}


def _note(error: float, allowed: float, size: float) -> None:
    """One comparison that passed: the error seen, the error allowed, and the size of what is compared."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
    if not test or not 0 < allowed <= LARGEST * max(1.0, size):
        return
    share = error / allowed
    if share >= _used.get(test, {"share": -1.0})["share"]:
        _used[test] = {"share": share, "error": error, "allowed": allowed, "line": _line()}


def _line() -> int:
    """Of the test file, from where the comparison was made."""
    frame = sys._getframe(2)
    while frame is not None and not Path(frame.f_code.co_filename).name.startswith("test_"):
        frame = frame.f_back
    return frame.f_lineno if frame is not None else 0


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(expected, Mapping):
        for name in expected:
            yield from _pairs(actual[name], expected[name])
    elif isinstance(expected, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            yield from _pairs(one, other)
    else:
        yield torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()


def _note_tensors(actual: Any, expected: Any, rtol: float | None, atol: float | None) -> None:
    for one, other in _pairs(actual, expected):
        if not (one.is_floating_point() or other.is_floating_point()) or not one.numel() or not other.numel():
            continue
        default_rtol, default_atol = torch.testing._comparison.default_tolerances(one, other)
        one, other = torch.broadcast_tensors(one.double(), other.double())
        allowed = (default_atol if atol is None else atol) + (default_rtol if rtol is None else rtol) * other.abs()
        error = torch.where(one == other, 0.0, (one - other).abs())  # equal infinities differ by 0
        worst = (error / allowed).nan_to_num(0.0).argmax()
        _note(*(float(x.flatten()[worst]) for x in (error, allowed, other.abs())))


def pytest_configure() -> None:
    """Every way in which the tests compare floats also notes what was seen."""
    assert_close, allclose, assert_allclose = torch.testing.assert_close, np.allclose, np.testing.assert_allclose
    scalar: Any = type(pytest.approx(1.0))
    equals = scalar.__eq__

    def torch_close(actual: Any, expected: Any, *, rtol: Any = None, atol: Any = None, **rest: Any) -> None:
        assert_close(actual, expected, rtol=rtol, atol=atol, **rest)
        _note_tensors(actual, expected, rtol, atol)

    def numpy_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-8, **rest: Any) -> bool:
        same = allclose(actual, expected, rtol=rtol, atol=atol, **rest)
        if same:
            _note_tensors(np.asarray(actual), np.asarray(expected), rtol, atol)
        return same

    def numpy_assert(actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0.0, **rest: Any) -> None:
        assert_allclose(actual, desired, rtol=rtol, atol=atol, **rest)
        _note_tensors(np.asarray(actual), np.asarray(desired), rtol, atol)

    def approx(self: Any, actual: Any) -> bool:
        same = equals(self, actual)
        if same and isinstance(self.expected, int | float | np.floating) and isinstance(actual, float | np.floating):
            _note(abs(float(actual) - float(self.expected)), float(self.tolerance), abs(float(self.expected)))
        return same

    torch.testing.assert_close = torch_close
    np.allclose, np.testing.assert_allclose = numpy_close, numpy_assert
    scalar.__eq__ = approx


def recorded(folder: str) -> set[str]:
    """The tests that compared floats in a run that wrote to `folder`."""
    return {test for file in Path(folder).glob("*.json") for test in json.loads(file.read_text())}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With RLHF_ROUNDING_OF=FOLDER, only the tests that compared floats in the run that wrote to FOLDER."""
    folder = os.environ.get("RLHF_ROUNDING_OF")
    if folder:
        wanted = recorded(folder)
        left = [item for item in items if item.nodeid.split(" ")[0] in wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = os.environ.get("RLHF_ROUNDING")
    if folder and _used:
        Path(folder).mkdir(parents=True, exist_ok=True)
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        (Path(folder) / f"{worker}.json").write_text(json.dumps(_used, indent=0))
