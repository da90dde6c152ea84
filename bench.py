# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26,<2.5", "torch>=2.13,<=2.13.0", "gymnasium", "stable-baselines3"]
# ///
"""Measures thrust.py, beside whichever of its peers are installed; asserts nothing.

    python bench.py                   every section, about twenty minutes
    python bench.py --quick           the same with fewer repetitions, about three
    python bench.py --only pool gae   these sections

Peers: pip install gymnasium stable-baselines3 envpool

Every table is Markdown. What stands in one row was measured in one run, the contestants taking
turns, so that the machine's moods fall on all of them alike. A figure is the median of the
rounds, with the smallest and the largest in brackets; a ratio is the median of the rounds' own
ratios, and above 1 where Thrust is ahead. The last line is all of it as one JSON document.
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

PEERS = ["gymnasium", "stable_baselines3", "envpool"]
HAS = {name: importlib.util.find_spec(name) is not None for name in PEERS}
HERE = os.path.dirname(os.path.abspath(__file__))

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


def ratio(a: list[float], b: list[float]) -> str:
    """How many times a is b: the median over the rounds."""
    return f"{statistics.median(x / y for x, y in zip(a, b)):.2f}"


def spread(values: list[float], unit: float = 1.0) -> str:
    """The median, and in brackets the smallest and the largest, in multiples of `unit`."""
    three = (statistics.median(values), min(values), max(values))
    scaled = [value / unit for value in three]
    middle, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in scaled)
    return middle if low == high else f"{middle} ({low} to {high})"


def table(title: str, header: list[str], rows: list[list[Any]]) -> list[dict[str, Any]]:
    """Prints a Markdown table, and returns it for the JSON document."""
    print(f"\n**{title}**\n")
    lines = [header, ["---"] * len(header), *rows]
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)
    return [dict(zip(header, row)) for row in rows]


def stepping(env: Any, num_envs: int, steps: int) -> Callable[[], float]:
    """A contestant that steps `env` with random actions: seconds per step of all N."""
    rng = np.random.default_rng(0)
    actions = [rng.integers(0, 2, num_envs).astype(np.int32) for _ in range(32)]
    env.reset()

    def run() -> float:
        began = time.perf_counter()
        for i in range(steps):
            env.step(actions[i % 32])
        return (time.perf_counter() - began) / steps

    return run


# --- environment


def cartpoles(n: int) -> dict[str, Any]:
    """Thrust's and its peers' CartPoles, on one core."""
    envs: dict[str, Any] = {"Thrust": thrust.CartPole(n)}
    if HAS["gymnasium"]:
        import gymnasium as gym
        from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

        envs["CartPoleVectorEnv"] = CartPoleVectorEnv(n)
        if n <= 64:
            envs["SyncVectorEnv"] = gym.make_vec("CartPole-v1", n, "sync")
    if HAS["envpool"] and n <= 4096:
        import envpool

        options = {"num_envs": n, "num_threads": 1}
        envs["sail-sg EnvPool"] = envpool.make("CartPole-v1", env_type="gymnasium", **options)
    return envs


def bench_environment(quick: bool) -> Any:
    rows = []
    for n in (1, 16, 64, 256, 1024, 4096, 16384, 65536):
        steps = max(10, min(500, 500_000 // n))
        envs = cartpoles(n)
        runs = {k: stepping(e, n, max(5, steps // n) if "Sync" in k else steps)
                for k, e in envs.items()}  # fmt: skip
        results = take_turns(runs, 7 if quick else 21)
        ours = results["Thrust"]
        row = [n, spread(ours, 1e-6), f"{n / statistics.median(ours) / 1e6:.3g} M"]
        for peer in ("CartPoleVectorEnv", "SyncVectorEnv", "sail-sg EnvPool"):
            row += [ratio(results[peer], ours) if peer in results else ""]
        rows.append(row)
    header = ["N", "µs per step of all N", "environment steps/s", "times CartPoleVectorEnv"]
    header += ["times SyncVectorEnv", "times sail-sg's EnvPool (1 thread)"]
    return table("CartPole on one core, random actions", header, rows)


# --- pool


class Timed(thrust.CartPole):
    """CartPoles whose reward is the seconds that the step took."""

    def step(self, actions: np.ndarray) -> thrust.StepResult:
        began = time.perf_counter()
        result = super().step(actions)
        result[1][:] = time.perf_counter() - began
        return result


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


def bench_pool(quick: bool) -> Any:
    cores = os.cpu_count() or 1
    rows = []
    for name, make_env, n, steps in (
        ("CartPole", thrust.CartPole, 64, 300),
        ("CartPole", thrust.CartPole, 4096, 60),
        ("CartPole", thrust.CartPole, 65536, 8),
        ("20 µs of Python each", Slow, 64, 40),
        ("200 µs of Python each", Slower, 64, 10),
    ):
        with contextlib.ExitStack() as stack:
            runs = {}
            for w in range(cores + 1):
                pool = stack.enter_context(thrust.EnvPool(make_env, n, w))
                runs[str(w)] = stepping(pool, n, steps)
            if HAS["gymnasium"] and make_env is thrust.CartPole and n == 64:
                import gymnasium as gym

                peer = gym.make_vec("CartPole-v1", n, "async")
                stack.callback(peer.close)
                runs["Async"] = stepping(peer, n, 10)
            results = take_turns(runs, 7 if quick else 21)
        row = [name, n, *(spread(results[str(w)], 1e-6) for w in range(cores + 1))]
        row.append(ratio(results["0"], results[str(cores)]))
        asyncs = results.get("Async")
        row.append(ratio(asyncs, results[str(cores)]) if asyncs else "")
        rows.append(row)
    header = ["environment", "N", "0 workers", *(f"{w + 1} workers" for w in range(cores))]
    header += [f"{cores} workers against 0", f"{cores} workers against AsyncVectorEnv"]
    title = f"EnvPool, µs per step of all N; more workers than the {cores} cores were not tried"
    tables = [table(title, header, rows)]

    rows = []
    for n in (64, 4096):
        row = [n]
        for w in (0, cores):
            over = []
            with thrust.EnvPool(Timed, n, w) as pool:
                pool.reset(seed=0)
                actions = np.random.default_rng(0).integers(0, 2, (32, n))
                for i in range(1000 if quick else 5000):
                    began = time.perf_counter()
                    _, seconds, *_ = pool.step(actions[i % 32])
                    over.append(time.perf_counter() - began - seconds.max())
            row += [f"{q * 1e6:.0f}" for q in np.quantile(over, [0.5, 0.1, 0.9])]
        rows.append(row)
    header = ["N"]
    for w in (0, cores):
        header += [f"{w} workers: median", f"{w} workers: 10 %", f"{w} workers: 90 %"]
    title = "EnvPool, µs per step beyond the slowest environment's own stepping time"
    return [*tables, table(title, header, rows)]


def cpu_seconds(pids: list[int]) -> float:
    """What these processes have used; Linux only."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            ticks += sum(map(int, file.read().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def bench_cpu(quick: bool) -> Any:
    """What waiting workers use while the learner computes between two steps."""
    if not os.path.exists("/proc/self/stat"):
        return None
    rows = []
    with thrust.EnvPool(thrust.CartPole, 64, 2) as pool:
        pool.reset(seed=0)
        for milliseconds in (0.1, 0.5, 1, 5, 20):
            before, began = cpu_seconds(pool.pids), time.perf_counter()
            steps = 0
            while time.perf_counter() - began < (2 if quick else 8):
                pool.step(np.zeros(64, np.int64))
                until = time.perf_counter() + milliseconds / 1e3
                while time.perf_counter() < until:
                    pass
                steps += 1
            wall = time.perf_counter() - began
            used = cpu_seconds(pool.pids) - before
            rows.append([milliseconds, f"{100 * used / wall:.0f} %", f"{steps / wall:,.0f}"])
    header = ["learner computes for, ms", "both workers together, of one core", "steps/s"]
    return table("CPU use of two workers, 64 CartPoles", header, rows)


# --- GAE


def bench_gae(quick: bool) -> Any:
    rows = []
    for T, N in ((32, 64), (128, 64), (128, 4096)):
        rng = np.random.default_rng(0)
        rewards, final = rng.normal(size=(2, T, N)).astype(np.float32)
        values = rng.normal(size=(T + 1, N)).astype(np.float32)
        terminated, truncated = rng.random((2, T, N)) < 0.02
        repeats = max(1, 200_000 // (T * N))

        def timed(call: Callable[[], Any], repeats: int = repeats) -> Callable[[], float]:
            def run() -> float:
                began = time.perf_counter()
                for _ in range(repeats):
                    call()
                return (time.perf_counter() - began) / repeats

            return run

        data = rewards, values, terminated, truncated, final, 0.98, 0.9
        runs = {"Thrust": timed(lambda data=data: thrust.gae(*data))}
        if HAS["stable_baselines3"]:
            from gymnasium import spaces
            from stable_baselines3.common.buffers import RolloutBuffer

            box, two = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
            peer = RolloutBuffer(T, box, two, "cpu", 0.9, 0.98, N)
            last = torch.from_numpy(values[-1]), terminated[-1]
            runs["SB3"] = timed(lambda p=peer, v=last: p.compute_returns_and_advantage(*v))
        results = take_turns(runs, 7 if quick else 21)
        row = [T, N, spread(results["Thrust"], 1e-6)]
        sb3 = results.get("SB3")
        rows.append([*row, ratio(sb3, results["Thrust"]) if sb3 else ""])
    header = ["T", "N", "µs", "times Stable-Baselines3"]
    return table("GAE of one rollout", header, rows)


# --- update


def matrix_product_speed() -> float:
    """What one core's product of two square matrices reaches: operations per second."""
    a = torch.randn(512, 512)
    times = []
    for _ in range(30):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 512**3 / min(times)


def gradient_steps(size: int, width: int, threads: int) -> Callable[[], float]:
    """A contestant that makes eight gradient steps on minibatches of `size`: seconds each."""
    config = thrust.Config(
        num_envs=8, num_steps=size, minibatch_size=size, epochs=1, total_steps=8 * size,
        hidden=(width, width), threads=threads,
    )  # fmt: skip
    env, generator = thrust.CartPole(8), torch.Generator().manual_seed(0)
    spaces = env.single_observation_space, env.single_action_space
    policy = thrust.ActorCritic(*spaces, config.hidden, generator)
    optimizer = thrust.Adam(policy)
    obs, noise = torch.randn(8 * size, 4, generator=generator), torch.randn(2, 8 * size)
    action, logprob = policy.act(obs, generator=generator)
    batch = thrust.Batch(obs, action, logprob, *noise)

    def run() -> float:
        with thrust.torch_ready(config):
            began = time.perf_counter()
            thrust.ppo_update(policy, optimizer, batch, config, 1e-4, generator)
            return (time.perf_counter() - began) / 8

    return run


def bench_update(quick: bool) -> Any:
    rows = []
    with thrust.torch_ready(thrust.Config()):
        speed = matrix_product_speed()
    for width, sizes in ((64, (64, 256, 512, 1024, 4096)), (256, (256, 1024))):
        for size in sizes:
            runs = {str(t): gradient_steps(size, width, t) for t in (1, os.cpu_count() or 1)}
            results = take_turns(runs, 5 if quick else 15)
            weights = 4 * width + width**2 + width * 1.5  # of each of the two networks
            # A product forward, and two (for weights and for inputs) backward
            least = 3 * 2 * 2 * weights * size / speed
            one, *more = results.values()
            share = f"{100 * least / statistics.median(one):.0f} %"
            row = [width, size, spread(one, 1e-3), share]
            rows.append([*row, ratio(more[0], one) if more else ""])
    header = ["width", "minibatch", "ms per gradient step", "of it matrix products, at best"]
    header.append(f"{os.cpu_count()} threads take, times as long")
    title = "One gradient step, one thread; one core's matrix product reaches "
    return table(f"{title}{speed / 1e9:.0f} GFLOP/s", header, rows)


# --- training

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


def sb3_model(knobs: dict[str, Any], seed: int | None = None, **more: Any) -> Any:
    """Stable-Baselines3's PPO with the same settings."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = make_vec_env(knobs.get("env", "CartPole-v1"), knobs["num_envs"], seed)
    if knobs.get("norm_obs"):
        envs = VecNormalize(envs, gamma=knobs["gamma"])
    theirs = {"num_steps": "n_steps", "minibatch_size": "batch_size", "epochs": "n_epochs"}
    same = ("gamma", "gae_lambda", "learning_rate", "ent_coef")
    options = {name: knobs[name] for name in same if name in knobs}
    options |= {their: knobs[name] for name, their in theirs.items()}
    return PPO("MlpPolicy", envs, device="cpu", seed=seed, **options | more)


def train_sb3(knobs: dict[str, Any], steps: int) -> float:
    """Steps per second of Stable-Baselines3's training loop with the same settings."""
    with thrust.torch_ready(thrust.Config()):
        model = sb3_model(knobs)
        began = time.perf_counter()
        model.learn(steps)
        return steps / (time.perf_counter() - began)


def bench_training(quick: bool) -> Any:
    rows = []
    for name, knobs, steps in (
        ("Thrust's defaults (64 x 32)", {}, 65536),
        ("RL-Zoo's for CartPole (8 x 32)", ZOO, 8192),
        ("CleanRL's (4 x 128)", CLEANRL, 8192),
        ("RL-Zoo's for Acrobot (16 x 256)", ACROBOT, 8192),
        ("RL-Zoo's for MountainCar (16 x 16)", MOUNTAIN, 8192),
    ):
        if "env" in knobs and not HAS["gymnasium"]:
            continue
        runs = {"Thrust": lambda k=knobs, s=steps: train_thrust(k, s)}
        if HAS["stable_baselines3"] and knobs:
            runs["SB3"] = lambda k=knobs, s=steps: train_sb3(k, s)
        results = take_turns(runs, 2 if quick else 7)
        row, sb3 = [name, spread(results["Thrust"])], results.get("SB3")
        row += [spread(sb3), ratio(results["Thrust"], sb3)] if sb3 else ["", ""]
        rows.append(row)
    header = ["settings", "Thrust", "Stable-Baselines3", "times that"]
    return table("Training, environment steps per second, one thread", header, rows)


# --- solving CartPole, from process start


def solve_sb3(seed: int) -> None:
    """Trains with RL-Zoo's CartPole settings until 100 episodes have a mean return of 475."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            recent = self.model.ep_info_buffer
            return len(recent) < 100 or sum(e["r"] for e in recent) / len(recent) < 475

    torch.set_num_threads(1)
    falling = {"learning_rate": lambda left: 1e-3 * left, "clip_range": lambda left: 0.2 * left}
    print("training CartPole", flush=True)
    sb3_model(ZOO, seed, **falling).learn(100_000, Stop())
    print("passed 475", flush=True)


def run_and_watch(command: list[str]) -> dict[str, float]:
    """Seconds from process start to each thing that the process says, and to its end; and, on
    Linux, the seconds of CPU and the MB of memory that it had used by then."""
    began, seen = time.perf_counter(), {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        seen[line.strip().split(",")[0].split(":")[0]] = time.perf_counter() - began
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status") as file:
            sizes = [row.split()[1] for row in file if row.startswith("VmHWM")]
            seen["memory"] = int(sizes[0]) / 1e3
        with contextlib.suppress(OSError):
            seen["cpu"] = cpu_seconds([process.pid])
    process.wait()
    return {**seen, "end": time.perf_counter() - began}


def bench_solve(quick: bool) -> Any:
    """Medians over seeds 1, 2, ...; the contestants take turns, seed by seed."""
    seeds = range(1, 3 if quick else 11)
    commands = {"Thrust": lambda seed: [sys.executable, thrust.__file__, f"--seed={seed}"]}
    if HAS["stable_baselines3"]:
        solve = f"import sys; sys.path[0] = {HERE!r}; import bench; bench.solve_sb3"
        commands["Stable-Baselines3"] = lambda s: [sys.executable, "-c", f"{solve}({s})"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for seed in seeds:
        for name, command in commands.items():
            if name == "Thrust" or seed % 4 == 1:  # the others take so much longer
                runs[name].append(run_and_watch(command(seed)))
    names = {"training CartPole": "training begins", "passed 475": "475 passed"}
    names |= {"end": "process ends", "cpu": "CPU seconds", "memory": "peak MB"}
    rows = []
    for name, seen in runs.items():
        solved = [run for run in seen if "passed 475" in run]
        row = [name, f"{len(solved)} of {len(seen)}"]
        moments = [[run[k] for run in solved if k in run] for k in names]
        rows.append(row + [spread(seconds) if seconds else "" for seconds in moments])
    header = ["", "seeds that passed 475", *names.values()]
    title = "Until the last 100 training episodes have a mean return of 475, seconds from "
    return table(f"{title}process start", header, rows)


SECTIONS = {
    "environment": bench_environment,
    "pool": bench_pool,
    "cpu": bench_cpu,
    "gae": bench_gae,
    "update": bench_update,
    "training": bench_training,
    "solve": bench_solve,
}


def machine() -> str:
    """One line about where this was measured."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        lines = file.read().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
        if not any("avx512f" in line for line in lines):
            processor += " (no AVX-512)"
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    versions += f", torch {torch.__version__}"
    for package in PEERS:
        if HAS[package]:
            versions += f", {package} {importlib.import_module(package).__version__}"
        else:
            print(
                f"without {package}: pip install {package.replace('_', '-')} to see it beside"
            )
    return f"{os.cpu_count()} cores of {processor}, {platform.system()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and seeds")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="measure these sections")
    arguments = parser.parse_args()
    document: dict[str, Any] = {"machine": machine()}
    print(document["machine"])
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)  # the runs that training makes are not worth keeping
        for name in arguments.only or SECTIONS:
            document[name] = SECTIONS[name](arguments.quick)
        os.chdir(here)
    print("\n" + json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main()
