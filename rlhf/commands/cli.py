"""The command line of every recipe: settings from `--config file.yaml` and overrides such as `--ppo.clip_range 0.1`.

    if __name__ == "__main__":
        run_command(SFTConfig, train_sft, "Supervised fine-tuning.")

Settings are a (nested) dataclass, read by jsonargparse. This module also refuses what jsonargparse accepts: duplicate
and unknown keys (naming the nearest one), null for settings that may not be null, and numbers that are not finite.
Overrides win over files, in whatever order they are given. An error of the user prints one short message on stderr and
exits with status 2, or 1 when a run had to stop.
"""

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from rlhf.errors import InputError, TrainingError
from rlhf.lifeline import leave
from rlhf.runs.signals import Interrupted
from rlhf.settings import dotted
from rlhf.trainers.foreign_settings import instead

T = TypeVar("T")
OWN_OPTIONS = ("config", "print_config", "help")


@contextmanager
def guard() -> Iterator[None]:
    """Exits on InputError, TrainingError and Ctrl-C, with a message and no traceback. Also works as a decorator."""
    try:
        yield
    except InputError as error:
        _exit(2, "error", error)
    except TrainingError as error:
        _exit(1, "stopped", error)
    except Interrupted as interruption:
        sys.exit(128 + interruption.number)  # as shells do; the run has printed what is saved
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _exit(status: int, kind: str, error: Exception) -> NoReturn:
    leave(error, lambda: print("\n".join([f"{kind}: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr))
    sys.exit(status)


def run_command(config_class: type[T], command: Callable[[T], Any], description: str | None = None) -> Any:
    """Calls `command(settings)` with settings from the command line."""
    with guard():
        return command(parse(config_class, description=description))


def parse(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """A `config_class` from `argv` (default: the command line); InputError names setting, value and remedy.

    defaults: values (nested, or under dotted names) that replace the class's own.
    """
    files, overrides = _split(sys.argv[1:] if argv is None else argv)
    hints = dict(_settings(config_class))
    for file in files:
        _check_file(Path(file), hints)
    overrides = list(_spelled_out(overrides, hints))
    _check_options(overrides, hints)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below; may be repeated")
    parser.add_class_arguments(config_class)
    parser.set_defaults(_defaults(defaults or {}, hints))
    try:
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *overrides])  # left to right
        del namespace["config"]
        for name, hint in hints.items():
            group = name.rpartition(".")[0]
            if not group or namespace.get(group) is not None:  # a group that is null has no members
                _check_value(name, namespace.get(name), hint)
        return config_class(**parser.instantiate(namespace).as_dict())
    except ArgumentError as error:
        raise InputError(_in_plain_words(str(error), hints)) from error


def from_plain(config_class: type[T], settings: Mapping[str, Any]) -> T:
    """Rebuilds a `config_class` from its `dataclasses.asdict`, also after JSON; checked like a command line."""
    return parse(config_class, [], defaults=settings)


# --- names and types of settings ---


def _defaults(values: Mapping[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """`values` as jsonargparse takes them: a group's members under dotted names, but an optional group as one value."""
    named = dict(dotted(values, is_group=lambda name: dataclasses.is_dataclass(hints.get(name))))
    for name in named:
        if name not in hints:
            raise InputError(f"There is no setting {name}. {_suggest(name, list(hints))}")
    return named


def _settings(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting, groups before their members."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        yield prefix + field.name, hints[field.name]
        for member in _members(hints[field.name]):
            if dataclasses.is_dataclass(member):
                yield from _settings(typing.cast(type, member), f"{prefix}{field.name}.")


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_group(hint: Any) -> bool:
    return any(map(dataclasses.is_dataclass, _members(hint)))


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    names = ["null" if member is type(None) else getattr(member, "__name__", str(member)) for member in _members(hint)]
    return str(hint) if typing.get_origin(hint) in (list, tuple, dict) else " or ".join(names)


def _suggest(name: str, names: Sequence[str]) -> str:
    """A hint for an unknown `name`: the nearest setting, also by its last part alone (clip_rang -> ppo.clip_range); in
    GRPO commands, what to set in place of a setting of TRL."""
    if "grpo" in names and (hint := instead(name)) is not None:
        return hint
    leaves = {known.rpartition(".")[2]: known for known in reversed(names)}
    close = get_close_matches(name, names, n=1) or [
        leaves[leaf] for leaf in get_close_matches(name.rpartition(".")[2], leaves, n=1)
    ]
    return f"Did you mean {close[0]!r}?" if close else "See --help for all settings."


# --- checks before parsing ---


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The configuration files and all other arguments."""
    files, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config":
            files.append(next(remaining, ""))
        elif argument.startswith("--config="):
            files.append(argument.partition("=")[2])
        else:
            others.append(argument)
    return files, others


def _spelled_out(arguments: Sequence[str], hints: dict[str, Any]) -> Iterator[str]:
    """Expands two shorthands: a bare `--resume` means `--resume=true` where a setting may be true, and
    `--reward a --reward b` means `--reward=["a", "b"]` where it is a list of text."""
    lists: set[str] = set()
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, value = argument[2:].partition("=")
        hint = hints.get(name) if argument.startswith("--") else None
        if hint is None or _is_group(hint):
            yield argument
            continue
        if not equals and remaining and not remaining[0].startswith("--"):
            equals, value = "=", remaining.pop(0)
        if not equals:
            yield f"{argument}=true" if bool in _members(hint) else argument
        elif hint == list[str] and not value.startswith("["):
            yield f"--{name}+={value}" if name in lists else f"--{name}={json.dumps([value])}"
            lists.add(name)
        else:
            yield f"--{name}={value}"


def _check_options(arguments: list[str], hints: dict[str, Any]) -> None:
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if not argument.startswith("--"):
            continue
        name, _, value = argument[2:].partition("=")
        name = name.removesuffix("+").removesuffix(".help")
        if name not in hints and name not in OWN_OPTIONS:
            raise InputError(f"There is no setting --{name}. {_suggest(name, list(hints))}")
        if name in hints and _is_group(hints[name]) and not re.match(r"null$|\{|$|--", value or following):
            raise InputError(f"--{name}={value or following}: it is a group of settings. Set one: --{name}.NAME VALUE.")


def _check_file(path: Path, hints: dict[str, Any]) -> None:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}. Give a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}. Repair it.") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"--config {path} holds no settings. Write them as `name: value` lines.")
    _check_mapping(root, "", f"--config {path}", hints, {})


def _check_mapping(node: Any, prefix: str, where: str, hints: dict[str, Any], seen: dict[str, int]) -> None:
    """`seen`: dotted name -> line, for the whole file, because `a: {b: 1}` and `a.b: 1` mean the same."""
    for key, value in node.value:
        name = prefix + str(key.value)
        line = key.start_mark.line + 1
        place = f"{where}, line {line}"
        if name in seen:
            raise InputError(f"{place}: {name} is set a second time (first in line {seen[name]}). Remove one.")
        if name not in hints:
            raise InputError(f"{place}: there is no setting {name!r}. {_suggest(name, list(hints))}")
        seen[name] = line
        if _is_group(hints[name]) and isinstance(value, yaml.MappingNode):
            _check_mapping(value, f"{name}.", where, hints, seen)
        elif _is_group(hints[name]) and not (value.tag.endswith(":null") and type(None) in _members(hints[name])):
            raise InputError(f"{place}: {name} is a group of settings. Write its members below it, indented.")


# --- checks after parsing, and messages ---


def _check_value(name: str, value: Any, hint: Any) -> None:
    if value is None and hint is not Any and type(None) not in _members(hint):
        raise InputError(f"{name} is null, but must be {_type_name(hint)}. Give a value or leave it out.")
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise InputError(f"{name}={value} is not a finite number. Give a finite one.")


def _in_plain_words(message: str, hints: dict[str, Any]) -> str:
    found = re.search(r'Parser key "([\w.]+)"', message)
    value = re.findall(r"(?:Got|Given) value: (.*)", message)
    if found and value and found[1] in hints:
        wanted = _type_name(hints[found[1]])
        quote = " Quote it if it is text." if value[-1] in ("True", "False") and "str" in wanted else ""
        return f"{found[1]}={value[-1]} is mistyped: it must be {wanted}. Change it.{quote}"
    return " ".join(message.split()).rstrip(".") + ". See --help for all settings."
