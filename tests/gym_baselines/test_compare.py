"""`compare`: its statistics are exact, an interrupted comparison goes on, and a run's clocks and KL are its own."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gym_baselines.__main__ import main
from gym_baselines.compare import CompareConfig, compare, jobs_of, threshold_of
from gym_baselines.envs.environments import EVALUATION, EnvironmentConfig, make_env
from gym_baselines.figures.tables import count_lines, markdown, measured_table, plain, quoted_table, summarize
from gym_baselines.measuring.jobs import Job, run_jobs
from gym_baselines.measuring.lines_of_code import executed_lines
from gym_baselines.measuring.measure import config_of, key_of
from gym_baselines.measuring.meter import Meter, RunSpec, Stopwatch, peak_memory_bytes
from rlhf.commands.cli import parse
from rlhf.core.distributions import Categorical
from rlhf.errors import InputError, TrainingError
from tests.controls import refute
from tests.gym_baselines.measured import result, run_here, without_package


def spec(**changes):
    return RunSpec(
        **{"env": "CartPole-v1", "algorithm": "ppo", "seed": 0, "total_steps": 300, "eval_every": 200}
        | {"eval_episodes": 2, "final_episodes": 3}
        | changes
    )


# --- statistics over seeds ---

THREE = [
    result([100, 480, 490, 450], kls=[0.1, 0.2], cpu_s=1.0, peak_mib=100),  # reaches 475 after 2000 steps
    result([100, 200, 480, 470], kls=[0.3, None], cpu_s=2.0, peak_mib=300),  # after 3000
    result([10, 20, 30, 20], kls=[0.5, 0.9], cpu_s=4.0, peak_mib=200),  # never
]


def test_medians_count_a_seed_that_never_arrives_as_later_than_all_others():
    def check(summarize_runs):
        one = summarize_runs("ppo", THREE, 475.0, (500, 20))
        assert (one.steps_to_threshold, one.reached, one.seeds) == (3000, 2, 3)
        assert one.cpu_s_to_threshold == 6.0  # of 2, 6 and infinity
        two = summarize_runs("ppo", [THREE[0], THREE[2]], 475.0, None)
        assert math.isinf(two.steps_to_threshold) and two.reached == 1  # half of the seeds is not most of them

    def only_those_that_arrive(name, results, threshold, lines):
        arrived = [one for one in results if max(point["mean"] for point in one["evaluations"]) >= threshold]
        return summarize(name, arrived, threshold, lines)

    check(summarize)
    refute(check, only_those_that_arrive)


def test_the_other_statistics_are_those_of_the_definition():
    one = summarize("ppo", THREE, 475.0, (500, 20))
    assert one.final == (450, 20, 470)  # median, min, max of 450, 470, 20
    assert one.drop == 10  # of 40, 10, 10
    assert one.cpu_us_per_step == pytest.approx(2000)  # of 1000, 2000, 4000
    assert one.peak_mib == 200
    assert one.kl_per_update == pytest.approx(0.3)  # of .1 .2 .3 .5 .9
    assert (one.lines, one.own_lines) == (500, 20)


def test_without_a_threshold_nobody_arrives_and_nobody_is_counted():
    one = summarize("ppo", THREE, None, None)
    assert one.reached is None and math.isinf(one.steps_to_threshold)
    assert measured_table([one], None)[1][3] == "-"


def test_tables_show_the_measured_numbers_beside_the_quoted_words():
    one = summarize("ppo", THREE, 475.0, (500, 20))
    never = summarize("sb3_sac", [THREE[2]], 475.0, (400, None))
    table = measured_table([one, never], 475.0)
    row = dict(zip(table[0], table[1], strict=True))
    assert row["final return (min..max)"] == "450.0 (20.0..470.0)"
    assert row["steps to 475"] == "3k (2/3)" and row["CPU s to 475"] == "6.0"
    assert row["lines of code"] == "500 (20 own)"
    assert dict(zip(table[0], table[2], strict=True))["steps to 475"] == "not reached (0/1)"
    quoted = quoted_table([one, never], 475.0)
    assert quoted[1][:2] == ["ppo", "medium"] and quoted[1][2] == "20 / 500"
    assert (quoted[2][1], quoted[2][3], quoted[2][5]) == ("medium", "high", "high")  # SAC, under its peer's name
    assert markdown(table).splitlines()[1].count("---") == len(table[0])
    assert len({len(line) for line in plain(table).splitlines()}) == 1  # aligned


def test_own_lines_are_those_that_not_every_algorithm_of_the_library_executes():
    lines = {"a": {"f": [1, 2, 3], "g": [1]}, "b": {"f": [2, 3, 4]}, "sb3_c": {"f": [1]}}
    counts = count_lines(lines, {"a": "ours", "b": "ours", "sb3_c": "theirs"})
    assert counts == {"a": (4, 2), "b": (3, 1), "sb3_c": (1, None)}


def test_executed_lines_are_the_code_that_ran_and_nothing_else(tmp_path, monkeypatch):
    package = tmp_path / "counted"
    package.mkdir()
    (package / "__init__.py").write_text(
        '"""Docstring."""\n'
        "LIMIT = 3\n"  # runs on import
        "def used(x):\n"
        '    """Docstring."""\n'
        "    # a comment\n"
        "    if x > LIMIT:\n"  # 6
        "        return 0\n"
        "    total = sum(\n"  # 8
        "        # a comment within\n"
        "        [x, 1]\n"  # 10
        "    )\n"  # 11
        "    return total\n"  # 12
        "def unused():\n"
        "    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import counted

    assert executed_lines(lambda: counted.used(1), ["counted"]) == {"counted/__init__.py": [6, 8, 10, 11, 12]}
    assert executed_lines(lambda: counted.used(9), ["counted"]) == {"counted/__init__.py": [6, 7]}


# --- what is measured of a run ---


def test_the_clocks_stand_still_while_they_are_paused(monkeypatch):
    now = {"cpu": 10.0, "wall": 100.0}
    monkeypatch.setattr("time.process_time", lambda: now["cpu"])
    monkeypatch.setattr("time.perf_counter", lambda: now["wall"])
    clock = Stopwatch()
    now.update(cpu=12.0, wall=105.0)
    with clock.paused():
        now.update(cpu=50.0, wall=200.0)
        assert clock.read() == (2.0, 5.0)
        with clock.paused():  # an evaluation within the measurements after an update
            now.update(cpu=60.0, wall=300.0)
        now.update(cpu=61.0, wall=301.0)
    now.update(cpu=62.0, wall=304.0)
    assert clock.read() == (3.0, 8.0)


class Scripted:
    """A policy over two actions whose logit difference is set by hand; an evaluation returns the number of steps."""

    env, options = "CartPole-v1", EnvironmentConfig()

    def __init__(self):
        self.logit, self.steps = 0.0, 0

    def evaluate(self, episodes, seed):
        return np.full(episodes, float(self.steps))

    def sample(self, observations, step):
        return np.zeros(len(observations), dtype=np.int64)

    def distribution(self, observations):
        return torch.tensor([self.logit, 0.0]).expand(len(observations), 2)

    def kl(self, old, new):
        return float(Categorical(2).kl(old, new).mean())


def test_a_meter_evaluates_after_the_update_that_passes_each_multiple_and_measures_every_update():
    meter, player = Meter(spec(eval_every=100, series=("entropy",))), Scripted()
    logits = [0.0, 1.0, 1.0, 3.0, 3.0]
    for player.steps, player.logit in zip((40, 110, 190, 420, 450), logits, strict=True):
        meter.after_update(player.steps, player, {"entropy": float("nan") if player.steps == 190 else 0.5})
    outcome = meter.result(player, [1.0] * 30)
    assert [point["steps"] for point in outcome["evaluations"]] == [110, 420, 450]  # 200 and 300 passed in one update
    assert [point["episodes"] for point in outcome["evaluations"]] == [2, 2, 3]
    p, q = torch.tensor([0.0, 1.0]).sigmoid(), torch.tensor([1.0, 3.0]).sigmoid()
    exact = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).tolist()
    torch.testing.assert_close(outcome["kl_per_update"], [exact[0], 0.0, exact[1], 0.0])
    assert outcome["series"]["entropy"] == [0.5, 0.5, None, 0.5, 0.5]  # JSON has no NaN
    assert len(outcome["last_returns"]) == 20


def test_an_evaluation_at_the_end_replaces_that_of_the_same_policy():
    meter, player = Meter(spec(eval_every=100)), Scripted()
    meter.after_update(100, player, {})
    assert [point["episodes"] for point in meter.result(player, [])["evaluations"]] == [3]


def test_peak_memory_is_this_process_own():
    before = peak_memory_bytes()
    ballast = np.ones(2**24)  # 128 MiB
    assert peak_memory_bytes() >= 100 * 2**20
    assert peak_memory_bytes() - before <= ballast.nbytes + 2**25


# --- going on, and refusing ---


def test_an_interrupted_comparison_runs_only_what_is_missing(tmp_path, monkeypatch):
    config = CompareConfig(algorithms=["a2c", "ppo"], seeds=2, total_steps=300, output_dir=str(tmp_path))
    lines = {"lines": {"f.py": [1, 2]}}

    def interrupted(job):
        if job.name == "a2c-seed1":
            raise KeyboardInterrupt
        return lines if job.task == "lines" else result([1.0])

    ran = run_here(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    done = {path.stem for path in (tmp_path / "runs").glob("*.json")}
    assert {"a2c-lines", "ppo-lines", "a2c-seed0", "ppo-seed0"} <= done and "a2c-seed1" not in done
    ran = run_here(monkeypatch, lambda job: result([99.0]))
    summaries = compare(config)
    assert set(ran) == {job.name for job in jobs_of(config)} - done
    assert summaries[0].final == (50.0, 1.0, 99.0)  # seed 0 of the first call, seed 1 of the second
    more = run_here(monkeypatch, lambda job: result([5.0]))
    compare(replace(config, seeds=3))
    assert more == ["a2c-seed2", "ppo-seed2"]
    again = run_here(monkeypatch, lambda job: lines if job.task == "lines" else result([5.0]))
    compare(replace(config, overwrite=True))
    assert len(again) == 6


def test_results_of_other_settings_are_never_mixed_in(tmp_path, monkeypatch):
    run_here(monkeypatch, lambda job: result([1.0]))

    def run(one):
        return run_jobs([Job("ppo-seed0", one)], tmp_path, workers=1, overwrite=False, description="")

    run(spec())
    with pytest.raises(InputError, match=r"other settings \(spec.total_steps, settings.total_steps\).*overwrite"):
        run(spec(total_steps=600))
    path = tmp_path / "runs" / "ppo-seed0.json"
    stored = json.loads(path.read_text())
    stored["settings"]["ppo"]["clip_range"] = 0.3  # a preset that has changed since
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"settings.ppo.clip_range"):
        run(spec())
    path.write_text('{"torn')
    with pytest.raises(InputError, match="Delete it"):
        run(spec())


CHILD = """#!/bin/sh
# stands in for python: -m gym_baselines.measuring.measure TASK SPEC PATH
echo "a line that some library printed"
echo '{"steps": 150, "mean": 3.0}'
case "$4" in
    *broken*) echo "error: seed must lie in [0, 1)." >&2; exit 2;;
    *diverges*) echo "stopped: NaN" >&2; exit 1;;
esac
echo '{"steps": 700, "mean": 4.0}'
echo "{\\"threads\\": $OMP_NUM_THREADS, \\"task\\": \\"$3\\"}" > "$5"
"""


def test_every_job_is_a_process_with_one_thread_whose_error_is_passed_on(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(CHILD)
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))

    def run(*jobs):
        (tmp_path / "runs").mkdir(exist_ok=True)
        return run_jobs(jobs, tmp_path, workers=2, overwrite=False, description="")

    made = run(Job("a", spec()), Job("b", spec(), task="lines"))
    assert made == {"a": {"threads": 1, "task": "run"}, "b": {"threads": 1, "task": "lines"}}
    with pytest.raises(InputError, match=r"^c: seed must lie in \[0, 1\)"):
        run(Job("c", spec(changes={"hidden_sizes": (1,)}, series=("broken",))))
    with pytest.raises(TrainingError, match=r"^d: NaN"):
        run(Job("d", spec(series=("diverges",))))


@pytest.mark.slow
def test_a_run_in_its_own_process_is_measured(tmp_path):
    one = Job("a2c", spec(algorithm="a2c"))
    made = run_jobs([one], tmp_path, workers=1, overwrite=False, description="")["a2c"]
    assert made["steps"] >= 300 and made["cpu_s"] > 0 and len(made["kl_per_update"]) > 3
    assert key_of(one.spec).items() <= made.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ["pppo"]}, "'pppo' is not known"),
        ({"algorithms": []}, "algorithms is empty"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"env": "CartPol-v1"}, "Did you mean 'CartPole"),
        ({"env": "Pendulum-v1", "algorithms": ["sb3_dqn"]}, "sb3_dqn needs Discrete actions, Pendulum-v1 has Box"),
        ({"env": "Blackjack-v1", "algorithms": ["sb3_ppo"]}, "sb3_ppo is compared on observations that are vectors"),
        ({"algorithms": ["sb3_sac"]}, "sb3_sac needs Box actions, CartPole-v1 has Discrete"),
    ],
)
def test_bad_settings_are_refused_before_a_process_starts(changes, message, monkeypatch, tmp_path):
    ran = run_here(monkeypatch)
    with pytest.raises(InputError, match=message):
        compare(CompareConfig(**{"output_dir": str(tmp_path)} | changes))
    assert ran == []


@pytest.mark.parametrize(
    ("algorithm", "package", "name"),
    [("sb3_sac", "stable_baselines3", "stable-baselines3"), ("sb3_trpo", "sb3_contrib", "sb3-contrib")],
)
def test_a_missing_peer_is_named_with_the_command_that_installs_it(
    algorithm, package, name, monkeypatch, tmp_path, capsys
):
    without_package(monkeypatch, package)
    ran = run_here(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--env", "Pendulum-v1", "--algorithms", f"ppo,{algorithm}", "--output_dir", str(tmp_path)])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and name in message and "pip install 'rlhf-toolkit[peers]'" in message
    assert ran == []


def test_algorithms_may_be_given_with_commas_and_thresholds_come_from_the_environment():
    config = parse(CompareConfig, ["--algorithms", "ppo, a2c,ppo"])
    assert config.algorithms == ["ppo", "a2c"]
    assert threshold_of(config) == 475
    assert threshold_of(replace(config, env="Pendulum-v1")) == -230
    assert threshold_of(replace(config, threshold=7.0)) == 7


def test_every_algorithm_trains_as_long_as_its_preset_unless_told_otherwise():
    config = CompareConfig(algorithms=["ppo", "a2c", "sb3_dqn"], seeds=1)
    steps = {job.spec.algorithm: job.spec.total_steps for job in jobs_of(config) if job.task == "run"}
    assert steps == {"ppo": 100_000, "a2c": 500_000, "sb3_dqn": 50_000}
    assert {job.spec.total_steps for job in jobs_of(replace(config, total_steps=9)) if job.task == "run"} == {9}
    assert config_of(spec(changes={"clip_range": 0.3})).ppo.clip_range == 0.3


# --- the whole, small ---


def test_compare_writes_curves_tables_and_numbers(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch)
    arguments = ["--algorithms", "a2c,ppo", "--seeds", "1", "--total_steps", "600", "--eval_every", "200"]
    arguments += ["--eval_episodes", "2", "--final_episodes", "3", "--output_dir", str(tmp_path)]
    main(["compare", *arguments])
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() in printed and "KL per update" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = {one["algorithm"]: one for one in json.loads((tmp_path / "summary.json").read_text())}
    assert set(summary) == {"a2c", "ppo"}
    for one in summary.values():
        assert one["cpu_us_per_step"] > 0 and one["kl_per_update"] > 0 and one["own_lines"] > 0
        assert one["steps_to_threshold"] is None  # 475 is not reached in 600 steps
    assert (tmp_path / "table.md").read_text().startswith("| algorithm |")


# --- peers ---


def test_a_peer_is_evaluated_from_the_start_states_that_our_own_evaluation_uses():
    from gym_baselines.measuring.peers import PeerPlayer

    model = SimpleNamespace(
        get_vec_normalize_env=lambda: None,
        predict=lambda observations, deterministic: (np.zeros(len(observations), dtype=np.int64), None),
    )
    expected = []
    for row in range(4):
        env = make_env("CartPole-v1", seed=5, row=row, purpose=EVALUATION)
        env.reset()
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(0)
            total, over = total + reward, terminated or truncated
        expected.append(total)
    assert PeerPlayer(model, "CartPole-v1").evaluate(4, seed=5).tolist() == expected


@pytest.mark.parametrize(("algorithm", "env"), [("sb3_a2c", "CartPole-v1"), ("sb3_ppo", "Pendulum-v1")])
def test_the_kl_of_a_peers_policies_is_exact(algorithm, env):
    pytest.importorskip("stable_baselines3")
    from gym_baselines.measuring.peers import PeerPlayer, build

    player = PeerPlayer(build(spec(algorithm=algorithm, env=env)), env)
    space = make_env(env, seed=0, row=0).observation_space
    states = np.random.default_rng(0).uniform(-1, 1, (6, *space.shape)).astype(np.float32)
    old = player.distribution(states)
    with torch.no_grad():
        for parameter in player.model.policy.parameters():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).view_as(parameter))
    new = player.distribution(states)
    if env == "CartPole-v1":
        expected = (old.probs * (old.probs.log() - new.probs.log())).sum(-1).mean()
    else:
        ratio, shift = (old.stddev / new.stddev) ** 2, ((old.mean - new.mean) / new.stddev) ** 2
        expected = (0.5 * (ratio + shift - 1 - ratio.log())).sum(-1).mean()
    assert expected > 1e-4
    assert player.kl(old, new) == pytest.approx(float(expected), rel=1e-4)


def test_rl_zoos_settings_build_their_models():
    pytest.importorskip("sb3_contrib")
    from gym_baselines.measuring.peers import build
    from gym_baselines.measuring.zoo import ZOO

    for (algorithm, env), settings in ZOO.items():
        try:
            make_env(env, seed=0, row=0).close()
        except InputError:
            continue  # its package is missing
        model = build(spec(algorithm=algorithm, env=env))
        assert model.gamma == settings.get("gamma", 0.99)
        assert model.n_envs == settings.get("n_envs", 1)
        assert (model.get_vec_normalize_env() is not None) == settings.get("normalize", False)
        assert all(single.render_mode is None for single in model.get_env().unwrapped.envs)
        rate = settings.get("learning_rate")
        if isinstance(rate, str):
            assert model.lr_schedule(1.0) == float(rate.removeprefix("lin_")) and model.lr_schedule(0.0) == 0.0
