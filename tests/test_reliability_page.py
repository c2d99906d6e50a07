"""docs/reliability.md names tests that exist, and its totals are those of its tables."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
VERDICTS = ("met", "partly", "absent", "not applicable")


def named_tests(text: str) -> set[tuple[str, str]]:
    """(file, function); a list of functions of one file is `file::one`, `::two`."""
    named, file = set(), ""
    for path, function in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = path or file
        named.add((file, function))
    return named


def missing(text: str) -> list[tuple[str, str]]:
    return [
        (file, name)
        for file, name in sorted(named_tests(text))
        if not (ROOT / file).is_file() or not re.search(rf"^ *def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]


def rows(text: str) -> dict[str, str]:
    """Row -> the verdict that its last cell begins with."""
    found = {}
    for line in text.splitlines():
        if re.match(r"\| [A-Z]\d+ \|", line):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[0] not in found, cells[0]
            found[cells[0]] = re.match(r"\*\*(.+?)\*\*|", cells[-1])[1]
    return found


def test_every_test_that_the_page_names_exists():
    assert len(named_tests(PAGE)) > 40 and missing(PAGE) == []


@pytest.mark.parametrize("name", ["tests/test_reliability_page.py::test_of_nothing", "tests/no_file.py::test_it"])
def test_a_test_that_does_not_exist_is_noticed(name):
    assert len(missing(f"{PAGE} `{name}`")) == 1


def test_every_row_has_a_verdict_and_the_totals_count_them():
    verdicts = rows(PAGE)
    wanted = [*(f"K{n}" for n in range(1, 11)), *(f"P{n}" for n in range(1, 7)), *(f"B{n}" for n in range(1, 6))]
    assert set(verdicts) >= {*wanted, "E1"}
    counts = Counter(verdicts.values())
    totals = re.search(r"^Totals: (.*)\.$", PAGE, re.MULTILINE)[1]
    expected = [f"{counts[verdict]} {verdict}" for verdict in (*VERDICTS, *sorted({*counts} - {*VERDICTS}))]
    assert totals == f"{len(verdicts)} rows, of which " + ", ".join(expected)
    assert counts.keys() <= {*VERDICTS, "open"}
