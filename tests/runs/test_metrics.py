"""Names are defined once, sums are reduced once, and the file of an interrupted run equals that of a whole one."""

import json
import os
import sys

import pytest
import torch

from rlhf.errors import InputError, TrainingError
from rlhf.runs.curves import plot_curves
from rlhf.runs.jsonlines import MetricsWriter, read_metrics
from rlhf.runs.metrics import TABLE, unknown_names
from rlhf.training.sums import MetricSums


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_metric_says_what_it_is():
    for name, metric in TABLE.items():
        assert len(metric.description) > 10 and "\n" not in metric.description, name


@pytest.mark.parametrize(
    "name",
    ["score", "rewards/my_reward.v2/mean", "eval/score", "eval/rewards/length/mean", "custom/brackets", "reward_kl"],
)
def test_names_of_the_table_are_known(name):
    assert unknown_names([name]) == []


@pytest.mark.parametrize(
    "name",
    ["scores", "rewards/f", "rewards/f/median", "rewards/a/b/mean", "rewards//mean", "eval/x", "", "score ", "kls"],
)
def test_names_outside_the_table_are_reported(name):
    assert unknown_names(["score", name]) == [name]


# --- sums -------------------------------------------------------------------------------------------------------------


def test_a_mean_weighs_elements_and_not_microbatches():
    sums = MetricSums()
    sums.add({"score": (scalar(6.0), scalar(3))})  # three elements of mean 2
    sums.add({"score": (scalar(10.0), scalar(1))})  # one element of 10; the mean of the two means would be 6
    assert sums.reduce(lambda tensor: tensor) == {"score": 4.0}


def test_all_metrics_of_a_step_cost_one_collective():
    calls = []
    sums = MetricSums()
    sums.add({name: (scalar(1.0), scalar(2)) for name in ("entropy", "score", "policy_loss")})
    result = sums.reduce(lambda tensor: (calls.append(tensor.shape), tensor)[1])
    assert len(calls) == 1 and result == {"entropy": 0.5, "score": 0.5, "policy_loss": 0.5}


def test_two_processes_give_the_global_mean_whatever_the_order_of_their_metrics():
    first, second = MetricSums(), MetricSums()
    first.add({"score": (scalar(1.0), scalar(1)), "entropy": (scalar(8.0), scalar(4))})
    second.add({"entropy": (scalar(0.0), scalar(0)), "score": (scalar(5.0), scalar(2))})  # a process without tokens
    sent = []
    second.reduce(lambda tensor: (sent.append(tensor), tensor)[1])
    assert first.reduce(lambda tensor: tensor + sent[0]) == {"score": 2.0, "entropy": 2.0}


def test_processes_with_different_metrics_are_noticed():
    first, second = MetricSums(), MetricSums()
    first.add({"score": (scalar(1.0), scalar(1))})
    second.add({"entropy": (scalar(1.0), scalar(1))})
    sent = []
    second.reduce(lambda tensor: (sent.append(tensor), tensor)[1])
    with pytest.raises(AssertionError, match="different metrics"):
        first.reduce(lambda tensor: tensor + sent[0])


def test_adding_a_metric_never_reads_a_tensor(monkeypatch):
    """On a GPU, reading a value waits for the device; the meta device has no values to read at all."""
    sums = MetricSums()
    for _ in range(2):
        sums.add({"score": (torch.zeros((), device="meta"), torch.zeros((), device="meta"))})


def test_sums_keep_no_graph_and_lose_no_small_addends():
    sums = MetricSums()
    parameter = torch.tensor(1.0, requires_grad=True)
    sums.add({"score": (parameter * 2.0**26, scalar(1))})
    for _ in range(64):
        sums.add({"score": (scalar(1.0), scalar(0))})  # in float32, 2**26 + 1 == 2**26
    assert sums.reduce(lambda tensor: tensor) == {"score": 2.0**26 + 64}
    sent = []
    sums.reduce(lambda tensor: (sent.append(tensor), tensor)[1])
    assert not sent[0].requires_grad


def test_a_metric_that_nothing_counted_for_is_left_out():
    sums = MetricSums()
    assert sums.reduce(lambda tensor: tensor) == {}
    sums.add({"score": (scalar(0.0), scalar(0)), "entropy": (scalar(1.0), scalar(1))})
    assert sums.reduce(lambda tensor: tensor) == {"entropy": 1.0}


# --- files ------------------------------------------------------------------------------------------------------------


def values(step: int) -> dict[str, float]:
    return {"score": 0.1 * step, "entropy": 1 / (step + 3), "completion_length": step}


def write(writer: MetricsWriter, steps) -> None:
    for step in steps:
        writer.write(step, values(step), {"step_s": 0.5})


def metrics_bytes(directory) -> bytes:
    return (directory / "metrics.jsonl").read_bytes()


def test_lines_have_sorted_keys_all_digits_and_no_times(tmp_path):
    MetricsWriter(tmp_path).write(3, {"score": 0.1 + 0.2, "entropy": torch.tensor(0.5)}, {"step_s": 1.25})
    assert metrics_bytes(tmp_path) == b'{"entropy": 0.5, "score": 0.30000000000000004, "step": 3}\n'
    assert (tmp_path / "times.jsonl").read_bytes() == b'{"step": 3, "step_s": 1.25}\n'


def test_values_that_json_does_not_have_become_null(tmp_path):
    MetricsWriter(tmp_path).write(1, {"score": float("nan"), "entropy": float("-inf")})
    assert metrics_bytes(tmp_path) == b'{"entropy": null, "score": null, "step": 1}\n'
    assert read_metrics(tmp_path) == [{"entropy": None, "score": None, "step": 1}]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    write(writer, [1])
    assert read_metrics(tmp_path) == [{"step": 1, **values(1)}]


@pytest.mark.parametrize("checkpointed", [0, 1, 4, 7])
def test_interrupted_and_resumed_equals_uninterrupted_byte_for_byte_wherever_it_was_cut(tmp_path, checkpointed):
    """The run dies at every byte after the checkpointed step, the torn ones included; then it goes on to step 8."""
    (tmp_path / "whole").mkdir()
    write(MetricsWriter(tmp_path / "whole"), range(1, 9))
    whole = metrics_bytes(tmp_path / "whole")
    kept = sum(len(line) for line in whole.splitlines(keepends=True)[:checkpointed])
    for cut in range(kept, len(whole) + 1):
        run = tmp_path / f"cut at {cut}"
        run.mkdir()
        (run / "metrics.jsonl").write_bytes(whole[:cut])
        writer = MetricsWriter(run)
        writer.truncate_to(checkpointed)
        write(writer, range(checkpointed + 1, 9))
        writer.close()
        assert metrics_bytes(run) == whole


def test_without_the_cut_the_file_would_differ(tmp_path):
    """Negative control: appending alone repeats the steps that the dead run had logged after its checkpoint."""
    write(MetricsWriter(tmp_path), range(1, 4))
    write(MetricsWriter(tmp_path), range(3, 5))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 3, 4]


def test_cutting_to_minus_one_starts_anew_and_times_are_cut_too(tmp_path):
    writer = MetricsWriter(tmp_path)
    write(writer, range(4))
    writer.truncate_to(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "times.jsonl").read_text().splitlines()] == [0, 1, 2]
    writer.truncate_to(-1)
    assert metrics_bytes(tmp_path) == b"" == (tmp_path / "times.jsonl").read_bytes()


def test_a_damaged_line_that_must_stay_stops_the_resume_and_nothing_is_cut(tmp_path):
    writer = MetricsWriter(tmp_path)
    write(writer, range(1, 5))
    damaged = metrics_bytes(tmp_path).replace(b'"step": 2', b'"step"; 2')
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2"):
        writer.truncate_to(3)
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2"):
        read_metrics(tmp_path)
    assert metrics_bytes(tmp_path) == damaged


def test_reading_leaves_out_a_torn_last_line_and_names_a_missing_file(tmp_path):
    write(MetricsWriter(tmp_path), [1, 2])
    (tmp_path / "metrics.jsonl").write_bytes(metrics_bytes(tmp_path)[:-1])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with pytest.raises(InputError, match="nowhere"):
        read_metrics(tmp_path / "nowhere")


def test_a_full_disk_is_a_training_error_that_names_file_and_step(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._metrics, "_file", Full())
    with pytest.raises(TrainingError, match=r"metrics\.jsonl.*step 5.*No space left"):
        write(writer, [5])


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_show_every_metric_over_its_steps_with_labels(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    savefig = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), savefig(self, *args, **kw))
    )
    writer = MetricsWriter(tmp_path)
    write(writer, [1, 2])
    writer.write(3, {"score": float("nan"), "reward_kl": 2.0, "custom/x": 1.0})
    names = ["score", "reward_kl", "custom/x", "completion_length"]
    plot_curves(tmp_path, tmp_path / "curves.png", names)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    panels = [panel for panel in drawn[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == names and {panel.get_xlabel() for panel in panels} == {"step"}
    assert [panel.get_ylabel() for panel in panels] == ["score", "nats per completion", "value", "tokens"]
    assert panels[0].lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.2]]  # the NaN is a gap, not a 0


def test_curves_of_a_metric_that_was_not_logged_name_those_that_were(tmp_path):
    write(MetricsWriter(tmp_path), [1])
    with pytest.raises(InputError, match=r"reward_kl.*completion_length.*entropy.*score"):
        plot_curves(tmp_path, tmp_path / "curves.png", ["score", "reward_kl"])


def test_curves_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    write(MetricsWriter(tmp_path), [1])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install rlhf-toolkit\[plots\]"):
        plot_curves(tmp_path, tmp_path / "curves.png", ["score"])
