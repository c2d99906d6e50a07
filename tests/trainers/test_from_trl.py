"""What we tell people who come from TRL names settings that exist, and leaves none of theirs out."""

import dataclasses
import importlib.util
import re
import typing
from pathlib import Path

import pytest

from rlhf.models.lora import LoRASettings
from rlhf.trainers.config import GRPOTrainerConfig
from rlhf.trainers.foreign_settings import INSTEAD, instead

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
SHARED = {
    *("gradient_checkpointing", "reward_weights", "log_completions", "learning_rate", "warmup_steps", "weight_decay"),
    "seed",
}
"""Names that mean the same, or nearly, in both; they need no hint."""


NOT_OURS = {"dr_grpo", "file.py", "config_file", "fsdp2.yaml"}
"""What a hint may also say: a loss type of TRL's, a file of the user's, an option of accelerate launch and its file."""


def tree(kind, prefix=""):
    """Dotted names of all settings and the values of those that are choices."""
    names, values = set(), set()
    for name, hint in typing.get_type_hints(kind).items():
        if name not in {f.name for f in dataclasses.fields(kind)}:
            continue
        names.add(prefix + name)
        for member in (hint, *typing.get_args(hint)):
            values.update(v for v in typing.get_args(member) if isinstance(v, str))
            if dataclasses.is_dataclass(member):
                below, choices = tree(member, f"{prefix}{name}.")
                names, values = names | below, values | choices
    return names, values


def settings():
    """Those of the trainer, and those that the command adds."""
    spec = importlib.util.spec_from_file_location("command_for_test", ROOT / "recipes" / "command.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    names, values = tree(GRPOTrainerConfig)
    lora, _ = tree(LoRASettings, "lora.")
    return names | lora | {f.name for f in dataclasses.fields(command.UserRun)}, values


OURS, VALUES = settings()


def unknown_words(text):
    """Words in `text` that look like settings (a dot or an underscore inside) and are none, nor values of one."""
    words = re.findall(r"[a-z][a-z0-9]*(?:[._][a-z0-9]+)+", text)
    return [word for word in words if word not in OURS | VALUES | NOT_OURS]


@pytest.mark.parametrize("name", INSTEAD)
def test_every_hint_names_only_settings_that_exist_and_begins_with_one_or_says_there_is_none(name):
    hint = INSTEAD[name]
    if not hint.startswith("not available: "):
        assert re.match(r"[a-z_.]+\b", hint)[0] in OURS, hint
    assert unknown_words(hint) == []


@pytest.mark.parametrize("name", INSTEAD)
def test_every_hint_is_for_a_name_on_the_page_that_is_no_setting_here(name):
    assert f"`{name}`" in PAGE
    assert name not in OURS


def rows():
    """The cells of every row of the page's tables of settings."""
    tables = PAGE.split("## Every setting")[1].split("## What changes")[0]
    return [
        line.strip("|").split(" | ") for line in tables.splitlines() if line.startswith("| `") or line.startswith('| "')
    ]


def test_every_setting_that_the_tables_name_as_ours_exists():
    assert len(rows()) > 90
    for cells in rows():
        for code in re.findall(r"`([^`]+)`", cells[1]):
            name, _, value = code.partition(": ")
            if cells[0].strip().startswith("`"):
                assert name in OURS and (not value or value in VALUES), cells
            else:  # the table of loss types also names bare values
                assert name in OURS | VALUES and (not value or value in VALUES or value.isdigit()), cells


def test_dotted_names_anywhere_on_the_page_exist():
    groups = {name for name in OURS if any(other.startswith(f"{name}.") for other in OURS)}
    dotted = re.findall(rf"`((?:{'|'.join(sorted(groups))})\.[a-z_]+)", PAGE)
    assert len(dotted) > 40
    assert set(dotted) <= OURS


def test_values_of_choices_in_the_remarks_exist():
    for value in ("group_std", "batch_std", "sequence_mean", "weighted_k3", "token_mean", "group_token_mean", "linear"):
        assert f"`{value}`" in PAGE or f": {value}`" in PAGE
        assert value in VALUES


def test_every_name_in_the_tables_first_column_has_a_hint_or_means_the_same_here():
    for cells in rows():
        if cells[0].strip().startswith("`"):
            (name,) = re.findall(r"`([^`]+)`", cells[0])[:1]
            assert name in INSTEAD or name in SHARED, name


def test_hints_read_as_sentences_with_or_without_a_group():
    assert instead("num_generations") == "In place of TRL's num_generations, set grpo.completions_per_prompt."
    assert instead("grpo.beta") == "In place of TRL's beta, set grpo.kl_coef."
    assert instead("use_vllm").startswith("TRL's use_vllm is not available: ")
    assert instead("clip_range") is None


def test_every_field_of_trls_own_config_is_on_the_page():
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    common = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    own = {f.name for f in dataclasses.fields(trl.GRPOConfig)} - common
    assert len(own) >= 70
    first = {name for cells in rows() for name in re.findall(r"`([^`]+)`", cells[0])}
    assert own - first == set()
    assert own - set(INSTEAD) - SHARED == set()
