"""Reads the rows of a data set, finds prompts and completions in their columns, and reports bad rows."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.data.tokenization import clean, text_problem
from rlhf.errors import InputError, excerpt

if TYPE_CHECKING:  # imported late, where files are read: it takes seconds, and lists of rows do without it
    from datasets import Dataset

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
Row = dict[str, Any]


class Table(Protocol):
    """Rows with named columns: a `datasets.Dataset`, or `ListRows`."""

    @property
    def column_names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...
    def __iter__(self) -> Iterator[Row]: ...


class ListRows:
    """A `Table` made from a list of mappings. Rows are copied when they come in and when they are handed out; a column
    that a row lacks is None there."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], setting: str) -> None:
        self._rows: list[Row] = []
        for index, row in enumerate(rows):
            where = f"{setting}: row {index} (counted from 0)"
            if not isinstance(row, Mapping):
                raise InputError(
                    f"{where} is of type {type(row).__name__}. Give each row as a mapping from columns to values, such as "
                    '{"prompt": "..."}.'
                )
            try:
                self._rows.append(deepcopy(dict(row)))
            except Exception as error:
                raise InputError(
                    f"{where} cannot be copied: {error}. Give plain values: text, numbers, lists."
                ) from error
        self.column_names = list(dict.fromkeys(name for row in self._rows for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        return {name: deepcopy(row.get(name)) for name in self.column_names}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


# --- reading ---


def load_rows(path_or_name: str | Path, split: str = "train", setting: str = "dataset") -> "Dataset":
    """The rows of a .jsonl, .json, .parquet or .csv file, of a directory (of such files, or from `save_to_disk`) or of
    a hub data set (`owner/name`, or `owner/name:configuration`).

    split: the split of a directory or hub data set; all of a file is one split. Slices such as "train[:100]" work too.
    Only data is read; no code is run. InputError, naming `setting`, if there is nothing to read or no row in it.
    """
    name = str(path_or_name)
    where = f"{setting}={name!r}"
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            rows = _load_directory(path, split, where)
        elif path.is_file():
            rows = _load_file(path, split, where)
        else:
            rows = _load_from_hub(name, split, where)
    except InputError:
        raise
    except Exception as error:  # whatever datasets, pyarrow or the file system raise
        reason = str(error.__cause__ or error).strip() or "there are no rows in it"
        raise InputError(f"{where}, split {split!r}, cannot be read: {reason}.{_bad_line(path)} Repair it.") from error
    return checked(rows, f"{where}, split {split!r},")


def checked(rows: Any, where: str) -> Any:
    """The rows as plain Python values; InputError if there are none."""
    if len(rows) == 0:
        raise InputError(f"{where} has no rows. Give a data set with at least one row.")
    return rows if isinstance(rows, ListRows) else rows.with_format(None)


def _load_file(path: Path, split: str, where: str) -> "Dataset":
    from datasets import load_dataset

    if path.suffix not in FILE_TYPES:
        raise InputError(f"{where} has the unknown file type {path.suffix!r}. Use one of {', '.join(FILE_TYPES)}.")
    if path.stat().st_size == 0:
        raise InputError(f"{where} is an empty file. Give a data set with at least one row.")
    return load_dataset(FILE_TYPES[path.suffix], data_files={_part_name(split): str(path)}, split=split)


def _load_directory(path: Path, split: str, where: str) -> "Dataset":
    from datasets import DatasetDict, ReadInstruction, load_dataset, load_from_disk

    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return load_dataset(str(path), split=split)
    loaded = load_from_disk(str(path))
    part = _part_name(split)
    if isinstance(loaded, DatasetDict):
        if part not in loaded:
            raise InputError(f"{where} has no split {split!r}. It has {', '.join(loaded)}: choose one of these.")
        loaded = loaded[part]
    if split == part:
        return loaded
    pieces = ReadInstruction.from_spec(split).to_absolute({part: len(loaded)})
    return loaded.select([row for piece in pieces for row in range(piece.from_, piece.to)])


def _part_name(split: str) -> str:
    """The split's name without a slice: "train" for "train[:100]"."""
    found = re.match(r"\w+", split)
    return found[0] if found else "train"


def _load_from_hub(name: str, split: str, where: str) -> "Dataset":
    """Loads the hub data set `name`; a name that looks like a mistyped path is refused without a look-up."""
    like_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", name) and Path(name).suffix not in FILE_TYPES
    if not like_hub or Path(name).parent.is_dir():
        raise InputError(f"{where} does not exist. Give a file, a directory or a hub data set as owner/name.")
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, split=split)
    except Exception as error:
        raise InputError(
            f"{where} is not a file or directory here, and it cannot be loaded as a hub data set: {error}. "
            "Check the spelling and the network, or download it and give its path."
        ) from error


def _bad_line(path: Path) -> str:
    """Names the first bad line of a .jsonl file: the reader's own error gives only the place inside its block."""
    if path.suffix != ".jsonl":
        return ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f" Line {number} is not a JSON object: {excerpt(line.strip())}."
            except ValueError as error:
                return f" Line {number} is not JSON: {error}."
    return ""


# --- columns ---


def require_columns(
    columns: Sequence[str], choices: Sequence[tuple[str, ...]], setting: str, purpose: str
) -> tuple[str, ...]:
    """The first choice whose columns all exist; InputError lists required and found columns and the closest match."""
    for choice in choices:
        if set(choice) <= set(columns):
            return choice
    missing = dict.fromkeys(name for choice in choices for name in choice if name not in columns)
    spare = [name for name in columns if not any(name in choice for choice in choices)]
    close = {name: match[0] for name in missing if (match := get_close_matches(name, spare, n=1))}
    hints = [f"Did you mean {name!r} by {match!r}?" for name, match in close.items()]
    raise InputError(
        f"{setting}: {purpose} needs the columns {' or '.join(' + '.join(choice) for choice in choices)}; "
        f"found {', '.join(columns) or 'none'}. {' '.join([*hints, 'Rename or add columns.'])}"
    )


def prompt_reader(columns: Sequence[str], setting: str) -> tuple[str | None, Callable[[Row], Any]]:
    """The column that holds nothing but the prompt (None: there is none), and a function that reads a row's prompt."""
    choice = require_columns(columns, [("prompt",), ("messages",), ("chosen", "rejected")], setting, "a set of prompts")
    if choice == ("prompt",):
        return "prompt", lambda row: clean(row["prompt"])
    if choice == ("messages",):
        return None, lambda row: before_answer(clean(row["messages"]))
    return None, lambda row: split_pair(clean(row["chosen"]), clean(row["rejected"]))[0]


def prompt_rows(rows: "Dataset", column: str, system_prompt: str | None, *, chat: bool, setting: str) -> "Dataset":
    """The rows with their prompts in the column "prompt".

    Args:
        column: the column that holds the prompts; "prompt" also finds "messages". A column of another name replaces any
            "prompt"; its conversations lose a final assistant turn, which is an answer.
        system_prompt: becomes the first message, in place of a system message that is there already.
        chat: plain text becomes a user message; so it does with a system prompt.
        setting: the name of the data set in messages.
    """
    if column == "prompt" and system_prompt is None:
        return rows
    if column == "prompt" and "prompt" not in rows.column_names and "messages" in rows.column_names:
        column = "messages"
    if column not in rows.column_names:
        raise InputError(
            f"prompt_column={column!r}: {setting} has the columns {', '.join(rows.column_names)}. Name one of them."
        )
    if column != "prompt":
        rows = rows.remove_columns([name for name in rows.column_names if name == "prompt"])
        rows = rows.rename_column(column, "prompt")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]

    def prompt_of(given: Any) -> Any:
        if isinstance(given, str):
            turns = [{"role": "user", "content": given}] if system or chat else given
        else:
            turns = given if column == "prompt" else before_answer(given)
        if not isinstance(turns, list) or not turns:
            return turns  # the trainer reports an empty prompt with its row
        has_system = isinstance(turns[0], dict) and turns[0].get("role") == "system"
        return [*system, *turns[1:]] if system and has_system else [*system, *turns]

    return rows.map(
        lambda row: {"prompt": prompt_of(clean(row["prompt"]))}, remove_columns=["prompt"], desc=f"prompts of {setting}"
    )


def before_answer(messages: Any) -> Any:
    """The messages without a final assistant turn."""
    if not isinstance(messages, list) or text_problem(messages) or messages[-1]["role"] != "assistant":
        return messages
    return messages[:-1]


def completion_row(row: Row) -> tuple[Any, Any]:
    """Prompt and completion of a row with either these columns or `messages`."""
    if "completion" in row:
        return clean(row["prompt"]), clean(row["completion"])
    messages = clean(row["messages"])
    prompt = before_answer(messages)
    if prompt == messages:
        raise InputError(text_problem(messages) or "messages that do not end with an assistant turn")
    return prompt, messages[len(prompt) :]


def preference_row(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected completion. Conversations that contain the prompt are split, see `split_pair`."""
    prompt, chosen, rejected = (clean(row.get(name)) for name in ("prompt", "chosen", "rejected"))
    holds_prompt = isinstance(chosen, list) and not text_problem(chosen) and chosen[0]["role"] != "assistant"
    return split_pair(chosen, rejected) if prompt is None or holds_prompt else (prompt, chosen, rejected)


def split_pair(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected completion without a prompt column: the prompt is the first messages that both share.

    Plain texts are whole completions of an empty prompt.
    """
    if problem := text_problem(chosen) or text_problem(rejected):
        raise InputError(problem)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return "", chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise InputError("chosen and rejected that begin with different messages, and no prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


# --- bad rows ---


class RowProblems:
    """Collects problems of rows; `check` reports them in one InputError, by kind, with first rows and counts."""

    def __init__(self, setting: str, what: str, num_rows: int, remedy: str = "Repair or remove these rows.") -> None:
        self.setting = setting
        self.what = what
        self.num_rows = num_rows
        self.remedy = remedy
        self.rows: dict[str, list[int]] = {}

    def add(self, row: int, problem: str) -> None:
        self.rows.setdefault(problem.rstrip("."), []).append(row)

    def check(self, shown: int = 4) -> None:
        if not self.rows:
            return
        kinds = []
        for problem, rows in self.rows.items():
            more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
            kinds.append(f"row {', '.join(map(str, rows[:shown]))}{more}: {problem}")
        more = f"; and {len(kinds) - shown} more such" if len(kinds) > shown else ""
        raise InputError(
            f"{self.setting}: {sum(map(len, self.rows.values()))} of {self.num_rows} {self.what} cannot be used: "
            f"{'; '.join(kinds[:shown])}{more} (rows count from 0). {self.remedy}"
        )
