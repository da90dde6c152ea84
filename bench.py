# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26,<2.5", "torch>=2.13,<=2.13.0", "gymnasium", "stable-baselines3"]
# ///
"""Measures thrust.py, beside whichever of its peers are installed; asserts nothing.

    python bench.py                      every section, about five minutes
    python bench.py --quick              the same with fewer repetitions, about two
    python bench.py --only environment   one section of environment, pool, gae, training, start

Every table is Markdown. What stands in one row was measured in one run, the contestants taking
turns, so that the machine's moods fall on all of them alike. A figure is the median of the
rounds, and a ratio the median of the rounds' ratios. The last line is all of it as one JSON
document.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import thrust

HAS_GYMNASIUM = importlib.util.find_spec("gymnasium") is not None
HAS_SB3 = importlib.util.find_spec("stable_baselines3") is not None


Contestants = dict[str, Callable[[], float]]


def take_turns(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Calls each contestant once to warm up, then once per round; what each returned."""
    for contestant in contestants.values():
        contestant()
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            results[name].append(contestant())
    return results


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times ours is theirs: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def table(title: str, header: list[str], rows: list[list[Any]]) -> list[dict[str, Any]]:
    """Prints a Markdown table, and returns it for the JSON document."""
    print(f"\n**{title}**\n")
    lines = [header, ["---"] * len(header), *rows]
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)
    return [dict(zip(header, row)) for row in rows]


def millions(rates: list[float]) -> str:
    return f"{statistics.median(rates) / 1e6:.3g} M"


def stepping(env: Any, num_envs: int, steps: int) -> Callable[[], float]:
    """A contestant that steps `env` with random actions: environment steps per second."""
    rng = np.random.default_rng(0)
    actions = [rng.integers(0, 2, num_envs) for _ in range(32)]
    env.reset(seed=0)

    def run() -> float:
        began = time.perf_counter()
        for i in range(steps):
            env.step(actions[i % 32])
        return steps * num_envs / (time.perf_counter() - began)

    return run


def gymnasium_env(num_envs: int) -> Any:
    import gymnasium as gym

    return gym.vector.SyncVectorEnv(
        [lambda: gym.make("CartPole-v1")] * num_envs,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )


def bench_environment(rounds: int) -> Any:
    rows = []
    for n in (1, 16, 64, 256, 1024, 4096, 16384, 65536):
        steps = max(20, min(2000, 1_500_000 // n))
        contestants = {"Thrust": stepping(thrust.CartPole(n), n, steps)}
        if HAS_GYMNASIUM:
            from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

            contestants["NumPy"] = stepping(CartPoleVectorEnv(n), n, steps)
            if n <= 64:
                sync_steps = max(20, steps // n)
                contestants["Sync"] = stepping(gymnasium_env(n), n, sync_steps)
        results = take_turns(contestants, rounds)
        row = [
            n,
            millions(results["Thrust"]),
            f"{n / statistics.median(results['Thrust']) * 1e6:.1f}",
        ]
        for peer in ("NumPy", "Sync"):
            if peer in results:
                times = ratio(results["Thrust"], results[peer])
                row += [millions(results[peer]), f"{times:.2f}"]
            else:
                row += ["", ""]
        rows.append(row)
    header = ["N", "Thrust", "µs per step of all N", "CartPoleVectorEnv", "times that"]
    title = "CartPole, environment steps per second on one core, random actions"
    return table(title, [*header, "SyncVectorEnv", "times that"], rows)


class Slow(thrust.CartPole):
    """CartPoles of which each takes `MICROSECONDS` of Python more for a step."""

    MICROSECONDS = 20

    def step(self, actions: np.ndarray) -> thrust.StepResult:
        until = time.perf_counter() + self.num_envs * self.MICROSECONDS * 1e-6
        while time.perf_counter() < until:
            pass
        return super().step(actions)


class Slower(Slow):
    MICROSECONDS = 200


def bench_pool(rounds: int) -> Any:
    cores = os.cpu_count() or 1
    rows = []
    for name, make_env, n, steps in (
        ("CartPole", thrust.CartPole, 64, 500),
        ("CartPole", thrust.CartPole, 4096, 100),
        ("CartPole", thrust.CartPole, 65536, 8),
        ("20 µs of Python each", Slow, 64, 50),
        ("200 µs of Python each", Slower, 64, 10),
    ):
        with contextlib.ExitStack() as stack:
            pools = {
                w: stack.enter_context(thrust.EnvPool(make_env, n, w)) for w in range(cores + 1)
            }
            contestants = {str(w): stepping(pool, n, steps) for w, pool in pools.items()}
            if HAS_GYMNASIUM and make_env is thrust.CartPole and n == 64:
                import gymnasium as gym

                peer = gym.vector.AsyncVectorEnv([lambda: gym.make("CartPole-v1")] * n)
                stack.callback(peer.close)
                contestants["Async"] = stepping(peer, n, 20)
            results = take_turns(contestants, rounds)
        row = [name, n, *(millions(results[str(w)]) for w in pools)]
        row.append(f"{ratio(results[str(cores)], results['0']):.2f}")
        row.append(millions(results["Async"]) if "Async" in results else "")
        rows.append(row)
    header = ["environment", "N", "0 workers", *(f"{w + 1} workers" for w in range(cores))]
    title = f"EnvPool, environment steps per second, of the {cores} cores that there are"
    return table(title, [*header, f"{cores} against 0", "AsyncVectorEnv"], rows)


def bench_gae(rounds: int) -> Any:
    rows = []
    for T, N in ((32, 64), (128, 64), (128, 4096)):
        rng = np.random.default_rng(0)
        rewards, final = rng.normal(size=(2, T, N)).astype(np.float32)
        values = rng.normal(size=(T + 1, N)).astype(np.float32)
        terminated, truncated = rng.random((2, T, N)) < 0.02
        repeats = max(1, 1_000_000 // (T * N))

        def ours(
            data: Any = (rewards, values, terminated, truncated, final), k: int = repeats
        ) -> float:
            began = time.perf_counter()
            for _ in range(k):
                thrust.gae(*data, 0.98, 0.9)
            return k / (time.perf_counter() - began)

        contestants: Contestants = {"Thrust": ours}
        if HAS_SB3:
            from gymnasium import spaces
            from stable_baselines3.common.buffers import RolloutBuffer

            peer = RolloutBuffer(
                T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", 0.9, 0.98, N
            )
            last, dones = torch.from_numpy(values[-1]), terminated[-1]

            def theirs(b: Any = peer, v: Any = last, d: Any = dones, k: int = repeats) -> float:
                began = time.perf_counter()
                for _ in range(k):
                    b.compute_returns_and_advantage(v, d)
                return k / (time.perf_counter() - began)

            contestants["SB3"] = theirs
        results = take_turns(contestants, rounds)
        row = [T, N, f"{1e6 / statistics.median(results['Thrust']):.0f}"]
        if HAS_SB3:
            sb3 = results["SB3"]
            row += [
                f"{1e6 / statistics.median(sb3):.0f}",
                f"{ratio(results['Thrust'], sb3):.2f}",
            ]
        else:
            row += ["", ""]
        rows.append(row)
    header = ["T", "N", "Thrust, µs", "Stable-Baselines3, µs", "times as fast"]
    return table("GAE of one rollout", header, rows)


# RL-Zoo's settings for CartPole, and those of CleanRL's ppo.py, in Thrust's words
ZOO = {"num_envs": 8, "num_steps": 32, "minibatch_size": 256, "epochs": 20, "gamma": 0.98}
ZOO |= {"gae_lambda": 0.8, "learning_rate": 1e-3}
CLEANRL = {"num_envs": 4, "num_steps": 128, "minibatch_size": 128, "epochs": 4, "gamma": 0.99}
CLEANRL |= {"gae_lambda": 0.95, "learning_rate": 2.5e-4, "ent_coef": 0.01}
# and RL-Zoo's for two other environments
NORMALISED = {"num_envs": 16, "minibatch_size": 64, "epochs": 4, "gamma": 0.99}
NORMALISED |= {"learning_rate": 3e-4, "norm_obs": True, "norm_reward": True}
ACROBOT = {**NORMALISED, "env": "Acrobot-v1", "num_steps": 256, "gae_lambda": 0.94}
MOUNTAIN = {**NORMALISED, "env": "MountainCar-v0", "num_steps": 16, "gae_lambda": 0.98}


def train_thrust(knobs: dict[str, Any], steps: int) -> float:
    """Steps per second of Thrust's training loop."""
    config = thrust.Config(**knobs, total_steps=steps, eval_episodes=1, checkpoint_every=10**6)
    with contextlib.redirect_stdout(io.StringIO()):
        result = thrust.train(config)
    return result.rows[-1]["steps"] / result.rows[-1]["seconds"]


def train_sb3(knobs: dict[str, Any], steps: int) -> float:
    """Steps per second of Stable-Baselines3's training loop with the same settings."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = make_vec_env(knobs.get("env", "CartPole-v1"), knobs["num_envs"])
    if knobs.get("norm_obs"):
        envs = VecNormalize(envs, gamma=knobs["gamma"])
    with thrust.torch_ready(thrust.Config()):
        model = PPO(
            "MlpPolicy",
            envs,
            n_steps=knobs["num_steps"],
            batch_size=knobs["minibatch_size"],
            n_epochs=knobs["epochs"],
            gamma=knobs["gamma"],
            gae_lambda=knobs["gae_lambda"],
            learning_rate=knobs["learning_rate"],
            ent_coef=knobs.get("ent_coef", 0.0),
            device="cpu",
        )
        began = time.perf_counter()
        model.learn(steps)
        return steps / (time.perf_counter() - began)


def bench_training(rounds: int) -> Any:
    rows = []
    for name, knobs, steps in (
        ("Thrust's defaults (64 x 32)", {}, 65536),
        ("RL-Zoo's for CartPole (8 x 32)", ZOO, 8192),
        ("CleanRL's (4 x 128)", CLEANRL, 8192),
        ("RL-Zoo's for Acrobot (16 x 256)", ACROBOT, 8192),
        ("RL-Zoo's for MountainCar (16 x 16)", MOUNTAIN, 8192),
    ):
        if "env" in knobs and not HAS_GYMNASIUM:
            continue
        contestants = {"Thrust": lambda k=knobs, s=steps: train_thrust(k, s)}
        if HAS_SB3 and knobs:
            contestants["SB3"] = lambda k=knobs, s=steps: train_sb3(k, s)
        results = take_turns(contestants, rounds)
        row = [name, f"{statistics.median(results['Thrust']):,.0f}"]
        if "SB3" in results:
            sb3 = results["SB3"]
            row += [f"{statistics.median(sb3):,.0f}", f"{ratio(results['Thrust'], sb3):.2f}"]
        else:
            row += ["", ""]
        rows.append(row)
    header = ["settings", "Thrust", "Stable-Baselines3", "times that"]
    return table("Training, environment steps per second, one thread", header, rows)


def bench_start(rounds: int) -> Any:
    """Seconds from process start until `python thrust.py` says things, one seed per round."""
    rows = []
    for seed in range(rounds):
        began, seen = time.perf_counter(), {}
        flags = [sys.executable, thrust.__file__, "--seed", str(seed)]
        process = subprocess.Popen(flags, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            seen[line.split(",")[0].split(":")[0]] = time.perf_counter() - began
        process.wait()
        moments = [seen.get(k) for k in ("training CartPole", "passed 195", "passed 475")]
        rows.append([seed, *moments, time.perf_counter() - began])
    medians = ["median", *(statistics.median(row[i] for row in rows) for i in range(1, 5))]
    shown = [[row[0], *(f"{value:.1f}" for value in row[1:])] for row in [*rows, medians]]
    header = ["seed", "training begins", "195 passed", "475 passed", "process ends"]
    return table("python thrust.py, seconds from process start", header, shown)


SECTIONS = {
    "environment": bench_environment,
    "pool": bench_pool,
    "gae": bench_gae,
    "training": bench_training,
    "start": bench_start,
}


def machine() -> str:
    """One line about where this was measured."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    versions = (
        f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}"
    )
    for package in ("gymnasium", "stable_baselines3"):
        if importlib.util.find_spec(package):
            versions += f", {package} {importlib.import_module(package).__version__}"
        else:
            print(
                f"without {package}: pip install {package.replace('_', '-')} to see it beside"
            )
    return f"{os.cpu_count()} cores of {processor}, {platform.system()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven")
    parser.add_argument("--only", choices=SECTIONS, help="measure one section")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": machine()}
    print(document["machine"])
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)  # the runs that training makes are not worth keeping
        for name in [arguments.only] if arguments.only else SECTIONS:
            document[name] = SECTIONS[name](3 if arguments.quick else 7)
        os.chdir(here)
    print("\n" + json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
