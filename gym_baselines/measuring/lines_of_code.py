"""Measures how much code an algorithm is: the lines that its training really executes."""

import ast
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_OPTIMIZED = 0x1  # code flag that functions have, and modules and class bodies (which run on import) lack


def executed_lines(run: Callable[[], Any], packages: Sequence[str]) -> dict[str, list[int]]:
    """Lines of statements in functions of `packages` that `run()` executes: file -> sorted line numbers.

    All lines of a statement count, but only the head of a compound one (if, for, with). Comments, docstrings, blank
    lines, `def` lines and code that runs on import do not count, nor do this module and `measure.py`. File names are
    relative to the parent of their package.
    """
    roots = {name: Path(str(find_spec(name).origin)).parent for name in packages}  # type: ignore[union-attr]
    beside = {str(Path(__file__)), str(Path(__file__).with_name("measure.py"))}
    seen: dict[str, set[int]] = {}
    known: dict[CodeType, set[int] | None] = {}

    def enter(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code not in known:
            inside = any(code.co_filename.startswith(f"{root}/") for root in roots.values())
            counted = inside and code.co_flags & _OPTIMIZED and code.co_filename not in beside
            known[code] = seen.setdefault(code.co_filename, set()) if counted else None
        lines = known[code]
        if lines is None:
            return None

        def step(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            if event == "line":
                lines.add(frame.f_lineno)
            return step

        return step

    previous = sys.gettrace()
    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(previous)
    parents = [root.parent for root in roots.values()]
    return {
        _relative(file, parents): sorted(_whole_statements(file, lines))
        for file, lines in sorted(seen.items())
        if lines
    }


def _relative(file: str, parents: Sequence[Path]) -> str:
    return next(str(Path(file).relative_to(parent)) for parent in parents if Path(file).is_relative_to(parent))


def _whole_statements(file: str, lines: set[int]) -> set[int]:
    """All lines of the executed statements, since the interpreter reports only some of them."""
    text = Path(file).read_text()
    counted: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            body = getattr(node, "body", None) or getattr(node, "cases", None)
            last = _first_line(body[0]) - 1 if body else node.end_lineno or node.lineno
            span = set(range(node.lineno, max(node.lineno, last) + 1))
            counted |= span if span & lines else set()
    code = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    return counted & code


def _first_line(node: Any) -> int:
    return node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
