"""`plot`: each figure shows what it says, its verdict follows from the numbers, and it is redrawn without training."""

import json

import numpy as np
import pytest

from gym_baselines.__main__ import main
from gym_baselines.figures import clip_objective, gae_lambda
from gym_baselines.figures.style import at_grid, common_grid, steps_text
from gym_baselines.measuring.measure import config_of
from gym_baselines.plots import FIGURES, plot
from rlhf.errors import InputError
from tests.controls import refute
from tests.gym_baselines.measured import result, run_here, without_package


def shown(folder, name):
    """The numbers behind a figure that was written; the picture is a PNG."""
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


# --- clip-objective ---


@pytest.mark.parametrize("epsilon", [0.2, 0.1])
def test_the_clipped_objective_is_drawn_as_its_pieces(epsilon, tmp_path, monkeypatch):
    """For A > 0 it rises as r A and is flat above 1 + epsilon; for A < 0 it is flat below 1 - epsilon, and r A above."""
    plot("clip-objective", [f"--output_dir={tmp_path}", f"--clip_range={epsilon}"])
    numbers = shown(tmp_path, "clip-objective")
    assert numbers["advantages"] == [-2, -1, -0.5, 0.5, 1, 2]
    ratio = np.array(numbers["ratio"])
    np.testing.assert_allclose(ratio, np.linspace(0.5, 1.5, 201), atol=1e-15)

    def check(objective):
        for advantage, curve in zip(numbers["advantages"], objective, strict=True):
            good, bad = (
                np.where(ratio > 1 + epsilon, 1 + epsilon, ratio),
                np.where(ratio < 1 - epsilon, 1 - epsilon, ratio),
            )
            np.testing.assert_allclose(curve, advantage * (good if advantage > 0 else bad), atol=1e-12)

    def clipped_on_both_sides(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high):
        return -(logprobs - old_logprobs).exp().clamp(1 - clip_low, 1 + clip_high) * advantages

    check(numbers["objective"])
    monkeypatch.setattr(clip_objective, "clipped_surrogate", clipped_on_both_sides)
    config = clip_objective.Config(clip_range=epsilon)
    refute(check, clip_objective.numbers(config, {})["objective"])


# --- step-size ---


def step_size_result(job):
    """The clipped runs end at 500; the unclipped at 400 and, from learning rate .01 on, at 20 * (seed + 1)."""
    rate, unclipped = job.spec.changes["learning_rate"], job.spec.changes["surrogate"] == "unclipped"
    final = (20.0 * (job.spec.seed + 1) if rate >= 0.01 else 400.0) if unclipped else 500.0
    return result([100.0, final], kls=[rate] * 19 + [None, 2 * rate])


def test_step_size_finds_the_learning_rate_at_which_the_unclipped_surrogate_breaks(tmp_path, monkeypatch, capsys):
    ran = run_here(monkeypatch, step_size_result)
    plot("step-size", [f"--output_dir={tmp_path}", "--seeds=2", "--learning_rates=[0.03,0.001,0.01]"])
    numbers = shown(tmp_path, "step-size")
    assert len(ran) == 2 * 2 * 3
    assert numbers["learning_rates"] == [0.001, 0.01, 0.03]
    assert numbers["unclipped"]["final_return"] == [[400, 400], [20, 40], [20, 40]]
    assert numbers["clipped"]["final_return"] == [[500, 500]] * 3
    exact = 0.001 + 0.001 * (0.95 * 19 - 18)  # the 95 % quantile of nineteen times .001 and once .002
    assert numbers["clipped"]["large_kl"][0] == pytest.approx([exact] * 2)
    words = capsys.readouterr().out
    assert "clipped: best final return 500 at learning rate 0.001; keeps more than half of it up to 0.03" in words
    assert "unclipped: best final return 400 at learning rate 0.001; falls below half of it from 0.01 on" in words


def test_a_figure_is_redrawn_without_training_and_trained_again_on_request(tmp_path, monkeypatch, capsys):
    arguments = [f"--output_dir={tmp_path}", "--seeds=1", "--learning_rates=[0.001,0.01]"]
    run_here(monkeypatch, step_size_result)
    first = plot("step-size", arguments).read_bytes()
    again = run_here(monkeypatch, step_size_result)
    assert plot("step-size", arguments).read_bytes() == first and again == []
    assert "4 of 4 results are in" in capsys.readouterr().out
    plot("step-size", [*arguments, "--overwrite"])
    assert len(again) == 4
    with pytest.raises(InputError, match=r"other settings \(.*num_epochs"):
        plot("step-size", [*arguments, "--num_epochs=3"])


# --- gae-lambda ---


def gae_numbers(returns, **changes):
    """Numbers of the figure with these last returns: lambda -> one list per seed."""
    series = {"environment_steps": [100, 200, 300], "episode_return": [None, 1.0, 2.0]}
    seeds = len(next(iter(returns.values())))
    config = gae_lambda.Config(seeds=seeds, lambdas=tuple(returns), total_steps=300, **changes)
    results = {
        f"lambda{value:g}-seed{seed}": result([1.0], last=last, series=series)
        for value, by_seed in returns.items()
        for seed, last in enumerate(by_seed)
    }
    return gae_lambda.numbers(config, results)


def test_gae_lambda_gives_mean_and_deviation_of_the_last_episodes_of_all_seeds():
    row = gae_numbers({0.95: [[1.0, 3.0], [5.0, 7.0]]})["rows"][0]
    assert row["mean"] == 4.0 and row["std"] == pytest.approx(5**0.5)
    assert row["mean_by_seed"] == [2.0, 6.0]
    assert row["curves"][0] == [(200, 1.0), (300, 2.0)]  # before the first episode ends there is no mean


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([[0.0], [0.0], [0.0]], ".95 is the best of these"),
        # mean 11 against 10, with means over seeds of deviation 1 and 2: the error of the difference is sqrt(5 / 3)
        (
            [[9.0], [11.0], [13.0]],
            ".95 is not to be told apart from 0.5, which is 1.0 higher with a standard error of 1.3",
        ),
        (
            [[11.5], [13.5], [15.5]],
            ".95 is not to be told apart from 0.5, which is 3.5 higher",
        ),  # 2.71 errors: 2.78 allowed
        ([[18.0], [20.0], [22.0]], ".95 is beaten by 0.5, which is 10.0 higher, 7.7 standard errors over seeds"),
    ],
)
def test_the_verdict_on_lambda_weighs_the_difference_against_the_spread_over_seeds(other, words):
    numbers = gae_numbers({0.95: [[9.0], [10.0], [11.0]], 0.5: other})
    assert words in gae_lambda.verdict(numbers)


def test_one_seed_gives_no_verdict_of_its_own():
    assert "one seed cannot tell" in gae_lambda.verdict(gae_numbers({0.95: [[9.0]], 0.5: [[10.0]]}))


# --- penalty ---


def penalty_result(job):
    if job.spec.algorithm == "ppo":
        return result([200.0, 500.0])
    late = 0.012 if job.spec.seed == 0 else 0.016  # the second is beyond 1.5 times the target
    steps = [100 * k for k in range(1, 11)]
    kls = [1.0, 1.0] + [late] * 8  # the first fifth of 1000 steps does not count
    return result([100.0, 450.0], series={"environment_steps": steps, "penalty_coef": [1.0] * 10, "measured_kl": kls})


def test_the_penaltys_kl_is_judged_after_the_first_fifth_of_training(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, penalty_result)
    plot("penalty", [f"--output_dir={tmp_path}", "--seeds=2", "--total_steps=1000"])
    assert shown(tmp_path, "penalty")["settled_kl"] == [0.012, 0.016]
    words = capsys.readouterr().out
    assert "within a factor 1.5 of the target 0.01 in 1 of 2 seeds" in words
    assert "PPO-Penalty 450, PPO-Clip 500" in words


# --- vector-envs ---


def test_vector_envs_compares_at_equal_steps(tmp_path, monkeypatch, capsys):
    run_here(
        monkeypatch,
        lambda job: result([50.0, 100.0 * job.spec.changes["num_envs"]], wall_s=8.0 / job.spec.changes["num_envs"]),
    )
    plot("vector-envs", [f"--output_dir={tmp_path}", "--seeds=2"])
    numbers = shown(tmp_path, "vector-envs")
    assert [(row["num_envs"], row["rollout_size"], row["wall_s"]) for row in numbers["rows"]] == [
        (1, 128, [16.0, 16.0]),
        (4, 512, [4.0, 4.0]),
    ]
    assert "4 environments instead of 1 makes the same steps 4.00 times as fast" in capsys.readouterr().out


def test_every_run_of_every_figure_has_settings_that_training_accepts():
    settings = {}
    for name, figure in FIGURES.items():
        for job in figure.jobs(figure.Config()):
            settings[f"{name} {job.name}"] = config_of(job.spec)
    assert settings["step-size unclipped-lr0.01-seed2"].ppo.surrogate == "unclipped"
    assert settings["step-size clipped-lr0.01-seed2"].learning_rate == 0.01
    assert settings["gae-lambda lambda0.95-seed1"].ppo.gae_lambda == 0.95
    assert settings["vector-envs 4envs-seed0"].batch_size == 4 * settings["vector-envs 1envs-seed0"].batch_size
    assert settings["penalty ppo_penalty-seed0"].ppo.penalty_target == 0.01


def test_a_figure_trains_for_real(tmp_path, monkeypatch):
    run_here(monkeypatch)
    short = ["--seeds=1", "--total_steps=600", "--eval_episodes=1", "--final_episodes=2", "--eval_every=300"]
    plot("penalty", [*short, f"--output_dir={tmp_path}"])
    rollouts = shown(tmp_path, "penalty")["rollouts"][0]
    assert all(kl > 0 for kl in rollouts["measured_kl"]) and rollouts["penalty_coef"][0] == 1.0


# --- small parts, and refusals ---


def test_curves_are_compared_where_all_of_them_were_measured():
    curves = [[(90, 0.0), (210, 12.0)], [(110, 5.0), (190, 5.0)]]
    grid = common_grid(curves, 50)
    assert grid.tolist() == [110, 150, 190]
    assert at_grid(curves[0], grid).tolist() == pytest.approx([2.0, 6.0, 10.0])
    assert np.isnan(at_grid(curves[1], [100, 200])).all()
    assert [steps_text(steps) for steps in (950, 15_000, 1_500_000)] == ["950", "15k", "1.5M"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clip"], "there is no figure 'clip'"),
        (["clip-objective", "--clip_range=0.7"], "clip_range must lie between 0 and 0.5"),
        (["gae-lambda", "--lambdas=[1.5]"], "lambdas must lie between 0 and 1"),
        (["step-size", "--learning_rates=[0.1]"], "learning_rates must be two or more"),
        (["penalty", "--seeds=0"], "seeds must be at least 1"),
        (["vector-envs", "--num_envs=[0]"], "num_envs must be 1 or more"),
        (["vector-envs", "--seed=3"], "Did you mean 'seeds'"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot", *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_missing_matplotlib_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    without_package(monkeypatch, "matplotlib")
    with pytest.raises(InputError, match=r"pip install 'rlhf-toolkit\[plots\]'"):
        plot("clip-objective", [f"--output_dir={tmp_path}"])


def test_plot_without_a_name_lists_the_figures(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot", "--help"])
    assert stopped.value.code == 0
    words = capsys.readouterr().out
    assert all(name in words for name in FIGURES)
