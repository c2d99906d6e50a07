"""Records a video of a saved agent. Training itself never renders."""

import os
from pathlib import Path

import gymnasium as gym

from gym_baselines.agent import Agent
from gym_baselines.envs.environments import EVALUATION, make_env
from rlhf.errors import InputError


def record_video(agent: Agent, directory: str | Path, *, seed: int = 0) -> Path:
    """Record one greedy episode as an MP4 in `directory`. Needs moviepy (the extra `video`)."""
    directory = Path(directory)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # some environments draw with SDL, which looks for a screen
    options = agent.environment_config()
    try:
        shown = make_env(agent.env, seed=seed, row=0, purpose=EVALUATION, options=options, render_mode="rgb_array")
        name = agent.env.replace("/", "-")
        env: gym.Env = gym.wrappers.RecordVideo(shown, str(directory), name_prefix=name, disable_logger=True)
    except gym.error.DependencyNotInstalled as error:
        raise InputError(f"--video needs a package that is missing: {error}. Try: pip install moviepy") from error
    observation, info = env.reset()
    over = False
    while not over:
        action = agent.predict(observation, action_mask=info.get("action_mask") if options.action_masks else None)
        observation, _, terminated, truncated, info = env.step(action)
        over = terminated or truncated
    env.close()
    return max(directory.glob("*.mp4"), key=lambda path: path.stat().st_mtime)
