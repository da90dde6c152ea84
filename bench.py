# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0", "gymnasium", "stable-baselines3"]
# ///
"""Measures thrust.py beside whichever of its peers are installed; asserts nothing.

    pip install "gymnasium[box2d,mujoco]" stable-baselines3 envpool      peers, each optional
    python bench.py                      every section (learning takes hours)
    python bench.py --only pool solve    these sections
    python bench.py --quick              fewer rounds and seeds
    python bench.py --cleanrl ppo.py     beside CleanRL's, as it stands in its repository
    python bench.py --peer-python PYTHON    to solve with sbx-rl, and CleanRL's (Gymnasium 0.29)

Every table is Markdown. Contestants take turns within one run, so that the machine's moods fall
on all of them alike. A figure is the median of the rounds, with the smallest and the largest in
brackets; a ratio is the median of the rounds' own ratios, and above 1 where Thrust is ahead."""

import argparse
import contextlib
import inspect
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import import_module, metadata, util
from multiprocessing.pool import ThreadPool
from unittest import mock

import numpy as np
import torch

import thrust

PACKAGES = "gymnasium", "stable_baselines3", "envpool", "mujoco", "Box2D"
has = {name: bool(util.find_spec(name)) for name in PACKAGES}
# RL-Zoo's settings for CartPole, those of CleanRL's ppo.py, and others', in Thrust's words
RAW = {"norm_obs": False, "norm_reward": False, "total_steps": 8192}
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
    "HalfCheetah-v5 (8 x 256)": {**REAL, "env": "HalfCheetah-v5"},
    "Hopper-v5 (8 x 256)": {**REAL, "env": "Hopper-v5"},
    "LunarLander-v3 (8 x 256)": {**REAL, "env": "LunarLander-v3"},
}
GAMES = "Acrobot-v1 Pendulum-v1 Taxi-v4 LunarLander-v3 BipedalWalker-v3 HalfCheetah-v5"
GAMES = f"{GAMES} Hopper-v5 Walker2d-v5 Swimmer-v5 MountainCar-v0".split()
FLAGS = {"MountainCar-v0": "--num-steps 16 --minibatch-size 64 --epochs 4 --gae-lambda 0.98"}


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
                run.close()
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


def stepping(envs, n):
    """A contestant that steps n environments with random actions for half a second."""
    actions, steps = np.random.default_rng(0).integers(0, 2, (32, n), np.int32), 0
    yield
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        envs.step(actions[steps % 32])
        steps += 1
    yield steps


def step_in_turns(args, n, *makers):
    """The seconds per step of all n, round by round, of what each maker makes, if not false."""
    with contextlib.ExitStack() as stack:
        envs = [make and stack.enter_context(contextlib.closing(make())) for make in makers]
        for each in filter(None, envs):
            each.reset()
        contestants = [each and partial(stepping, each, n) for each in envs]
        return take_turns(3 if args.quick else 11, *contestants)


def gymnasiums(n, mode):
    """Makes Gymnasium's CartPoles, or is false without Gymnasium."""
    make_vec = has["gymnasium"] and import_module("gymnasium").make_vec
    same_step = {} if mode == "vector_entry_point" else {"autoreset_mode": "SameStep"}
    return make_vec and partial(make_vec, "CartPole-v1", n, mode, same_step)


def bench_cartpole(args):
    rows = []
    for n in (64, 4096):
        pool = has["envpool"] and import_module("envpool").make_gymnasium
        ours, *theirs = step_in_turns(
            args, n, partial(thrust.CartPole, n), gymnasiums(n, "vector_entry_point"),
            n == 64 and gymnasiums(n, "sync"),
            pool and partial(pool, "CartPole-v1", num_envs=n, num_threads=1),
        )  # fmt: skip
        figures = spread(ours, 1e-6), spread([n / s for s in ours])
        rows.append([n, *figures, *(ratio(s, ours) for s in theirs)])
    header = "N | µs per step of all N | environment steps/s | times CartPoleVectorEnv"
    header += " | times SyncVectorEnv | times envpool, one thread"
    table("CartPole, random actions, one core", header, rows)


class Slow(thrust.CartPole):
    """CartPoles of which each takes some time of the processor's more for a step."""

    def __init__(self, seconds, num_envs):
        super().__init__(num_envs)
        self.seconds = seconds * num_envs

    def step(self, actions):
        until = time.thread_time() + self.seconds  # by the wall's clock, two could share a core
        while time.thread_time() < until:
            pass
        return super().step(actions)


def bench_pool(args):
    rows, quick, slow = [], partial(Slow, 20e-6), partial(Slow, 200e-6)
    kinds = ("CartPole", thrust.CartPole, 64), ("CartPole", thrust.CartPole, 4096)
    for name, kind, n in (*kinds, ("20 µs each", quick, 64), ("200 µs each", slow, 64)):
        peer = kind is thrust.CartPole and n == 64 and gymnasiums(n, "async")
        makers = partial(kind, n), partial(thrust.EnvPool, kind, n, 2), peer
        none, two, peers = step_in_turns(args, n, *makers)
        both = spread(none, 1e-6), spread(two, 1e-6)
        rows.append([name, n, *both, ratio(none, two), ratio(peers, two)])
    header = (
        "environment | N | no workers | 2 workers | times no workers | times AsyncVectorEnv"
    )
    table("EnvPool, µs per step of all N", header, rows)


def thrust_loop(knobs, workers=0):
    """A contestant: the training loop of thrust.py."""
    config = thrust.Config(**knobs, workers=workers)
    with contextlib.closing(thrust.make_envs(config)) as envs:
        learner = thrust.PPO(envs, config)
        yield
        yield [learner.update() for _ in range(config.num_updates)][-1]["steps"]


def sb3_options(config):
    """The same settings in Stable-Baselines3's words."""
    names = ["gamma", "gae_lambda", "learning_rate", "ent_coef", "vf_coef", "max_grad_norm"]
    others = {"n_steps": config.num_steps, "batch_size": config.minibatch_size}
    others |= {"n_epochs": config.epochs, "clip_range": config.clip}
    return others | {name: getattr(config, name) for name in names}


def sb3_loop(knobs):
    """Stable-Baselines3's."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    config = thrust.Config(**knobs)
    envs = make_vec_env(knobs.get("env", "CartPole-v1"), config.num_envs, seed=0)
    model = PPO("MlpPolicy", envs, seed=0, device="cpu", **sb3_options(config))
    yield
    yield model.learn(config.total_steps).num_timesteps
    envs.close()


def cleanrl_loop(file, knobs):
    """CleanRL's ppo.py, the whole script, at its own settings."""
    command = [file, "--no-cuda", "--total-timesteps", str(knobs["total_steps"])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            contextlib.chdir(stack.enter_context(tempfile.TemporaryDirectory()))
        )
        stack.enter_context(mock.patch("sys.argv", command))
        stack.enter_context(contextlib.redirect_stdout(None))
        yield
        runpy.run_path(file, run_name="__main__")
        yield knobs["total_steps"]


def bench_training(args):
    rows, able = [], all(has[name] for name in ("gymnasium", "mujoco", "Box2D"))
    for name, knobs in SETTINGS.items():
        if (real := "env" in knobs) and not able:
            continue
        loops = [thrust_loop, has["stable_baselines3"] and sb3_loop]
        loops += [knobs is CLEANRL and args.cleanrl and partial(cleanrl_loop, args.cleanrl)]
        loops += [real and partial(thrust_loop, workers=2)]
        results = take_turns(3 if args.quick else 11, *(x and partial(x, knobs) for x in loops))
        figures = [spread([1 / s for s in seconds]) for seconds in results[:3]]
        ours, sb3, cleanrl, workers = results
        rows.append(
            [name, *figures, ratio(sb3, ours), ratio(cleanrl, ours), ratio(ours, workers)]
        )
    header = "settings | Thrust | Stable-Baselines3 | CleanRL | times SB3 | times CleanRL"
    table("Training, steps/s, one thread", header + " | 2 workers, times none", rows)


# Starts a process from a small one: to Linux a process had the memory of what started it.
LAUNCH = """import os, sys
child = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
print(child, flush=True)
print(os.wait4(child, 0)[2].ru_maxrss / 1024)"""


def watch(command):
    """Of a process: seconds and steps until 475 was passed, and its memory in MB."""
    passed, returns, began = (np.inf, np.inf), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-ISc", LAUNCH, *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
        child = int(process.stdout.readline())
        for line in process.stdout:
            if episode := re.search(r"global_step=(\d+), episodic_return=\[?([\d.]+)", line):
                returns.append(float(episode[2]))  # CleanRL's tells each, and does not end
                if len(returns) >= 100 and np.mean(returns[-100:]) >= 475:
                    line = f"passed 475, {episode[1]} steps"
                    os.kill(child, signal.SIGTERM)
            if line.startswith("passed 475") and passed[0] == np.inf:
                steps = re.search(r"([\d,]+) steps", line)[1].replace(",", "")
                passed = time.perf_counter() - began, int(steps)
        process.wait()
    return *passed, float(line)


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
        call = f"solve({module}.PPO, int(sys.argv[2]), {ZOO['num_envs']}, {options})"
        program = f"import sys, torch, {module}\n{inspect.getsource(solve)}\n{call}"
        return [python, "-c", program, "--seed"]

    options, here, there = sb3_options(thrust.Config(**ZOO)), sys.executable, args.peer_python
    commands = {
        "Thrust": [here, thrust.__file__, "--seed"],
        "Stable-Baselines3": has["stable_baselines3"] and peer(here, "stable_baselines3"),
        "SBX (JAX)": there and peer(there, "sbx"),
        "CleanRL": there
        and args.cleanrl
        and [there, "-u", args.cleanrl, "--no-cuda", "--seed"],
    }
    runs = {name: [] for name, command in commands.items() if command}
    for seed in range(1, 1 + args.seeds):
        for name, results in runs.items():
            results.append(watch([*commands[name], str(seed)]))
    rows, first = [], next(zip(*runs["Thrust"]))
    for name, results in runs.items():
        passed, steps, memory = zip(*results)
        rows.append([name, spread(passed), ratio(passed, first), spread(steps), spread(memory)])
    header = "whole process | 475 passed, s | Thrust, times that | steps by then | peak MB"
    table(
        f"Until 100 episodes have a mean return of 475, seeds 1 to {args.seeds}", header, rows
    )


def learn(job):
    """Trains in a process of its own; returns the mean return of its 100 greedy episodes."""
    name, seed, folder = job
    flags = f"--env {name} --seed {seed} --total-steps 1000000 --runs {folder}"
    command = [sys.executable, thrust.__file__, *flags.split(), *FLAGS.get(name, "").split()]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mean = re.search(r"evaluation: mean return (\S+)", output)[1]
    print(f"{name}, seed {seed}: {mean}", file=sys.stderr, flush=True)  # it may take hours
    return float(mean)


def bench_learning(args):
    names = GAMES[:3] if args.quick else GAMES
    with tempfile.TemporaryDirectory() as folder, ThreadPool(os.cpu_count()) as pool:
        jobs = [(name, 1 + seed, folder) for seed in range(args.seeds) for name in names]
        means = np.reshape(pool.map(learn, jobs, 1), (-1, len(names))).T.tolist()
    rows = [[name, FLAGS.get(name, ""), spread(x)] for name, x in zip(names, means)]
    header = "environment | flags | mean return of 100 greedy episodes"
    table(f"After 1,000,000 steps, seeds 1 to {args.seeds}", header, rows)


def main():
    sections = {name[6:]: f for name, f in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, cheap environments")
    parser.add_argument("--only", choices=sections, nargs="+", help="measure these sections")
    parser.add_argument("--seeds", type=int, default=5, help="seeds to solve and to learn with")
    parser.add_argument("--cleanrl", type=os.path.abspath, help="the file of CleanRL's ppo.py")
    parser.add_argument("--peer-python", type=os.path.abspath, help="a Python with sbx-rl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").partition(": ")[2]
    packages = ("numpy", "torch", *(name for name in PACKAGES[:3] if has[name]))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    print(f"{os.cpu_count()} cores, {processor}, Python {sys.version.split()[0]}, {versions}")
    for name in args.only or sections:
        sections[name](args)


if __name__ == "__main__":
    main()
