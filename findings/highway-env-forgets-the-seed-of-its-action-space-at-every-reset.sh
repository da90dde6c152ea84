#!/usr/bin/env bash
# highway-env's reset throws away the seed of env.action_space.
# highway-env 1.12.1, Gymnasium 1.4.0, NumPy 2.4.6; seen on 2026-11-28.
#
# Gymnasium says that `env.action_space.seed(n)` makes `sample()` repeatable, and its environments
# keep their space for life. So one expects two programs that seed the space and reset(seed=n)
# to play the same random episodes. In highway-env they differ: `reset` makes a new action space
# (it does so twice), which nobody has seeded, and draws from it for the `info` that it returns.
# Roads and cars do follow the seed: with given actions, everything is the same again, in every
# episode. So a random baseline, or a warm-up of random steps that asks env.action_space, cannot be
# repeated, and the seed of the environment looks broken although it is not. A space that was
# stored before `reset` is not the one that env.action_space gives afterwards.
# What helps: seed env.action_space after every reset, or draw actions from a space of one's own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 gymnasium==1.4.0 highway-env==1.12.1
SDL_VIDEODRIVER=dummy SDL_AUDIODRIVER=dummy "$folder/venv/bin/python" -W ignore - <<'PY'
import gymnasium
import highway_env
import numpy as np


def first_samples(name):
    """Five times: seed the space, reset, and draw eight actions. How many different octets?"""
    env, drawn = gymnasium.make(name), set()
    for _ in range(5):
        env.action_space.seed(42)
        env.reset(seed=42)
        drawn.add(tuple(int(env.action_space.sample()) for _ in range(8)))
    return len(drawn)


def road(name):
    """Two episodes of given actions, of which only the first is seeded."""
    env, seen = gymnasium.make(name), []
    for seed in (42, None):
        seen.append(env.reset(seed=seed)[0])
        seen += [env.step(1)[0] for _ in range(4)]
    return np.array(seen)


cartpole, highway = first_samples("CartPole-v1"), first_samples("merge-v1")
print("different sequences of random actions after the same two seeds, of 5 tries:")
print(f"  CartPole-v1: {cartpole}")
print(f"  merge-v1:    {'1' if highway == 1 else 'more than 1'}")
env = gymnasium.make("merge-v1")
before = env.action_space
env.reset(seed=42)
kept = env.action_space is before
print("merge-v1 has the same action space after reset:", kept)
repeats = np.array_equal(road("merge-v1"), road("merge-v1"))
print("merge-v1 repeats two episodes of given actions:", repeats)
if not (cartpole == 1 and highway > 1 and not kept and repeats):
    raise SystemExit("the behaviour has changed")
PY
