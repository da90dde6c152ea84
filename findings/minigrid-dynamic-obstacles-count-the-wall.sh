#!/usr/bin/env bash
# MiniGrid's Dynamic-Obstacles: to walk against the outer wall is a collision, and ends the episode.
# minigrid 3.2.0, gymnasium 1.4.0, numpy 2.4.6; seen on 2026-11-28.
# The environment's text says that an episode ends, at -1, if the agent collides with an obstacle,
# and the obstacles are the moving balls. In other rooms of MiniGrid, a step forward against
# a wall does nothing. One would expect the same of this one.
# Its step asks instead whether the cell ahead holds anything but the goal, before balls move. So a
# wall ends the episode at -1, and so does a ball that has left the cell by the time of the move.
# Of 300 episodes played at random, 236 ended at a wall; of 64 at a ball, 61 had an empty cell ahead
# once the balls had moved.
# What a training mostly learns first is to keep off the walls; a mean return near -1 says little
# about balls. What helps: count ends at walls apart, or mask `forward` in front of a wall.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q minigrid==3.2.0 gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
from collections import Counter

import gymnasium
import minigrid
import numpy as np


def ahead(game, at):
    cell = game.grid.get(*at)
    return cell.type if cell else "nothing"


room = gymnasium.make("MiniGrid-Empty-8x8-v0")
room.reset(seed=0)
room.step(0)  # turn to the wall
plain = room.step(2)[1:3]
print("Empty, forward against the wall: reward, terminated =", plain)

env = gymnasium.make("MiniGrid-Dynamic-Obstacles-8x8-v0")
ends = Counter()
for seed in range(300):
    env.reset(seed=seed)
    game, draws = env.unwrapped, np.random.default_rng(seed)
    terminated = truncated = False
    while not (terminated or truncated):
        at = tuple(game.front_pos)
        before = ahead(game, at)
        _, reward, terminated, truncated, _ = env.step(int(draws.integers(3)))
    ends[before, ahead(game, at), int(reward)] += 1
for (before, after, reward), number in ends.most_common():
    print(f"{number} ended at {reward}: {before} ahead, and {after} after the balls moved")
walls, gone = ends["wall", "wall", -1], ends["ball", "nothing", -1]
if plain != (0, False) or not (walls > 150 and gone > 30):
    raise SystemExit("the behaviour has changed")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py"
