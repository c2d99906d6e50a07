"""Bad input to GRPO: one message that names setting, value and remedy, before a model is loaded; nothing trained is lost.

Settings and data are refused although the policy's path leads nowhere: whoever tried to load it would complain about that.
"""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from rlhf import GenerationConfig, GRPOConfig, GRPOTrainer, GRPOTrainerConfig, InputError, UpdateConfig
from rlhf.algorithms.presets import PRESETS
from rlhf.commands.cli import guard
from rlhf.distributed import Distributed
from rlhf.runs.jsonlines import read_metrics
from rlhf.trainers import trainer as trainer_module
from tests import tiny
from tests.trainers.grpo_runs import make_trainer, shape, verdict

NOWHERE = "/no/such/policy"
NAN, INF = math.nan, math.inf


def build(output_dir, *, rewards=(verdict, shape), dataset=None, grpo=None, update=None, generation=None, **settings):
    """A trainer whose policy cannot be loaded."""
    config = GRPOTrainerConfig(
        output_dir=str(output_dir),
        grpo=GRPOConfig(**{"completions_per_prompt": 4, **(grpo or {})}),
        update=UpdateConfig(**{"num_epochs": 1, "minibatch_size": None, **(update or {})}),
        generation=GenerationConfig(**{"max_new_tokens": 6, **(generation or {})}),
        **{"total_steps": 2, "prompts_per_step": 3, **settings},
    )
    dataset = tiny.rows() if dataset is None else dataset
    return GRPOTrainer(NOWHERE, rewards, dataset, config, tokenizer=tiny.tokenizer())


def message_of(output_dir, **changes) -> str:
    with pytest.raises(InputError) as error:
        build(output_dir, **changes)
    return str(error.value)


def test_without_a_mistake_only_the_policy_is_missing(tmp_path):
    """Otherwise the cases below would show nothing."""
    message = message_of(tmp_path)
    assert "policy" in message and NOWHERE in message


# --- settings ---


def wants_answer(completions, answer):
    return [1.0 for _ in completions]


CASES = {
    # name: (changes, what the message must say)
    "a group of one": ({"grpo": {"completions_per_prompt": 1}}, ["grpo.completions_per_prompt=1", "at least 2"]),
    "a group of one to choose by": (
        {"grpo": {"completions_per_prompt": 1, "center": "none", "scale": "none", "dynamic_sampling_rounds": 2}},
        ["grpo.completions_per_prompt=1", "at least 2", "one round"],
    ),
    "minibatches that do not divide": (
        {"update": {"minibatch_size": 5}},
        ["minibatch_size=5", "12 completions", "3 x 4"],
    ),
    "a minibatch larger than the step": ({"update": {"minibatch_size": 64}}, ["minibatch_size=64", "12 completions"]),
    "score surrogate, two epochs": (
        {"grpo": {"surrogate": "score"}, "update": {"num_epochs": 2}},
        ["grpo.surrogate=score", "2 updates", "num_epochs=2", "clipped"],
    ),
    "score surrogate, two minibatches": (
        {"grpo": {"surrogate": "score"}, "update": {"minibatch_size": 6}},
        ["grpo.surrogate=score", "2 updates", "minibatch_size=6", "null"],
    ),
    "unknown verdict": (
        {"grpo": {"dynamic_sampling_reward": "verdikt", "dynamic_sampling_rounds": 2}},
        ["grpo.dynamic_sampling_reward='verdikt'", "verdict, shape"],
    ),
    "overlong buffer without room": (
        {"grpo": {"overlong_buffer_tokens": 6}},
        ["grpo.overlong_buffer_tokens=6", "max_new_tokens=6"],
    ),
    "length punished twice": (
        {"grpo": {"overlong_buffer_tokens": 2}, "missing_eos": "replace", "missing_eos_value": -1.0},
        ["missing_eos=replace", "grpo.overlong_buffer_tokens=2"],
    ),
    "DAPO's lengths on short completions": (
        {"grpo": PRESETS["dapo"]},
        ["grpo.overlong_buffer_tokens=4096", "generation.max_new_tokens=6"],
    ),
    "weights for other rewards": ({"reward_weights": [1.0]}, ["reward_weights=[1.0]", "2 rewards"]),
    "a weight that is NaN": ({"reward_weights": [1.0, NAN]}, ["reward_weights", "nan", "finite"]),
    "a weight that is infinite": ({"reward_weights": [INF, 1.0]}, ["reward_weights", "inf", "finite"]),
    "a missing end worth NaN": ({"missing_eos": "replace", "missing_eos_value": NAN}, ["missing_eos_value=nan"]),
    "a missing end worth minus infinity": (
        {"missing_eos": "replace", "missing_eos_value": -INF},
        ["missing_eos_value=-inf", "1e+09"],
    ),
    "a missing end that costs more than a score can be": (
        {"missing_eos": "subtract", "missing_eos_value": 1e300},
        ["missing_eos_value=1e+300", "1e+09"],
    ),
    "no reward": ({"rewards": []}, ["reward", "at least one"]),
    "a reward that cannot be called": ({"rewards": [3]}, ["rewards", "3", "cannot be called"]),
    "no rows": ({"dataset": []}, ["dataset", "no rows"]),
    "no prompt column": ({"dataset": [{"promt": "ab"}]}, ["dataset", "prompt", "promt", "Did you mean"]),
    "a column that the reward needs": ({"rewards": wants_answer}, ["wants_answer", "'answer'", "target"]),
    "an empty prompt": ({"dataset": [{"prompt": "ab"}, {"prompt": ""}]}, ["dataset", "row 1", "empty"]),
    "a prompt that is null": ({"dataset": [{"prompt": "ab"}, {"prompt": None}]}, ["dataset", "row 1"]),
    "no prompts in a step": ({"prompts_per_step": 0}, ["prompts_per_step", "at least 1", "0"]),
    "no steps": ({"total_steps": -1}, ["total_steps", "at least 1", "-1"]),
    "a seed out of range": ({"seed": -1}, ["seed", "-1"]),
    "no room for a token": ({"generation": {"max_new_tokens": 0}}, ["generation.max_new_tokens", "0"]),
    "temperature 0": ({"generation": {"temperature": 0.0}}, ["generation.temperature", "above 0", "0.0"]),
    "temperature NaN": ({"generation": {"temperature": NAN}}, ["generation.temperature", "nan"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_settings_and_data_are_refused_by_name_before_a_model_is_loaded(case, tmp_path):
    changes, parts = CASES[case]
    message = message_of(tmp_path / "out", **changes)
    assert [part for part in parts if part not in message] == [], message
    assert NOWHERE not in message and len(message) < 700
    assert not (tmp_path / "out").exists()


RANGES = {
    "completions_per_prompt": [0, -4, 4.0, "4", True, NAN],
    "center": ["mean", None, 1],
    "scale": ["std", True],
    "std_ddof": [2, -1, 1.0, "0"],
    "std_eps": [0, 0.0, -1e-6, NAN, "1e-6", None],
    "whiten_tokens": ["no", 0, None],
    "ratio": ["sentence", None],
    "surrogate": ["clip", None],
    "clip_range": [0, -0.2, NAN, "0.2", None],
    "clip_range_high": [0, -0.2, NAN, "0.28"],
    "dual_clip": [1, 1.0, 0.5, -3, NAN, "3"],
    "aggregation": ["mean", None],
    "constant_length": [0, -1, 1.5, "1"],
    "kl_coef": [-0.1, NAN, INF, "0.1", None],
    "kl_placement": ["reward", None],
    "kl_estimator": ["k1", "k4", None],
    "entropy_coef": [-0.1, NAN, INF, "0.1"],
    "mask_truncated": ["yes", 1],
    "overlong_buffer_tokens": [-1, 2.5, "2"],
    "dynamic_sampling_rounds": [0, -1, 1.5, INF, "3", None],
    "dynamic_sampling_reward": [3, ["verdict"]],
}
BAD = [(name, value) for name, values in RANGES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{value!r}" for name, value in BAD])
def test_a_value_that_a_setting_cannot_have_is_refused_by_name_and_value(name, value):
    with pytest.raises(InputError) as error:
        GRPOConfig(**{name: value})
    assert name in str(error.value) and (repr(value) in str(error.value) or f"={value}" in str(error.value))


def test_every_setting_of_grpo_has_such_a_case():
    assert RANGES.keys() == GRPOConfig.__dataclass_fields__.keys()


OTHERS = [
    ("total_steps", "3"),
    ("prompts_per_step", 2.5),
    ("learning_rate", "1e-5"),
    ("learning_rate", NAN),
    ("seed", 0.5),
]
OTHERS += [("warmup_steps", NAN), ("reward_weights", "ab"), ("log_completions", "4"), ("checkpoint_every", -1)]


@pytest.mark.parametrize(("name", "value"), OTHERS, ids=[f"{name}-{value!r}" for name, value in OTHERS])
def test_the_runs_own_settings_are_checked_alike(name, value, tmp_path):
    with pytest.raises(InputError, match=name):
        build(tmp_path, **{name: value})


def test_an_unknown_preset_or_setting_is_refused_and_the_known_ones_named():
    with pytest.raises(InputError, match=r"preset='grop'.*grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp"):
        GRPOConfig.preset("grop")
    with pytest.raises(TypeError, match="clip_rnge"):  # a misspelt keyword, as everywhere in Python
        GRPOConfig.preset("dapo", clip_rnge=0.1)


def test_fewer_prompts_than_processes_are_refused(tmp_path, monkeypatch):
    class Four(Distributed):
        def __init__(self, **options):
            super().__init__(**options)
            self.world_size = 4

    monkeypatch.setattr(trainer_module, "Distributed", Four)
    message = message_of(tmp_path)
    assert "3 prompts" in message and "4 processes" in message and "prompts_per_step" in message


def test_a_data_set_smaller_than_a_step_is_used_again_with_other_draws(tmp_path):
    """Two prompts for steps of three: the second epoch begins within the step; no completion is a copy of another."""
    seen = []

    def recorded(prompts, completion_ids, **_):
        seen.append([*zip(prompts, map(tuple, completion_ids), strict=True)])
        return [float(len(ids)) for ids in completion_ids]

    lm = tiny.causal_lm(num_hidden_layers=1, initializer_range=0.02)
    settings = {"grpo": {"dynamic_sampling_rounds": 1}, "generation": {"max_new_tokens": 8}, "total_steps": 2}
    trainer = make_trainer(tmp_path, rewards=(recorded,), dataset=tiny.rows(["ab", "c"]), lm=lm, **settings)
    trainer.train()
    prompts = [prompt for call in seen for prompt, _ in call[::4]]
    assert [set(prompts[i : i + 2]) for i in (0, 2, 4)] == [{"ab", "c"}] * 3
    long = [row for call in seen for row in call if len(row[1]) >= 6]
    assert len(long) > 8 and len(set(long)) == len(long)


# --- rewards ---


def with_row_2(value):
    return lambda rows: [1.0, 2.0, value, *[0.5] * (rows - 3)]


RETURNS = {
    "NaN": (with_row_2(NAN), ["row 2", "nan", "finite"]),
    "infinity": (with_row_2(-INF), ["row 2", "-inf", "finite"]),
    "3e38": (with_row_2(3e38), ["row 2", "3e+38", "1e+09"]),
    "text": (with_row_2("high"), ["row 2", "'high'"]),
    "a list in it": (with_row_2([1.0]), ["row 2", "[1.0]"]),
    "too few": (lambda rows: [1.0] * (rows - 1), ["11 scores for 12"]),
    "a number": (lambda rows: 1.0, ["float 1.0", "12 completions"]),
    "nothing": (lambda rows: None, ["NoneType", "12 completions"]),
    "text alone": (lambda rows: "1" * rows, ["str", "12 completions"]),
    "a dict": (lambda rows: dict.fromkeys(range(rows), 1.0), ["dict", "12 completions"]),
    "a matrix": (lambda rows: torch.ones(rows, 1), ["shape (12, 1)"]),
    "an exception": (lambda rows: [1 / 0] * rows, ["ZeroDivisionError", "division by zero"]),
}


@pytest.mark.parametrize("case", RETURNS)
def test_a_reward_that_cannot_be_used_stops_the_run_and_what_was_trained_is_saved(case, tmp_path):
    """In the second step, with no checkpoint until then; repaired, the run goes on from it."""
    answer, parts = RETURNS[case]
    healthy = []

    def judge(completions, trainer_state, **_):
        ill = trainer_state.global_step == 1 and not healthy
        return answer(len(completions)) if ill else [float(len(text)) for text in completions]

    settings = {
        "rewards": (shape, judge),
        "checkpoint_every": 0,
        "total_steps": 2,
        "grpo": {"dynamic_sampling_rounds": 1},
    }
    trainer = make_trainer(tmp_path, **settings)
    with pytest.raises(InputError) as error:
        trainer.train()
    message = str(error.value)
    assert [part for part in ["'judge'", *parts] if part not in message] == [], message
    assert len(read_metrics(tmp_path)) == 1 and (tmp_path / "checkpoints" / "step-000001").is_dir()
    if case == "NaN":
        healthy.append(True)
        make_trainer(tmp_path, **settings).train(resume=True)
        assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("rounds", [1, 3])
def test_if_every_function_is_silent_on_every_completion_the_run_stops(rounds, tmp_path):
    def silent(completions, **_):
        return [None for _ in completions]

    trainer = make_trainer(tmp_path, rewards=(silent, silent), grpo={"dynamic_sampling_rounds": rounds})
    with pytest.raises(InputError, match="has a score: silent, silent_2 returned None for every row"):
        trainer.train()


def test_rewards_of_a_thousand_million_train_without_a_nan(tmp_path):
    """The largest that are accepted, beside small ones."""
    trainer = make_trainer(
        tmp_path,
        rewards=(lambda completions, **_: [1e9 if i % 3 else -1e9 for i in range(len(completions))],),
        total_steps=2,
    )
    metrics = trainer.train()
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.policy.parameters())


# --- completions that teach nothing ---


@pytest.mark.parametrize(
    "grpo",
    [
        {"aggregation": "sequence_mean"},
        {"aggregation": "token_mean", "kl_coef": 0.1, "entropy_coef": 0.1},
        {"aggregation": "group_token_mean", "whiten_tokens": True},
        {"aggregation": "constant_length", "ratio": "sequence", "kl_coef": 0.1, "kl_estimator": "sequence_k3"},
        {"scale": "batch_std", "kl_coef": 0.1, "kl_placement": "return_to_go", "whiten_tokens": True},
        {"dynamic_sampling_rounds": 2},
    ],
    ids=lambda grpo: "-".join(map(str, grpo.values())),
)
def test_if_all_completions_are_cut_and_left_out_the_step_is_made_without_a_gradient(grpo, tmp_path, monkeypatch):
    """No 0/0, no NaN in the log, and the weights stay as they are to the last bit."""
    monkeypatch.setattr(trainer_module, "end_tokens", lambda *_: [10**6])  # nothing ends
    lm = tiny.causal_lm(num_hidden_layers=1)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    grpo = {"dynamic_sampling_rounds": 1, "kl_coef": 0.0, "entropy_coef": 0.0, "mask_truncated": True, **grpo}
    make_trainer(tmp_path, lm=lm, grpo=grpo, total_steps=2).train()
    lines = read_metrics(tmp_path)
    assert [line["completions/clipped_ratio"] for line in lines] == [1.0, 1.0]
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]
    assert all(value is not None and math.isfinite(value) for line in lines for value in line.values())
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


# --- the command ---


@pytest.fixture(scope="module")
def recipe():
    """recipes/grpo.py, which imports its neighbours."""
    path = str(Path(__file__).parents[2] / "recipes")
    sys.path.insert(0, path)
    try:
        yield importlib.import_module("grpo")
    finally:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data, rewards and settings as a user would have them; there is no policy."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "good.jsonl").write_text('{"prompt": "ab", "answer": "a"}\n{"prompt": "c", "answer": "c"}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "column.jsonl").write_text('{"question": "ab"}\n')
    (folder / "rewards.py").write_text(
        "def good(completions, **_): return [1.0 for _ in completions]\n"
        "def wants_key(completions, key): return [1.0 for _ in completions]\n"
    )
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def run(recipe, inputs, output_dir, capsys, **changes) -> str:
    """The message of the command, which must end with status 2 and no traceback."""
    settings = {
        "policy": NOWHERE,
        "tokenizer": f"{inputs}/tokenizer",
        "dataset": f"{inputs}/good.jsonl",
        "reward": f"{inputs}/rewards.py:good",
        "output_dir": output_dir,
        "prompts_per_step": 2,
        "grpo.completions_per_prompt": 4,
        **changes,
    }
    arguments = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    with pytest.raises(SystemExit) as stopped, guard():
        recipe.main(recipe.settings(arguments))
    message = capsys.readouterr().err.partition("error: ")[2]
    assert stopped.value.code == 2 and "Traceback" not in message and len(message) < 900, message
    return message


COMMANDS = {
    # name: (settings, text of a YAML file, what the message must say)
    "unknown setting": ({"grpo.clip_rang": 0.2}, "", ["grpo.clip_rang", "Did you mean", "grpo.clip_range"]),
    "unknown key": ({}, "grpo:\n  beta: 0.1\n", ["line 2", "grpo.beta"]),
    "key misspelt": ({}, "grpo:\n  kl_cof: 0.1\n", ["line 2", "grpo.kl_cof", "Did you mean", "grpo.kl_coef"]),
    "key twice": ({}, "grpo:\n  kl_coef: 0.1\n  kl_coef: 0.2\n", ["line 3", "grpo.kl_coef", "second time", "line 2"]),
    "key twice, dotted": ({}, "grpo:\n  kl_coef: 0.1\ngrpo.kl_coef: 0.2\n", ["line 3", "grpo.kl_coef", "second time"]),
    "number as text": ({"grpo.kl_coef": "much"}, "", ["grpo.kl_coef", "much", "float"]),
    "no such choice": ({"grpo.center": "mean"}, "", ["grpo.center", "mean", "group_mean, leave_one_out, none"]),
    "NaN in YAML": ({}, "grpo:\n  clip_range: .nan\n", ["clip_range", "nan"]),
    "infinity in YAML": ({}, "grpo:\n  std_eps: .inf\n", ["std_eps", "inf", "finite"]),
    "null where there is none": ({}, "grpo:\n  kl_coef: null\n", ["grpo.kl_coef", "null"]),
    "half a completion": ({"grpo.completions_per_prompt": 2.5}, "", ["grpo.completions_per_prompt", "2.5", "int"]),
    "a group of one": ({"grpo.completions_per_prompt": 1}, "", ["grpo.completions_per_prompt=1", "at least 2"]),
    "a negative clip": ({"grpo.clip_range": -0.2}, "", ["grpo.clip_range", "above 0", "-0.2"]),
    "no reward": ({"reward": None}, "", ["reward", "--reward file.py:name"]),
    "a reward that is not there": ({"reward": "{}/rewards.py:goood"}, "", ["goood", "Did you mean 'good'"]),
    "a column that is missing": ({"reward": "{}/rewards.py:wants_key"}, "", ["wants_key", "'key'", "answer"]),
    "no such column": ({"prompt_column": "question"}, "", ["prompt_column='question'", "prompt", "answer"]),
    "no prompts": ({"dataset": "{}/column.jsonl"}, "", ["dataset", "prompt", "question"]),
    "no rows": ({"dataset": "{}/empty.jsonl"}, "", ["dataset", "empty.jsonl"]),
    "no file": ({"dataset": "{}/nothing.jsonl"}, "", ["dataset", "nothing.jsonl"]),
    "sizes": ({"update.minibatch_size": 3}, "", ["update.minibatch_size=3", "8 completions"]),
    "updates off the policy": (
        {"grpo.surrogate": "score", "update.num_epochs": 2},
        "",
        ["grpo.surrogate=score", "2 updates"],
    ),
    "unknown preset": ({"preset": "grop"}, "", ["preset='grop'", "grpo, dr_grpo, dapo"]),
    "unknown verdict": ({"grpo.dynamic_sampling_reward": "bad"}, "", ["grpo.dynamic_sampling_reward='bad'", "good"]),
    "no policy": ({"policy": None}, "", ["policy"]),
    "policy not there": ({}, "", ["policy", NOWHERE]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_refuses_bad_input_with_one_message(case, recipe, inputs, tmp_path, capsys):
    changes, text, parts = COMMANDS[case]
    changes = {name: v.format(inputs) if isinstance(v, str) else v for name, v in changes.items()}
    if text:
        (tmp_path / "settings.yaml").write_text(text)
        changes |= {"config": tmp_path / "settings.yaml"}
    message = run(recipe, inputs, tmp_path / "out", capsys, **changes)
    assert [part for part in parts if part not in message] == [], message
    assert (NOWHERE in message) == (case == "policy not there")  # everything else is refused before that
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["1e-5", "'1e-5'", "1.0e-5", "0.00001"])
def test_a_rate_of_1e_5_in_yaml_is_a_number_however_it_is_written(text, recipe, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"learning_rate: {text}\ngrpo:\n  kl_coef: {text}\n")
    config = recipe.settings([f"--config={tmp_path / 'settings.yaml'}"])
    assert config.learning_rate == config.grpo.kl_coef == 1e-5
