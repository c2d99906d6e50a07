"""The GRPO command: figures are what they are named, and all stages run."""

import json

import arithmetic
import grpo_pipeline
import pytest
from grpo import GRPORecipe
from grpo_pipeline import Answers, measure

from rlhf.commands.cli import parse
from rlhf.errors import InputError


def test_measure_counts_greedy_and_sampled_answers_by_hand(monkeypatch):
    monkeypatch.setattr(grpo_pipeline, "NUM_SAMPLES", 4)
    said = Answers(greedy=["4", "7"], sampled=[["4", "4", "5", "4"], ["6", "7", "8", "9"]], lengths=[2, 3, 2, 5])
    figures = measure(said, right=["4", "6"])
    # problem 1: 3 of 4 right, problem 2: 1 of 4; every 4 of 4 hold a right one
    assert figures == {"accuracy_greedy": 0.5, "pass@1": 0.5, "pass@4": 1.0, "completion_length": 3.0}


def run(settings):
    return grpo_pipeline.run(parse(GRPORecipe, settings).training(), resume=False, overwrite=False)


def test_all_stages_run_are_reused_and_refuse_other_settings(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name, size in (("NUM_SFT", 128), ("NUM_TEST", 8)):
        monkeypatch.setattr(arithmetic, name, size)
    settings = ["--total_steps=2", "--prompts_per_step=2", "--grpo.completions_per_prompt=2", "--eval_every=1"]
    settings += ["--generation.max_new_tokens=4", f"--output_dir={tmp_path / 'run'}"]
    results = run(settings)
    first = capsys.readouterr().out
    assert set(results) == {"SFT", "GRPO"} and "8 held-out problems" in first
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0
    assert run(settings) == results  # the same draws: the same figures
    assert capsys.readouterr().out.count("reusing") == 3
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        run([*settings, "--seed=1"])
