#!/usr/bin/env bash
# MinAtar: a seeded reset still remembers the last action of the episode before.
# minatar 1.0.15, gymnasium 1.4.0, numpy 2.4.6; seen on 2026-11-28.
# Actions are sticky: with probability 0.1, the game repeats the action before. Gymnasium says of
# reset(seed=...) that it resets the generator, and its checker expects equal starts. So one seed
# and equal actions should give one episode, whatever was played before.
# But `last_action` is set to 0 when the object is made, and never again. If the first action
# of an episode is replaced, then by the last one of the episode before.
# Here, 4 of 12 seeds give another episode in a used environment than in a new one. (Those whose
# first draw is not below 0.1 are equal.) A test of a single seed will most likely pass.
# An evaluation with fixed seeds depends on what was played earlier, and an episode cannot be
# replayed from its seed. What helps: `env.unwrapped.game.last_action = 0` before each reset.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q minatar==1.0.15 gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import gymnasium
import minatar.gym
import numpy as np

minatar.gym.register_envs()


def play(env, seed):
    seen, terminated = [env.reset(seed=seed)[0]], False
    while not terminated and len(seen) < 60:
        obs, _, terminated, _, _ = env.step(0)  # do nothing
        seen.append(obs)
    return np.array(seen)


def seeds_that_differ(mended):
    other = []
    for seed in range(12):
        env = gymnasium.make("MinAtar/Breakout-v1")
        new = play(env, seed)
        env.reset(seed=99)
        for _ in range(3):
            env.step(2)  # the other episode ends in moves to the right
        if mended:
            env.unwrapped.game.last_action = 0
        if not np.array_equal(new, play(env, seed)):
            other.append(seed)
    return other


as_it_is, mended = seeds_that_differ(False), seeds_that_differ(True)
print("seeds whose episode depends on the one before:", as_it_is)
print("and once last_action is 0 before the reset:", mended)
if not as_it_is or mended:
    raise SystemExit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
