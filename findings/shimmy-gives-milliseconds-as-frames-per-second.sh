#!/usr/bin/env bash
# Shimmy's render_fps of a dm_control task is a number of milliseconds, and that of another task.
# Versions: Shimmy 2.0.1, dm_control 1.0.50, Gymnasium 1.4.0, MuJoCo 3.17.0, NumPy 2.4.6.
# Date: 2026-11-28.
# Gymnasium: metadata["render_fps"] says how many frames make a second; RecordVideo, HumanRendering
# and save_video go by it. One would expect 1 / control_timestep(): 100 for cartpole with its
# steps of 0.01 s, 40 for walker (0.025 s), 50 for finger (0.02 s).
# Seen: Shimmy sets control_timestep() * 1000: 10, 25 and 20. The shorter the steps, the slower the
# film: cartpole's plays at a tenth of its speed, walker's at five eighths.
# The dict belongs to the class, too: whichever task is made last sets the figure of all that
# were made before, so that a policy's film runs at another speed if an evaluation task is
# made beside it.
# Training is not touched; but who judges a gait by its film, or compares it with dm_control's
# own, sees a slow one. What helps: env.metadata = {**env.metadata, "render_fps": 1 / env.unwrapped.dt}
# around each environment, or RecordVideo(env, folder, fps=round(1 / env.unwrapped.dt)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q shimmy==2.0.1 dm_control==1.0.50 mujoco==3.17.0 gymnasium==1.4.0 \
    numpy==2.4.6 h5py imageio packaging
cat > show.py <<'PY'
import sys

import gymnasium
import shimmy  # registers the tasks

seen, envs = [], []
for task in ("cartpole-swingup", "walker-walk", "finger-spin"):
    env = gymnasium.make(f"dm_control/{task}-v0", disable_env_checker=True)
    envs.append(env)
    row = 1 / env.unwrapped.dt, float(env.metadata["render_fps"])
    seen.append(tuple(round(x, 6) for x in row))
    print(f"{task:17} steps per second {seen[-1][0]:5.1f}   render_fps {seen[-1][1]:5.1f}")
later = round(float(envs[0].metadata["render_fps"]), 6)
print(f"cartpole-swingup once all three are made:      render_fps {later:5.1f}")
if seen != [(100, 10), (40, 25), (50, 20)] or later != 20:
    sys.exit("the behaviour has changed")
PY
MUJOCO_GL=disable venv/bin/python -W ignore show.py
