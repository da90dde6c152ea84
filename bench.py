# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0", "gymnasium", "stable-baselines3"]
# ///
"""Measures thrust.py beside whichever of its peers are installed; asserts nothing.

    pip install "gymnasium[box2d,mujoco]" stable-baselines3 sbx-rl    peers, each optional
    python bench.py                      every section (learning takes hours)
    python bench.py --only learning --quick    one seed of the cheap environments
    python bench.py --quick              the same, with fewer rounds
    python bench.py --only pool solve    these sections
    python bench.py --other OLD.py       beside another version of thrust.py

Every table is Markdown. Contestants take turns within one run, so that the machine's moods fall
on all of them alike. A figure is the median of the rounds, with the smallest and the largest in
brackets; a ratio is the median of the rounds' own ratios, and above 1 where Thrust is ahead."""

import argparse
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from importlib import import_module, metadata, util
from multiprocessing.pool import ThreadPool
from unittest import mock

import numpy as np
import torch

import thrust

gym = util.find_spec("gymnasium") and import_module("gymnasium")
has_sb3, has_sbx = map(util.find_spec, ("stable_baselines3", "sbx"))

RAW = {"norm_obs": False, "norm_reward": False, "total_steps": 8192}
# RL-Zoo's settings for CartPole and those of CleanRL's ppo.py, in Thrust's words
ZOO = {"num_envs": 8, "num_steps": 32, "minibatch_size": 256, "epochs": 20, "gamma": 0.98}
ZOO |= {"gae_lambda": 0.8, "learning_rate": 1e-3, **RAW}
CLEANRL = {"num_envs": 4, "num_steps": 128, "minibatch_size": 128, "epochs": 4, "gamma": 0.99}
CLEANRL |= {"gae_lambda": 0.95, "learning_rate": 2.5e-4, "ent_coef": 0.01, **RAW}
REAL = {"num_envs": 8, "num_steps": 256, "minibatch_size": 64, "epochs": 10, **RAW}
REAL |= {"gamma": 0.99, "gae_lambda": 0.95, "learning_rate": 3e-4}
SETTINGS = {
    "CartPole, Thrust's (64 x 32)": {**thrust.CARTPOLE, "total_steps": 32_768},
    "CartPole, RL-Zoo's (8 x 32)": ZOO,
    "CartPole, CleanRL's (4 x 128)": CLEANRL,
    "HalfCheetah-v5 (8 x 256)": {"env": "HalfCheetah-v5", **REAL},
    "Hopper-v5 (8 x 256)": {"env": "Hopper-v5", **REAL},
    "LunarLander-v3 (16 x 128)": {
        **REAL, "env": "LunarLander-v3", "num_envs": 16, "num_steps": 128
    },
}  # fmt: skip

# What `--only learning` trains for a million steps: flags beyond --env and --seed, and the
# return that others report for PPO: RL-Zoo's benchmark.md, one run, settings tuned for each.
GAMES = {
    "Acrobot-v1": ("", "-73.5"),
    "LunarLander-v3": ("", "242.1 (v2)"),
    "Pendulum-v1": ("", "-172.2 (100,000 steps)"),
    "BipedalWalker-v3": ("", "287.9 (5,000,000 steps)"),
    "HalfCheetah-v5": ("", "5819 (v3)"),
    "Hopper-v5": ("", "2410 (v3)"),
    "Walker2d-v5": ("", "3479 (v3)"),
    "Swimmer-v5": ("", "281.6 (v3)"),
    "Taxi-v4": ("", ""),
    "MountainCar-v0": (
        "--num-steps 16 --minibatch-size 64 --epochs 4 --gae-lambda 0.98",
        "-110.4",
    ),
}
CHEAP = "Acrobot-v1", "Pendulum-v1", "Taxi-v4"


def take_turns(rounds, *contestants):
    """The seconds per step, round by round, of each contestant, a generator function that gets
    ready, yields, is timed, and yields its number of steps. (A missing one is false.)"""
    results = [[] for _ in contestants]
    for i in range(rounds + 1):
        for seconds, contestant in zip(results, contestants):
            if contestant:
                run = contestant()
                next(run)
                began = time.perf_counter()
                steps = next(run)
                seconds += [(time.perf_counter() - began) / steps] if i else []
    return results


def spread(values, unit=1.0):
    """The median, and in brackets the smallest and the largest, in multiples of `unit`."""
    digits = (f"{float(f'{f(values) / unit:.3g}'):,.15g}" for f in (np.median, min, max))
    return "{} ({} to {})".format(*digits).replace("inf", "never") if values else ""


def ratio(a, b):
    """How many times b is a: the median of the rounds' own ratios."""
    return f"{np.median(np.divide(a, b)):.2f}" if a and b else ""


def table(title, header, rows):
    """Prints a Markdown table, without columns that are empty."""
    columns = [c for c in zip(header.split(" | "), *rows) if any(x != "" for x in c[1:])]
    head, *body = zip(*columns)
    print(f"\n**{title}**\n")
    for line in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(map(str, line)) + " |", flush=True)


def stepping(envs):
    """A contestant that steps `envs` with random actions for half a second."""
    actions, steps = np.random.default_rng(0).integers(0, 2, (32, envs.num_envs)), 0
    yield
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        envs.step(actions[steps % 32])
        steps += 1
    yield steps


def step_in_turns(args, *envs):
    """The seconds per step of all N, round by round, of each of `envs` that is not missing."""
    for each in filter(None, envs):
        each.reset(seed=0)
    results = take_turns(3 if args.quick else 11, *(e and partial(stepping, e) for e in envs))
    for each in filter(None, envs):
        each.close()
    return results


def bench_cartpole(args):
    rows = []
    for n in (1, 64, 4096):
        make = gym and partial(gym.make_vec, "CartPole-v1", n)
        ours, *theirs = step_in_turns(
            args,
            thrust.CartPole(n),
            gym and make("vector_entry_point"),
            gym and n <= 64 and make("sync", {"autoreset_mode": "SameStep"}),
            args.other and args.other.CartPole(n),
        )
        figures = spread(ours, 1e-6), spread([n / s for s in ours])
        rows.append([n, *figures, *(ratio(s, ours) for s in theirs)])
    header = "N | µs per step of all N | environment steps/s | times CartPoleVectorEnv"
    header += " | times SyncVectorEnv | times the other"
    table("CartPole, random actions", header, rows)


class Slow(thrust.CartPole):
    """CartPoles of which each takes 200 µs of Python more for a step."""

    SECONDS = 200e-6

    def step(self, actions):
        # Of the processor's time: by the clock on the wall, two could share a core for nothing.
        until = time.thread_time() + self.SECONDS * self.num_envs
        while time.thread_time() < until:
            pass
        return super().step(actions)


class Quick(Slow):
    SECONDS = 20e-6


def bench_pool(args):
    rows, other = [], args.other
    for make_env, n in (
        (thrust.CartPole, 64),
        (thrust.CartPole, 4096),
        (Quick, 64),
        (Slow, 64),
    ):
        fast, same_step = make_env is thrust.CartPole, {"autoreset_mode": "SameStep"}
        none, one, two, *others = step_in_turns(
            args,
            make_env(n),
            thrust.EnvPool(make_env, n, 1),
            thrust.EnvPool(make_env, n, 2),
            gym and fast and n == 64 and gym.make_vec("CartPole-v1", n, "async", same_step),
            other and other.EnvPool(other.CartPole if fast else make_env, n, 2),
        )
        figures = [spread(seconds, 1e-6) for seconds in (none, one, two)]
        rows.append([make_env.__name__, n, *figures, *(ratio(s, two) for s in (none, *others))])
    header = "environment | N | no workers | 1 worker | 2 workers | 2 workers, times none"
    header += " | times AsyncVectorEnv | times the other's 2 workers"
    title = "EnvPool, µs per step of all N (Quick, Slow: 20, 200 µs of Python for each)"
    table(title, header, rows)


def thrust_loop(module, knobs, workers=0):
    """A contestant: the training loop of thrust.py, or of another version of it."""
    config = module.Config(**knobs)
    make_env, n = partial(module.make_env, config.env), config.num_envs
    with closing(module.EnvPool(make_env, n, workers) if workers else make_env(n)) as envs:
        learner = module.PPO(envs, config)
        yield
        yield [learner.update() for _ in range(config.num_updates)][-1]["steps"]


def sb3_options(config):
    """The same settings in Stable-Baselines3's words."""
    same = ("gamma", "gae_lambda", "learning_rate", "ent_coef", "vf_coef", "max_grad_norm")
    names = {"n_steps": "num_steps", "batch_size": "minibatch_size", "n_epochs": "epochs"}
    names |= {"clip_range": "clip", **dict(zip(same, same))}
    return {theirs: getattr(config, ours) for theirs, ours in names.items()}


def sb3_loop(knobs):
    """Stable-Baselines3's."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    config = thrust.Config(**knobs)
    name = "CartPole-v1" if config.env == "CartPole" else config.env
    envs = make_vec_env(name, config.num_envs, seed=0)
    model = PPO("MlpPolicy", envs, seed=0, device="cpu", **sb3_options(config))
    yield
    yield model.learn(config.total_steps).num_timesteps


def bench_training(args):
    rows = []
    for name, knobs in SETTINGS.items():
        real = "env" in knobs
        if real and not (gym and util.find_spec("mujoco") and util.find_spec("Box2D")):
            continue
        loops = [partial(thrust_loop, thrust), has_sb3 and sb3_loop]
        loops += [args.other and partial(thrust_loop, args.other)]
        loops += [real and partial(thrust_loop, thrust, workers=2)]
        contestants = [loop and partial(loop, knobs) for loop in loops]
        ours, *others = take_turns(3 if args.quick else 15, *contestants)
        figures = [spread([1 / s for s in seconds]) for seconds in (ours, *others)]
        *theirs, workers = others
        rows.append([name, *figures, *(ratio(s, ours) for s in theirs), ratio(ours, workers)])
    header = "settings | Thrust | Stable-Baselines3 | other | Thrust, 2 workers"
    header += " | times SB3 | times the other | 2 workers, times none"
    table("Training, environment steps per second, one thread", header, rows)


def learn(job):
    """Trains in a process of its own; returns the mean return of its 100 greedy episodes."""
    name, seed, folder = job
    flags = f"--env {name} --seed {seed} --total-steps 1000000 --runs {folder} {GAMES[name][0]}"
    command = [sys.executable, thrust.__file__, *flags.split()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mean = re.search(r"evaluation: mean return (\S+)", output)[1]
    print(f"{name}, seed {seed}: {mean}", file=sys.stderr, flush=True)  # it may take hours
    return float(mean)


def bench_learning(args):
    names, seeds = (CHEAP, [1]) if args.quick else (GAMES, range(1, args.seeds + 1))
    with tempfile.TemporaryDirectory() as folder, ThreadPool(os.cpu_count()) as pool:
        jobs = [(name, seed, folder) for seed in seeds for name in names]
        means = np.reshape(pool.map(learn, jobs, 1), (-1, len(names))).T.tolist()
    rows = [[name, GAMES[name][0], spread(x), GAMES[name][1]] for name, x in zip(names, means)]
    header = "environment | flags | mean return of 100 greedy episodes | RL-Zoo's PPO, one run"
    table(f"After 1,000,000 steps, seeds 1 to {len(seeds)}", header, rows)


PARTS = """thrust.PPO.update thrust.PPO._collect thrust.CartPole.step thrust.ActorCritic.act
thrust.PPO._advantages thrust.PPO._improve
thrust.ppo_loss torch.Tensor.backward thrust.Adam.step"""


def bench_profile(args):
    config = thrust.Config(**thrust.CARTPOLE)
    seconds = {part: [] for part in PARTS.split()}
    learner = thrust.PPO(thrust.CartPole(config.num_envs), config)

    def timed(part, function):
        def run(*arguments, **keywords):
            began = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[part][-1] += time.perf_counter() - began
            return result

        return run

    for part in seconds:
        mock.patch(part, timed(part, pkgutil.resolve_name(part))).start()
    for _ in range(config.num_updates * (1 if args.quick else 5)):
        for each in seconds.values():
            each.append(0.0)
        learner.update()
    mock.patch.stopall()
    rows = []
    for part, times in seconds.items():
        share = np.median(np.divide(times, seconds["thrust.PPO.update"]))
        rows.append([f"`{part}`", spread(times, 1e-3), f"{100 * share:.1f} %"])
    title = "One update, one thread; _collect calls step and act, _improve the last three"
    table(title, "call | ms | share", rows)


# Starts a process from a small one: to Linux a process had the memory of what started it.
LAUNCH = """import os, sys
used = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)[2]
print("used", used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"""


def watch(command):
    """Of a process: seconds and steps until 475 passed; seconds, CPU seconds, MB in all."""
    with tempfile.TemporaryDirectory() as folder:
        passed, began = (np.inf, np.inf), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        for line in process.stdout:
            seconds = time.perf_counter() - began
            if line.startswith("passed 475"):
                passed = seconds, int(re.search(r"([\d,]+) steps", line)[1].replace(",", ""))
        process.wait()
    return *passed, seconds, *map(float, line.split()[1:])


def solve(PPO, seed, num_envs, options):
    """Trains a peer until 475 is passed, in a process that has nothing else of this file."""
    from stable_baselines3.common.env_util import make_vec_env

    def go_on(*_):
        if model.num_timesteps % (num_envs * options["n_steps"]):
            return True  # like Thrust, it looks only at the end of a rollout
        returns = [episode["r"] for episode in model.ep_info_buffer]
        if passed := len(returns) == 100 and sum(returns) >= 475 * 100:
            print(f"passed 475, {model.num_timesteps} steps", flush=True)
        return not passed

    torch.set_num_threads(1)
    for knob in ("learning_rate", "clip_range"):  # in RL-Zoo's settings both fall to zero
        options[knob] = lambda left, first=options[knob]: first * left
    envs = make_vec_env("CartPole-v1", num_envs, seed=seed)
    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", **options)
    model.learn(100_000, go_on)


def bench_solve(args):
    def peer(python, module):
        call = f"solve({module}.PPO, int(sys.argv[1]), {ZOO['num_envs']}, {options})"
        program = f"import sys, torch, {module}\n{inspect.getsource(solve)}\n{call}"
        return [python, "-c", program]

    options, sbx_python = sb3_options(thrust.Config(**ZOO)), args.peer_python or sys.executable
    commands = {
        "Thrust": [sys.executable, thrust.__file__, "--seed"],
        "other": args.other and [sys.executable, args.other.__file__, "--seed"],
        "Stable-Baselines3": has_sb3 and peer(sys.executable, "stable_baselines3"),
        "SBX (JAX)": (has_sbx or args.peer_python) and peer(sbx_python, "sbx"),
    }
    seeds, rows = 2 if args.quick else 10, []
    runs = {name: [] for name, command in commands.items() if command}
    for seed in range(1, seeds + 1):
        for name, results in runs.items():
            results.append(watch([sys.executable, "-ISc", LAUNCH, *commands[name], str(seed)]))
    for name, results in runs.items():
        passed, *others = zip(*results)
        times = "" if name == "Thrust" else ratio(passed, next(zip(*runs["Thrust"])))
        rows.append([name, spread(passed), times, *map(spread, others)])
    header = "whole process (peers stop at 475) | 475 passed, s | Thrust, times that"
    header += " | environment steps by then | process ends, s | CPU seconds | peak MB"
    table(f"Until 100 episodes have a mean return of 475, seeds 1 to {seeds}", header, rows)


def main():
    names = ["cartpole", "pool", "training", "profile", "solve", "learning"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and seeds")
    parser.add_argument("--only", choices=names, nargs="+", help="measure these sections")
    parser.add_argument("--seeds", type=int, default=5, help="seeds per environment to learn")
    parser.add_argument("--other", metavar="FILE", help="another version of thrust.py")
    parser.add_argument("--peer-python", type=os.path.abspath, help="a Python with sbx-rl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2]
    packages = filter(util.find_spec, ("numpy", "torch", "gymnasium", "stable_baselines3"))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"{os.cpu_count()} cores, {processor}, Python {sys.version.split()[0]}, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        if args.other:  # under a name of its own, by which workers can import it as well
            shutil.copy(args.other, f"{folder}/other_thrust.py")
            sys.path.insert(0, folder)
            args.other = import_module("other_thrust")
        for name in args.only or names:
            globals()[f"bench_{name}"](args)


if __name__ == "__main__":
    main()
