"""Every bad command line ends in one short message that names the setting and a remedy, and nothing runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rlhf.commands import cli
from rlhf.errors import InputError, TrainingError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner settings."""

    clip_range: float = 0.2
    """Bound of the ratio."""
    mode: Literal["batch", "none"] = "batch"
    target: float | None = None
    note: str = ""

    def __post_init__(self):
        if self.clip_range <= 0:
            raise InputError(f"clip_range={self.clip_range} must be above 0. Give a positive number.")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    rank: int = 8


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe."""

    model: str = "tiny"
    lr: float = 1e-3
    steps: int = 3
    verbose: bool = False
    weights: list[float] = field(default_factory=list)
    output: Path = Path("runs")
    ppo: Inner = field(default_factory=Inner)
    adapter: Adapter | None = None


def parse_yaml(tmp_path, text, *overrides):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return cli.parse(Recipe, ["--config", str(path), *overrides])


def test_without_arguments_the_defaults_hold():
    assert cli.parse(Recipe, []) == Recipe()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-5", Recipe(lr=1e-5)),
        ("lr: 1", Recipe(lr=1.0)),
        ("lr: '1e-5'", Recipe(lr=1e-5)),
        ("weights: [1, 1e-1]", Recipe(weights=[1.0, 0.1])),
        ("ppo: {clip_range: 1e-1, mode: none, target: null}", Recipe(ppo=Inner(clip_range=0.1, mode="none"))),
        ("ppo.clip_range: 0.4", Recipe(ppo=Inner(clip_range=0.4))),
        ("adapter: {rank: 4}", Recipe(adapter=Adapter(rank=4))),
        ("adapter: null", Recipe()),
        ("output: a/b\nverbose: yes", Recipe(output=Path("a/b"), verbose=True)),
    ],
)
def test_yaml_values_have_the_types_of_the_settings(tmp_path, text, expected):
    settings = parse_yaml(tmp_path, text)
    assert settings == expected
    assert type(settings.lr) is float and type(settings.ppo) is Inner


@pytest.mark.parametrize("file_last", [False, True])
def test_overrides_win_over_the_file_wherever_they_stand(tmp_path, file_last):
    path = tmp_path / "settings.yaml"
    path.write_text("lr: 0.5\nsteps: 7\nppo:\n  clip_range: 0.3\n")
    file, overrides = ["--config", str(path)], ["--lr", "1e-4", "--ppo.clip_range=0.1"]
    settings = cli.parse(Recipe, overrides + file if file_last else file + overrides)
    assert settings == Recipe(lr=1e-4, steps=7, ppo=Inner(clip_range=0.1))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lr: 1\nsteps: 2\nlr: 2", ["line 3", "lr", "line 1", "Remove one"]),
        ("ppo:\n  mode: none\n  mode: batch", ["line 3", "ppo.mode", "Remove one"]),
        ("ppo:\n  mode: none\nppo.mode: batch", ["line 3", "ppo.mode", "line 2"]),
        ("learning_rate: 1", ["line 1", "'learning_rate'", "--help"]),
        ("stpes: 1", ["'stpes'", "Did you mean 'steps'"]),
        ("ppo:\n  clip_rnge: 1", ["line 2", "'ppo.clip_rnge'", "Did you mean 'ppo.clip_range'"]),
        ("clip_range: 1", ["'clip_range'", "Did you mean 'ppo.clip_range'"]),
        ("adapter: {rnak: 4}", ["'adapter.rnak'", "Did you mean 'adapter.rank'"]),
        ("lr: fast", ["lr=fast", "must be float"]),
        ("lr: null", ["lr", "null", "must be float"]),
        ("ppo: {clip_range: null}", ["ppo.clip_range", "null", "must be float"]),
        ("lr: .nan", ["lr=nan", "finite"]),
        ("lr: .inf", ["lr=inf", "finite"]),
        ("weights: [1, .nan]", ["weights", "finite"]),
        ("ppo: {target: .nan}", ["ppo.target", "finite"]),
        ("steps: 2.5", ["steps=2.5", "must be int"]),
        ("steps: 1e3", ["steps=1000.0", "must be int"]),
        ("steps: true", ["steps=True", "must be int"]),
        ("lr: true", ["lr=True", "must be float"]),
        ("verbose: 3", ["verbose=3", "must be bool"]),
        ("model: no", ["model=False", "must be str", "Quote it"]),
        ("ppo: {note: 5}", ["ppo.note=5", "must be str"]),
        ("ppo: {mode: btach}", ["ppo.mode=btach", "one of batch, none"]),
        ("ppo: {target: high}", ["ppo.target=high", "float or null"]),
        ("weights: 1.0", ["weights=1.0", "list[float]"]),
        ("ppo: 3", ["ppo", "group"]),
        ("ppo: null", ["ppo", "group"]),
        ("ppo: [1]", ["ppo", "group"]),
        ("ppo: {clip_range: -1}", ["clip_range=-1", "Give a positive number"]),
        ("[1, 2]", ["settings.yaml", "name: value"]),
        ("", ["settings.yaml", "name: value"]),
        ("lr: [", ["settings.yaml", "not YAML"]),
    ],
)
def test_a_bad_file_names_the_setting_and_a_remedy(tmp_path, text, parts):
    with pytest.raises(InputError) as error:
        parse_yaml(tmp_path, text)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--stpes", "3"], ["--stpes", "Did you mean 'steps'"]),
        (["--ppo.clip_rang=3"], ["--ppo.clip_rang", "Did you mean 'ppo.clip_range'"]),
        (["--ste=3"], ["--ste", "Did you mean 'steps'"]),
        (["--adapter.rnak=3"], ["--adapter.rnak", "Did you mean 'adapter.rank'"]),
        (["--lr", "nan"], ["lr=nan", "must be float"]),
        (["--lr", ".nan"], ["lr=nan", "finite"]),
        (["--lr=abc"], ["lr=abc", "must be float"]),
        (["--steps"], ["steps"]),
        (["--ppo", "3"], ["--ppo=3", "group", "--ppo.NAME"]),
        (["--ppo.clip_range=-1"], ["clip_range=-1.0", "Give a positive number"]),
        (["stray"], ["stray", "--help"]),
        (["--config"], ["config"]),
        (["--config", "absent.yaml"], ["absent.yaml", "Give a YAML file"]),
    ],
)
def test_a_bad_override_names_the_setting_and_a_remedy(arguments, parts):
    with pytest.raises(InputError) as error:
        cli.parse(Recipe, arguments)
    for part in parts:
        assert part in str(error.value)


def test_a_required_setting_that_is_missing_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Needy:
        dataset: str

    with pytest.raises(InputError, match="dataset"):
        cli.parse(Needy, [])


def test_text_on_the_command_line_stays_text():
    assert cli.parse(Recipe, ["--model", "123", "--ppo.note", "no"]) == Recipe(model="123", ppo=Inner(note="no"))


def test_a_printed_config_parses_to_the_same_settings(tmp_path, capsys):
    arguments = ["--lr=1e-5", "--ppo.clip_range=0.3", "--weights=[1, 0.5]"]
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Recipe, [*arguments, "--print_config"])
    assert exit_.value.code == 0
    assert parse_yaml(tmp_path, capsys.readouterr().out) == cli.parse(Recipe, arguments)


def test_help_shows_the_docstring_under_a_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.parse(Recipe, ["--help"])
    assert exit_.value.code == 0 and "Bound of the ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(InputError("lr=0: raise it."), 2), (TrainingError("loss is nan at step 3"), 1)]
)
def test_errors_of_the_user_are_a_message_without_traceback(capsys, error, code):
    @cli.guard()
    def command():
        raise error

    with pytest.raises(SystemExit) as exit_:
        command()
    printed = capsys.readouterr()
    assert exit_.value.code == code and printed.out == ""
    assert printed.err.count("\n") == 1 and str(error) in printed.err and "Traceback" not in printed.err


def test_our_own_defects_keep_their_traceback():
    with pytest.raises(KeyError), cli.guard():
        raise KeyError("a defect")


def test_run_command_passes_the_settings_on_or_does_not_run_at_all(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("sys.argv", ["recipe", "--steps", "5"])
    cli.run_command(Recipe, seen.append)
    monkeypatch.setattr("sys.argv", ["recipe", "--steps", "five"])
    with pytest.raises(SystemExit) as exit_:
        cli.run_command(Recipe, seen.append)
    assert seen == [Recipe(steps=5)] and exit_.value.code == 2
    assert "steps=five" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Switches:
    resume: bool | str = False
    overwrite: bool = False
    steps: int = 1


def test_a_bare_switch_means_true_and_a_value_is_taken_as_given():
    assert cli.parse(Switches, ["--resume", "--steps", "3"]) == Switches(resume=True, steps=3)
    assert cli.parse(Switches, ["--steps", "3", "--overwrite"]) == Switches(overwrite=True, steps=3)
    assert cli.parse(Switches, ["--resume", "runs/a", "--overwrite", "false"]) == Switches(resume="runs/a")


@dataclass(frozen=True, kw_only=True)
class Lists:
    reward: list[str] = field(default_factory=list)
    steps: int = 1


def test_a_list_is_given_value_by_value_or_as_one(tmp_path):
    assert cli.parse(Lists, ["--reward", "a.py:f"]) == Lists(reward=["a.py:f"])
    assert cli.parse(Lists, ["--reward", "a.py:f", "--steps", "2", "--reward=b.py:g"]) == Lists(
        reward=["a.py:f", "b.py:g"], steps=2
    )
    assert cli.parse(Lists, ["--reward", '["a", "b"]']) == Lists(reward=["a", "b"])
    file = tmp_path / "settings.yaml"
    file.write_text("reward: [from_file]\n")
    assert cli.parse(Lists, ["--reward", "a", "--config", str(file)]) == Lists(reward=["a"])
