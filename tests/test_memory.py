"""The memory plan against what a process really uses, and against TRL: minutes long, so they run under `make test-slow`."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TOLERANCE = 0.15
"""Bytes do not depend on how fast a machine is; a little on its C library and on how its kernels use scratch memory."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "case", ["ppo", "ppo_lora", "ppo_critic", "ppo_checkpointing", "ppo_reward_model", "ppo_bfloat16"]
)
def test_the_plan_is_right(case, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import in_a_process

    found = in_a_process(case)
    assert found["predicted"] == pytest.approx(found["measured"], rel=TOLERANCE)
