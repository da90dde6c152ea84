# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26,<2.5", "torch>=2.13,<=2.13.0", "pytest>=8,<10"]
# ///
"""Tests of thrust.py, under the same part numbers. Each name is a claim.

Wherever it can be, a claim is checked against somebody else: Gymnasium's CartPole, the GAE of
Stable-Baselines3 and torchrl, Stable-Baselines3's PPO, torch's own Adam and distributions, or a
formula written out in full. Tests that need a package outside requirements.txt are skipped
where it is missing, unless THRUST_ALL_TESTS is set, as it is in CI. Tests that take long or
kill processes need THRUST_SLOW_TESTS=1.
"""

import contextlib
import csv
import dataclasses
import doctest
import errno
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing as mp
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch

import thrust

SOURCE = pathlib.Path(thrust.__file__)
METHODS = mp.get_all_start_methods()
WALL_CLOCK = ("seconds", "steps_per_second")
slow = pytest.mark.skipif(
    os.environ.get("THRUST_SLOW_TESTS") != "1", reason="slow: set THRUST_SLOW_TESTS=1"
)


def oracle(name):
    """Imports a package that newcomers need not have."""
    if os.environ.get("THRUST_ALL_TESTS"):
        return importlib.import_module(name)
    package = name.split(".")[0].replace("_", "-")
    return pytest.importorskip(name, reason=f"needs {package}: pip install {package}")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(**knobs):
    """A config that trains for a second."""
    defaults = {"num_envs": 8, "num_steps": 16, "minibatch_size": 64, "total_steps": 8 * 16 * 6}
    defaults["epochs"] = 4  # 8 gradient steps in an update
    return thrust.Config(**{**defaults, "eval_episodes": 4, "checkpoint_every": 2, **knobs})


def same(a, b):
    """Whether two arrays agree in type, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def rows_without_clock(run):
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in rows]


def command(*flags):
    return [sys.executable, str(SOURCE), *map(str, flags)]


def gone(pid):
    """Whether a process has ended, waiting up to two seconds for it."""
    for _ in range(200):
        try:
            os.kill(pid, 0)
            if pathlib.Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


# ==============================================================================================
# 0. The file
# ==============================================================================================

PART = re.compile(r"^# =+\n# (\d)\. (\w[\w ]*)\n# Needs: (.*)\n", re.MULTILINE)


def parts():
    """{number: (imports, numbers of the parts it uses, text)} of thrust.py."""
    text = SOURCE.read_text(encoding="utf-8")
    found = list(PART.finditer(text))
    ends = [m.start() for m in found[1:]] + [text.index('\nif __name__ == "__main__"')]
    result = {}
    for match, end in zip(found, ends):
        needs = match[3].split("; ")
        uses = needs.pop().removeprefix("parts ") if needs[-1].startswith("parts ") else ""
        numbers = [int(n) for n in uses.split(",") if n.strip()]
        result[int(match[1])] = needs, numbers, text[match.start() : end]
    return result


def lift(number, folder):
    """Writes a part into a file of its own, with what its Needs line names, and imports it."""
    all_parts = parts()
    numbers = [*all_parts[number][1], number]
    imports = [line for n in numbers for line in all_parts[n][0]]
    path = folder / f"lifted_{number}.py"
    text = "\n".join([*imports, *(all_parts[n][2] for n in numbers)])
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def use_config(m):
    assert m.Config(num_steps=16).batch_size == 64 * 16


def use_cartpole(m):
    env = m.CartPole(3)
    env.reset(seed=1)
    assert env.step(np.array([0, 1, 0]))[0].shape == (3, 4)


def use_pool(m):
    with m.EnvPool(m.CartPole, 4, 2) as pool:
        pool.reset(seed=1)
        assert pool.step(np.array([0, 1, 0, 1]))[0].shape == (4, 4)


def use_actor_critic(m):
    env = thrust.CartPole(3)
    policy = m.ActorCritic(env.single_observation_space, env.single_action_space)
    assert policy.act(env.reset(seed=0)[0])[0].shape == (3,)


def use_buffer(m):
    env = thrust.CartPole(3)
    buffer = m.RolloutBuffer(2, 3, env.single_observation_space, env.single_action_space)
    assert buffer.batch(0.9, 0.9).obs.shape == (6, 4)
    zeros = np.zeros((2, 3))
    assert m.gae(zeros, np.zeros((3, 3)), zeros > 0, zeros > 0, zeros, 0.9, 0.9)[0].shape == (
        2,
        3,
    )


def use_ppo(m):
    env = thrust.CartPole(4)
    spaces = env.single_observation_space, env.single_action_space
    policy, config = m.ActorCritic(*spaces), m.Config(num_envs=4, num_steps=2, minibatch_size=4)
    batch = m.RolloutBuffer(2, 4, *spaces).batch(0.9, 0.9)
    stats = m.ppo_update(policy, m.Adam(policy), batch, config, 1e-3, torch.Generator())
    assert stats["gradient_steps"] == 2 * config.epochs


def use_training(m):
    sizes = {"num_envs": 4, "num_steps": 8, "minibatch_size": 16, "total_steps": 64}
    result = m.train(m.Config(**sizes, eval_episodes=2))
    assert len(result.rows) == 2 and m.load(result.run) is not None


def use_command_line(m):
    flags = "--num-envs 4 --num-steps 8 --minibatch-size 16 --total-steps 64 --eval-episodes 2"
    assert m.main(flags.split()) == 0


def use_page(m):
    thrust.train(small())
    assert m.write_page("runs/CartPole-0").name == "page.html"


USES = [use_config, use_cartpole, use_pool, use_actor_critic, use_buffer, use_ppo]
USES += [use_training, use_command_line, use_page]


@pytest.mark.parametrize("number", range(1, len(USES) + 1))
def test_each_part_can_be_lifted_with_what_it_says_it_needs(number, in_tmp, monkeypatch):
    monkeypatch.syspath_prepend(str(in_tmp))
    assert sorted(parts()) == list(range(1, len(USES) + 1))
    before = signal.getsignal(signal.SIGTERM)
    USES[number - 1](lift(number, in_tmp))
    signal.signal(signal.SIGTERM, before)


def test_importing_it_does_nothing_but_define_names(tmp_path):
    states = "random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()"
    code = (
        "import random, sys, threading, torch, numpy as np\n"
        f"a = {states}\n"
        f"sys.path.insert(0, {str(SOURCE.parent)!r}); import thrust\n"
        f"b = {states}\n"
        "assert a == b and threading.active_count() == 1\n"
        "assert not any(name.startswith('torch._dynamo') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_examples_in_docstrings_are_true():
    results = doctest.testmod(thrust, extraglobs={"np": np})
    assert results.attempted > 0 and results.failed == 0


# ==============================================================================================
# 1. Config
# ==============================================================================================


@pytest.mark.parametrize(
    ("knobs", "field", "rule"),
    [
        ({"num_envs": 0}, "num_envs = 0", "whole number, at least 1"),
        ({"num_steps": -3}, "num_steps = -3", "whole number, at least 1"),
        ({"num_envs": 2.5}, "num_envs = 2.5", "whole number"),
        ({"epochs": float("nan")}, "epochs = nan", "whole number"),
        (
            {"minibatch_size": 4096},
            "minibatch_size = 4096",
            "at most num_envs * num_steps = 2048",
        ),
        ({"total_steps": 2047}, "total_steps = 2047", "at least num_envs * num_steps = 2048"),
        ({"gamma": 1.01}, "gamma = 1.01", "from 0 to 1"),
        ({"gamma": float("nan")}, "gamma = nan", "from 0 to 1"),
        ({"gae_lambda": -0.1}, "gae_lambda = -0.1", "from 0 to 1"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0", "finite and above 0"),
        ({"learning_rate": float("inf")}, "learning_rate = inf", "finite and above 0"),
        ({"clip": 1.0}, "clip = 1.0", "above 0 and below 1"),
        ({"ent_coef": -1.0}, "ent_coef = -1.0", "finite and 0 or more"),
        ({"target_kl": 0.0}, "target_kl = 0.0", "above 0"),
        ({"target_kl": float("nan")}, "target_kl = nan", "above 0"),
        ({"hidden": (64, 0)}, "hidden = (64, 0)", "at least 1 each"),
        ({"workers": 65}, "workers = 65", "at most num_envs, 64"),
        ({"workers": -1}, "workers = -1", "0 or more"),
        ({"seed": -1}, "seed = -1", "0 or more"),
        ({"eval_episodes": 0}, "eval_episodes = 0", "at least 1"),
    ],
)
def test_impossible_values_are_refused_with_field_value_and_rule(knobs, field, rule):
    with pytest.raises(ValueError) as refusal:
        thrust.Config(**knobs)
    message = str(refusal.value)
    assert message.startswith(field + " is not allowed") and rule in message
    assert "\n" not in message


def test_sizes_follow_from_the_knobs():
    config = thrust.Config(num_envs=8, num_steps=16, minibatch_size=32, total_steps=1000)
    assert (config.batch_size, config.num_updates) == (128, 7)


# ==============================================================================================
# 2. CartPole
# ==============================================================================================


def balance(obs):
    """Actions of a simple controller that keeps poles up for a long time, not for ever."""
    return ((obs[:, 2] + 0.5 * obs[:, 3] + 0.02 * obs[:, 1]) > 0).astype(np.int64)


def scalar_step(x, x_dot, theta, theta_dot, action):
    """One step of one pole: the equations of the paper, transcribed with the math module."""
    force = 10.0 if action == 1 else -10.0
    temp = (force + 0.05 * theta_dot**2 * math.sin(theta)) / 1.1
    theta_acc = (9.8 * math.sin(theta) - math.cos(theta) * temp) / (
        0.5 * (4.0 / 3.0 - 0.1 * math.cos(theta) ** 2 / 1.1)
    )
    x_acc = temp - 0.05 * theta_acc * math.cos(theta) / 1.1
    return (
        x + 0.02 * x_dot,
        x_dot + 0.02 * x_acc,
        theta + 0.02 * theta_dot,
        theta_dot + 0.02 * theta_acc,
    )


def poles_anywhere(n):
    """n poles in random states: (CartPole, those states, random actions)."""
    env, rng = thrust.CartPole(n), np.random.default_rng(0)
    env.reset(seed=0)
    start = env.state()
    start["state"] = rng.uniform(-1, 1, (n, 4)) * [2.3, 3.0, 0.2, 3.0]
    env.set_state(start)
    return env, start["state"], rng.integers(0, 2, n)


def test_physics_are_the_equations():
    env, start, actions = poles_anywhere(500)
    _, _, terminated, _, info = env.step(actions)
    reached = np.array([scalar_step(*s, a) for s, a in zip(start, actions)])
    fell = (np.abs(reached[:, 0]) > 2.4) | (np.abs(reached[:, 2]) > math.radians(12))
    assert fell.any() and same(terminated, fell)
    np.testing.assert_allclose(env.state()["state"][~fell], reached[~fell], rtol=1e-12)
    np.testing.assert_allclose(info["final_obs"][fell], reached[fell], rtol=1e-6)


def test_it_is_gymnasiums_cartpole_bit_for_bit():
    gym = oracle("gymnasium")
    n, steps, rng, episodes, lengths = 8, 13_000, np.random.default_rng(1), 0, set()
    theirs = gym.vector.SyncVectorEnv(
        [lambda: gym.make("CartPole-v1")] * n, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )
    ours = thrust.CartPole(n)
    obs, _ = ours.reset(seed=5)
    assert same(theirs.reset(seed=5)[0], obs)
    for t in range(steps):  # 104,000 environment steps
        skilled = (t // 1000) % 2  # short episodes and long ones
        actions = balance(obs) if skilled else rng.integers(0, 2, n)
        expected, got = theirs.step(actions), ours.step(actions)
        for name, a, b in zip(("obs", "reward", "terminated", "truncated"), expected, got):
            assert same(a, b), f"{name} differs at step {t}"
        ended = np.flatnonzero(expected[2] | expected[3])
        assert ("final_obs" in got[4]) == bool(ended.size)
        if ended.size:
            final = np.stack(expected[4]["final_obs"][ended])
            assert same(final, got[4]["final_obs"][ended]), f"final_obs differs at step {t}"
            episodes += ended.size
            lengths |= {("truncated", bool(x)) for x in expected[3][ended]}
        obs = got[0]
    assert same(theirs.reset()[0], ours.reset()[0])  # without a seed, the streams go on
    assert episodes > 1000 and len(lengths) == 2


def test_an_environments_stream_depends_on_its_seed_alone():
    # 70,000 environments draw start states in blocks of 16, and 3 of 256: nothing may show it.
    few, many = thrust.CartPole(3), thrust.CartPole(70_000)
    assert few._block != many._block
    assert same(few.reset(seed=7)[0], many.reset(seed=7)[0][:3])
    for _ in range(40):
        assert same(few.reset()[0], many.reset()[0][:3])


def test_its_state_continues_exactly_in_another_object():
    first, rng = thrust.CartPole(5, max_episode_steps=30), np.random.default_rng(2)
    first.reset(seed=11)
    for t in range(700):
        if t % 97 == 0:
            second = thrust.CartPole(5, max_episode_steps=30)
            second.set_state(first.state())
        actions = rng.integers(0, 2, 5)
        a, b = first.step(actions), second.step(actions)
        assert all(same(x, y) for x, y in zip(a[:4], b[:4]))
    assert all(len(array) == 5 for array in first.state().values())


def test_an_episode_is_truncated_at_its_last_step_and_both_flags_may_be_set():
    env = thrust.CartPole(4, max_episode_steps=3)
    env.reset(seed=0)
    for t in range(1, 10):
        _, _, terminated, truncated, info = env.step(np.array([0, 1, 0, 1]))
        assert truncated.all() == (t % 3 == 0) and not terminated.any()
        assert ("final_obs" in info) == (t % 3 == 0)
    state = env.state()
    state["state"][:, 2], state["steps"][:] = 1.0, 2  # about to fall in the last step
    env.set_state(state)
    _, _, terminated, truncated, _ = env.step(np.zeros(4, np.int64))
    assert terminated.all() and truncated.all()


def test_writing_into_a_reward_does_not_change_later_ones():
    env = thrust.CartPole(2)
    env.reset(seed=0)
    env.step(np.array([0, 1]))[1][:] = 7
    assert env.step(np.array([0, 1]))[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "actions",
    [
        [0, 2, 0],
        [0, -1, 0],
        [0, 1],
        [[0, 1, 0]],
        [0.0, 1.0, 0.0],
        [True, False, True],
        np.array([0, 1, 255], np.uint8),
        1,
    ],
)
def test_actions_that_are_no_actions_are_refused(actions):
    env = thrust.CartPole(3)
    env.reset(seed=0)
    before = env.state()
    with pytest.raises(ValueError, match=r"actions must be \(3,\) integers 0 or 1"):
        env.step(actions)
    assert all(same(before[name], array) for name, array in env.state().items())


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int8])
def test_actions_may_be_any_integers(dtype):
    env, reference = thrust.CartPole(3), thrust.CartPole(3)
    env.reset(seed=0), reference.reset(seed=0)
    assert same(env.step(np.array([0, 1, 1], dtype))[0], reference.step([0, 1, 1])[0])


def test_misuse_of_cartpole_is_one_clear_error():
    with pytest.raises(RuntimeError, match=r"call reset\(\) before"):
        thrust.CartPole(2).step(np.array([0, 1]))
    for arguments in ((0,), (-1,), (2, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            thrust.CartPole(*arguments)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed must be from 0"):
            thrust.CartPole(2).reset(seed=seed)
    with pytest.raises(ValueError, match="no reset options"):
        thrust.CartPole(2).reset(options={"low": 0})


def test_without_a_seed_two_objects_differ():
    assert not same(thrust.CartPole(2).reset()[0], thrust.CartPole(2).reset()[0])


# ==============================================================================================
# 3. EnvPool
# ==============================================================================================


class Trouble(thrust.CartPole):
    """A CartPole in which the environment seeded 2 misbehaves in the third step."""

    def step(self, actions):
        result = super().step(actions)
        if 2 in self._seeds and self._clock == 3:
            self.misbehave()
        return result


class Raises(Trouble):
    def misbehave(self):
        raise KeyError("the third step went wrong")


class Dies(Trouble):
    def misbehave(self):
        os._exit(3)


class Hangs(Trouble):
    def misbehave(self):
        time.sleep(1000)


class NextStep(thrust.CartPole):
    metadata = {"autoreset_mode": "NextStep"}  # noqa: RUF012


class TooFew(thrust.CartPole):
    def __init__(self, num_envs):
        super().__init__(max(1, num_envs - 1))


class Stateless:
    """A vector environment with no state() whose final observations are objects, as Gymnasium's
    are, in a buffer that is used again."""

    metadata = {"autoreset_mode": "SameStep"}  # noqa: RUF012

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.single_observation_space = thrust.Box(np.zeros(1), np.ones(1), (1,))
        self.single_action_space = thrust.Discrete(2)

    def reset(self, *, seed=None):
        self.clock = np.arange(self.num_envs) + (seed or 0)
        return self.clock[:, None].astype(np.float32), {}

    def step(self, actions):
        self.clock += 1
        ended, info = self.clock % 5 == 0, {}
        if ended.any():
            info["final_obs"] = np.array([None] * self.num_envs)
            for i in np.flatnonzero(ended):
                info["final_obs"][i] = np.array([self.clock[i]], np.float32)
        obs = np.where(ended, -1, self.clock)[:, None].astype(np.float32)
        return obs, actions.astype(float), ended, np.zeros(self.num_envs, bool), info

    def close(self):
        pass


def same_as_one_process(workers, **options):
    rng, n = np.random.default_rng(workers), 7
    reference = thrust.CartPole(n)
    with thrust.EnvPool(thrust.CartPole, n, workers, **options) as pool:
        assert len(pool.pids) == workers and os.getpid() not in pool.pids
        assert same(pool.reset(seed=3)[0], reference.reset(seed=3)[0])
        for t in range(200):
            if t == 150:  # a state that was taken goes on in a pool cut differently
                taken, continued = pool.state(), thrust.EnvPool(thrust.CartPole, n, 0)
                assert all(same(array, taken[k]) for k, array in reference.state().items())
                continued.set_state(taken)
            actions = rng.integers(0, 2, n)
            expected = reference.step(actions)
            pool.send(actions)
            results = [pool.recv()] + ([continued.step(actions)] if t >= 150 else [])
            for got in results:
                assert all(same(a, b) for a, b in zip(expected[:4], got[:4]))
                ended = expected[2] | expected[3]
                assert ("final_obs" in got[4]) == ended.any()
                if ended.any():
                    assert same(expected[4]["final_obs"][ended], got[4]["final_obs"][ended])
        assert same(pool.reset()[0], reference.reset()[0])
    assert all(map(gone, pool.pids))


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_a_pool_gives_the_same_bits_as_one_process(workers):
    same_as_one_process(workers)


@pytest.mark.parametrize("method", METHODS)
def test_it_does_so_with_every_start_method(method):
    same_as_one_process(2, start_method=method)


def test_a_pool_passes_on_final_observations_that_are_objects():
    for workers in (0, 2):
        with thrust.EnvPool(Stateless, 3, workers) as pool:
            obs, _ = pool.reset(seed=1)
            assert obs.ravel().tolist() == [1, 2, 3]
            pool.step([0, 1, 0])
            obs, reward, terminated, _, info = pool.step([1, 1, 0])
            assert obs.ravel().tolist() == [3, 4, -1] and reward.tolist() == [1, 1, 0]
            assert terminated.tolist() == [False, False, True]
            assert info["final_obs"][2].tolist() == [5]
            with pytest.raises(RuntimeError, match="have no state"):
                pool.state()


def run_into_trouble(make_env, **options):
    """Steps a pool of 4 in 2 workers until it fails: (error, seconds that it took, pool)."""
    pool = thrust.EnvPool(make_env, 4, 2, **options)
    pool.reset(seed=0)
    pool.step(np.zeros(4, int)), pool.step(np.zeros(4, int))
    began = time.monotonic()
    with pytest.raises(thrust.WorkerError) as failure:
        pool.step(np.zeros(4, int))
    seconds = time.monotonic() - began
    assert failure.value.worker == 1 and "worker 1 (environments 2 to 3)" in str(failure.value)
    with pytest.raises(RuntimeError, match="this pool is closed"):
        pool.step(np.zeros(4, int))
    pool.close()
    assert all(map(gone, pool.pids))
    return failure.value, seconds


def test_a_worker_that_raises_delivers_its_traceback():
    error, _ = run_into_trouble(Raises)
    assert "raised while stepping" in str(error)
    assert "KeyError: 'the third step went wrong'" in str(error) and "misbehave" in str(error)


def test_a_worker_that_dies_is_reported_with_its_exit_code_within_a_second():
    error, seconds = run_into_trouble(Dies)
    assert error.exitcode == 3 and "died with exit code 3 while stepping" in str(error)
    assert seconds < 1


def test_a_worker_that_hangs_is_given_up_after_the_timeout():
    error, seconds = run_into_trouble(Hangs, timeout=0.5)
    assert error.exitcode is None and "was still stepping after 0.5 s" in str(error)
    assert 0.5 <= seconds < 5


def test_in_one_process_an_environments_error_arrives_as_it_is():
    with thrust.EnvPool(Raises, 4, 0) as pool:
        pool.reset(seed=0)
        pool.step(np.zeros(4, int)), pool.step(np.zeros(4, int))
        with pytest.raises(KeyError, match="the third step"):
            pool.step(np.zeros(4, int))


@pytest.mark.parametrize("workers", [0, 2])
def test_calls_out_of_order_are_one_clear_error(workers):
    with thrust.EnvPool(thrust.CartPole, 4, workers) as pool:
        pool.reset(seed=0)
        with pytest.raises(RuntimeError, match=r"recv\(\) needs a send\(\)"):
            pool.recv()
        pool.send([0, 1, 0, 1])
        with pytest.raises(RuntimeError, match=r"call recv\(\) first"):
            pool.send([1, 1, 1, 1])
        with pytest.raises(RuntimeError, match=r"call recv\(\) first"):
            pool.reset()
        got = pool.recv()[0].copy()  # the refused calls changed nothing
        reference = thrust.CartPole(4)
        reference.reset(seed=0)
        assert same(got, reference.step([0, 1, 0, 1])[0])
        for wrong in ([0, 1], [0.0, 1.0, 0.0, 1.0], [True] * 4):
            with pytest.raises(ValueError, match=r"actions must be int64 \(4,\), got"):
                pool.step(wrong)
    pool.close()
    with pytest.raises(RuntimeError, match="this pool is closed"):
        pool.reset()


@pytest.mark.parametrize(
    ("make_env", "num_envs", "workers", "error", "sentence"),
    [
        (thrust.CartPole, 2, 3, ValueError, "0 to N workers"),
        (thrust.CartPole, 2, -1, ValueError, "0 to N workers"),
        (thrust.CartPole, 0, 0, ValueError, "1 or more environments"),
        (NextStep, 2, 0, ValueError, "AutoresetMode.SAME_STEP"),
        (NextStep, 2, 2, ValueError, "AutoresetMode.SAME_STEP"),
        (TooFew, 4, 0, ValueError, r"make_env\(4\) made 3 environments"),
        (TooFew, 4, 2, thrust.WorkerError, r"make_env\(2\) made 1 environments"),
    ],
)
def test_what_cannot_become_a_pool_is_refused(make_env, num_envs, workers, error, sentence):
    with pytest.raises(error, match=sentence):
        thrust.EnvPool(make_env, num_envs, workers)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fork"])
def test_a_make_env_that_workers_cannot_import_is_refused_before_they_start(method):
    with pytest.raises(TypeError, match="top level of a module, not a lambda"):
        thrust.EnvPool(lambda n: thrust.CartPole(n), 2, 2, start_method=method)


@pytest.mark.skipif("fork" not in METHODS, reason="needs the fork start method")
def test_a_forked_worker_needs_no_importable_make_env():
    with thrust.EnvPool(lambda n: thrust.CartPole(n), 2, 2, start_method="fork") as pool:
        pool.reset(seed=0)


def test_gymnasiums_own_vector_environments_run_in_the_pool():
    oracle("gymnasium")
    with thrust.EnvPool(gymnasium_cartpole, 4, 2) as pool:
        reference, rng = thrust.CartPole(4), np.random.default_rng(0)
        assert same(pool.reset(seed=9)[0], reference.reset(seed=9)[0])
        for _ in range(100):
            actions = rng.integers(0, 2, 4)
            got, expected = pool.step(actions), reference.step(actions)
            assert all(same(a, b) for a, b in zip(expected[:4], got[:4]))
            ended = expected[2] | expected[3]
            if ended.any():
                assert same(expected[4]["final_obs"][ended], got[4]["final_obs"][ended])


def gymnasium_cartpole(num_envs):
    import gymnasium as gym

    return gym.vector.SyncVectorEnv(
        [lambda: gym.make("CartPole-v1")] * num_envs,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )


# --- nothing hangs, nothing is lost, nothing is left behind
#
# Each test below starts a program in a process group and a temporary folder of its own, and
# ends with the same checks (Program.end). A program may run through a table of cases.

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and /dev/shm")
PREAMBLE = f"""
import gc, multiprocessing, os, random, signal, sys, threading, time
multiprocessing.current_process()._config["semprefix"] = "/mp" + os.environ["THRUST_CASE"]
sys.path[:0] = [{str(SOURCE.parent)!r}, {os.path.dirname(os.path.abspath(__file__))!r}]
import thrust
"""


class Program:
    """A Python program that is running; `text` may be its guarded part alone."""

    def __init__(self, folder, text, *arguments, guard=True, stdin=False):
        folder = pathlib.Path(folder, os.urandom(4).hex())
        folder.mkdir()
        self.folder, self.mark = folder, folder.name
        self.temporary = pathlib.Path(tempfile.mkdtemp())  # short: a socket's path must be
        if guard:
            text = 'if __name__ == "__main__":\n' + textwrap.indent(text, "    ")
        path = folder / "program.py"
        path.write_text(PREAMBLE + text)
        with open(path) as file:
            self.process = subprocess.Popen(
                [sys.executable, "-" if stdin else path, *map(str, arguments)],
                stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True, cwd=folder,
                env={**os.environ, "TMPDIR": str(self.temporary), "THRUST_CASE": self.mark},
            )  # fmt: skip

    def left(self):
        """What there is of it: processes, files in shared memory and the temporary folder."""
        found = [
            f for f in os.listdir("/dev/shm") if self.mark in f or str(self.process.pid) in f
        ]
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if state != "Z" and int(group) == self.process.pid:
                    found.append(stat.with_name("cmdline").read_text())
        return found + [path.name for path in self.temporary.iterdir()]

    def end(self, code, expected="", seconds=60, leaves=()):
        """Waits for it, checks exit code, stderr and that nothing is left; returns stdout."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            left = self.left()
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(
                f"{left} after {seconds} s: {self.process.communicate()}"
            ) from None
        assert self.process.returncode == code, (self.process.returncode, out, err)
        assert re.fullmatch(expected, err.strip(), re.DOTALL), err
        deadline = time.monotonic() + 5
        while left := [f for f in self.left() if not f.startswith(tuple(leaves))]:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        shutil.rmtree(self.temporary)
        return out


def uncaught(message):
    """What Python prints for an exception that nobody catches: one traceback, one message."""
    return rf"Traceback \(most recent call last\):\n(?:  .*\n)+{message}"


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("mine")
        self.cannot = lambda: None


def fail(deed):
    if deed == "raise":
        raise KeyError("door")
    if deed == "raise what cannot be pickled":
        raise Unpicklable
    if deed == "print and raise":
        print("dying words", file=sys.stderr, flush=True)
        raise OSError(28, "no space left")
    if deed == "sys.exit":
        sys.exit(3)
    if deed == "os._exit":
        os._exit(3)
    if deed == "hang":
        while True:
            time.sleep(0.01)
    os.kill(os.getpid(), getattr(signal, deed))
    time.sleep(0.01)  # a signal to oneself may take a moment


class Fails(NamedTuple):
    """A make_env whose environments fail at a moment, in worker 1 or without workers."""

    moment: str
    deed: str

    def __call__(self, num_envs):
        env = thrust.CartPole(num_envs)
        name = mp.current_process().name
        if name.startswith("worker 1") or (name == "MainProcess" and num_envs > 1):
            if self.moment == "build":
                fail(self.deed)
            original = getattr(env, self.moment)
            calls = itertools.count(1)

            def method(*arguments, **options):
                result = original(*arguments, **options)
                if self.moment != "step" or next(calls) == 3:
                    fail(self.deed)
                return result

            setattr(env, self.moment, method)
        return env


# What is said of each deed, and the exit code that is told with it. (A worker that raised may
# have ended by then, or not.)
PLACE = r"\(test_thrust.py, line \d+\)\nTraceback .*"
SAID = {
    "raise": (f"raised while DOING: KeyError: 'door' {PLACE}", (None, 1)),
    "raise what cannot be pickled": (
        f"raised while DOING: test_thrust.Unpicklable: mine {PLACE}",
        (None, 1),
    ),
    "print and raise": (f"raised while DOING: OSError: .* no space left {PLACE}", (None, 1)),
    "sys.exit": (f"raised while DOING: SystemExit: 3 {PLACE}", (None, 1)),
    "os._exit": ("died with exit code 3 while DOING", (3,)),
    "SIGKILL": ("died with exit code -9 while DOING", (-9,)),
    "SIGSTOP": ("was still DOING after 0.6 s", (None,)),
    "hang": ("was still DOING after 0.6 s", (None,)),
}
DOING = {"build": "starting", "reset": "resetting", "step": "stepping"}
OUTSIDE = {  # moments at which a worker is signalled from outside, by the learner
    "computing": "resetting",
    "sent": "(stepping|resetting)",  # it may have stepped before the signal arrived
    "closing": None,
}


def play(pool):
    pool.reset(seed=0)
    for _ in range(4):
        pool.step(np.zeros(4, int))


def worker_fails(method, deed, moment):
    """One case: worker 1 of 2 does the deed, and the pool says so, is closed, and stays so."""
    pool, said = None, None
    try:
        make_env = thrust.CartPole if moment in OUTSIDE else Fails(moment, deed)
        pool = thrust.EnvPool(make_env, 4, 2, start_method=method, timeout=0.6)
        play(pool)
        if moment == "sent":
            pool.send(np.zeros(4, int))
        if moment in OUTSIDE:
            os.kill(pool.pids[1], getattr(signal, deed))
        if moment == "sent":
            pool.recv()
        if moment not in ("close", "closing"):
            play(pool)
    except thrust.WorkerError as error:
        said = error
        for call in (play, thrust.EnvPool.state) if pool else ():
            with pytest.raises(RuntimeError, match="this pool is closed"):
                call(pool)
    if pool:
        pool.close(0.3)
        pool.close()
    case = f"{deed} at {moment} with {method}"
    assert not mp.active_children(), case
    doing = {**DOING, **OUTSIDE}.get(moment)
    assert bool(said) == bool(doing), case
    if said:
        sentence, exitcodes = SAID[deed]
        sentence = r"worker 1 \(environments 2 to 3\) " + sentence.replace("DOING", doing)
        assert re.fullmatch(sentence, str(said), re.DOTALL), (case, str(said))
        assert said.worker == 1 and said.exitcode in exitcodes, case


def each_worker_fails(method, moments, deeds):
    for moment, deed in itertools.product(moments, deeds):
        waits = moment == "build" and deed in ("hang", "SIGSTOP")  # for a minute
        if not waits and (moment not in OUTSIDE or deed in ("SIGKILL", "SIGSTOP")):
            worker_fails(method, deed, moment)


@slow
@LINUX
@pytest.mark.parametrize(
    ("method", "moments", "deeds"),
    [
        ("fork", ["build", "reset", "step", "close", *OUTSIDE], [*SAID]),
        ("forkserver", ["step"], [*SAID][::2]),
        ("spawn", ["step"], ["raise", "SIGKILL"]),
    ],
)
def test_whatever_a_worker_does_is_one_error_that_names_it(method, moments, deeds, tmp_path):
    text = f"import test_thrust\ntest_thrust.each_worker_fails({method!r}, {moments}, {deeds})"
    Program(tmp_path, text).end(0, "(dying words\n?)*", 120)


@slow
@LINUX
@pytest.mark.parametrize(
    ("doing", "method"), [("waiting", "fork"), *(("stepping", method) for method in METHODS)]
)
def test_workers_follow_a_learner_that_is_killed_within_two_seconds(method, doing, tmp_path):
    text = (
        f"import test_thrust\n"
        f"make_env = test_thrust.Fails('step', 'hang')\n"
        f"pool = thrust.EnvPool(make_env, 4, 2, start_method={method!r})\n"
        f"pool.reset(seed=0)\n"
        f"for _ in range(2): pool.step([0] * 4)\n"
        f"if {doing == 'stepping'}: pool.send([0] * 4)\n"
        f"print(*pool.pids, flush=True)\n"
        f"time.sleep(100)"
    )
    program = Program(tmp_path, text)
    pids = [int(word) for word in program.process.stdout.readline().split()]
    program.process.kill()
    assert len(pids) == 2 and all(map(gone, pids))
    # Python's own tracker of resources unlinks the semaphores then, and says that it had to.
    leaves = () if method == "fork" else ("pymp-",)
    program.end(-signal.SIGKILL, "(.*leaked semaphore objects.*)?", leaves=leaves)


class Breaks(NamedTuple):
    """A make_env whose environments break the contract in worker 1, or without workers."""

    rule: str

    def __call__(self, num_envs):
        env = thrust.CartPole(num_envs)
        name = mp.current_process().name
        if not name.startswith("worker 1") and (name != "MainProcess" or num_envs == 1):
            return env
        if self.rule == "next-step reset":
            env.metadata = {"autoreset_mode": "NextStep"}
        elif self.rule == "fewer environments":
            env = thrust.CartPole(num_envs - 1)
        elif self.rule == "another observation space":
            env.single_observation_space = thrust.Box(-np.ones(3), np.ones(3), (3,))
        elif self.rule == "another action space":
            env.single_action_space = thrust.Discrete(3)
        env.reset, env.step = self.of(env.reset), self.of(env.step)
        return env

    def of(self, original):
        def method(*arguments, **options):
            obs, *others, info = original(*arguments, **options)
            obs, n = obs.copy(), len(obs)
            if others:
                reward, terminated, truncated = (array.copy() for array in others)
                if self.rule == "reward's shape":
                    reward = reward[:, None]
                elif self.rule == "reward's dtype":
                    reward = reward.astype(object)
                elif self.rule == "NaN reward":
                    reward[-1] = np.nan
                elif self.rule == "infinite observation":
                    obs[-1, 2] = np.inf
                elif self.rule == "obs' dtype":
                    obs = obs.astype(float)
                elif self.rule == "terminated's dtype":
                    terminated = terminated.astype(int)
                elif self.rule == "truncated's shape":
                    truncated = truncated[0]
                elif self.rule.startswith("final_obs"):
                    truncated[-1] = True
                    info = {"final_obs": np.full(obs.shape, np.nan, np.float32)}
                    info["final_obs"][terminated] = 0
                    if self.rule == "final_obs missing":
                        info = {}
                    elif self.rule == "final_obs' shape":
                        info = {"final_obs": obs[:, :1]}
                    elif self.rule == "final_obs objects' shape":
                        info = {"final_obs": np.array([None] * n)}
                        for i in np.flatnonzero(terminated | truncated):
                            info["final_obs"][i] = np.zeros(1, np.float32)
                    elif self.rule == "final_obs None":
                        info = {"final_obs": np.array([None] * n)}
                others = [reward, terminated, truncated]
            elif self.rule == "NaN observation":
                obs[-1, 2] = np.nan
            elif self.rule == "obs' shape":
                obs = obs[:, :3]
            elif self.rule == "too few rows":
                obs = obs[:-1]
            return obs, *others, info

        return method


# What is said of each; n is the number of environments that the one who says it has.
BREACHES = {
    "next-step reset": "CartPole does not begin a new episode in the step that ends one .*",
    "fewer environments": r"make_env\(n\) made \d environments",
    "another observation space": r"single_observation_space must be as elsewhere, "
    r"Box shape \(4,\) .*, and is Box shape \(3,\) .*",
    "another action space": "single_action_space must be as elsewhere, "
    "Discrete .* n 2 .*, and is Discrete .* n 3 .*",
    "obs' shape": r"obs must be float32 \(n, 4\), and the environment's is float32 \(n, 3\)",
    "too few rows": r"obs must be float32 \(n, 4\), and the environment's is float32 \(\d, 4\)",
    "obs' dtype": r"obs must be float32 \(n, 4\), and the environment's is float64 \(n, 4\)",
    "NaN observation": r"obs must be finite, and in row \d it is \[.* nan .*\]",
    "infinite observation": r"obs must be finite, and in row \d it is \[.* inf .*\]",
    "reward's shape": r"reward must be float64 \(n,\), and .* is float64 \(n, 1\)",
    "reward's dtype": r"reward must be float64 \(n,\), and the environment's is object \(n,\)",
    "NaN reward": r"reward must be finite, and in row \d it is nan",
    "terminated's dtype": r"terminated must be bool \(n,\), and the environment's is int64 .*",
    "truncated's shape": r"truncated must be bool \(n,\), and the environment's is bool \(\)",
    "final_obs missing": "info must have final_obs where episodes end, and has none",
    "final_obs' shape": r"final_obs must be float32 \(n, 4\), and .* is float32 \(n, 1\)",
    "final_obs objects' shape": r"final_obs must be float32 \(n, 4\), and .* \(n, 1\)",
    "final_obs None": r"final_obs must be float32 \(n, 4\), and .* is object \(n,\)",
    "final_obs NaN": r"final_obs must be finite, and in row \d it is \[nan nan nan nan\]",
}


def each_breach_is_named(method, rules):
    """With workers, or in this process if there is no method."""
    for rule in rules:
        sentence = BREACHES[rule]
        workers, n = (2, 2) if method else (0, 4)
        error = thrust.WorkerError if method else ValueError
        if method:
            sentence = rf"worker 1 .* raised while \w+: ValueError: {sentence} \(thrust.py, .*"
        with (
            pytest.raises(error) as failure,
            thrust.EnvPool(Breaks(rule), 4, workers, start_method=method) as pool,
        ):
            play(pool)
        sentence = sentence.replace(r"\(n", rf"\({n}")
        assert re.fullmatch(sentence, str(failure.value), re.DOTALL), (rule, str(failure.value))


@LINUX
@pytest.mark.parametrize(
    ("method", "rules"),
    [(None, [*BREACHES]), ("fork", [*BREACHES]), ("forkserver", [*BREACHES][::6])],
)
def test_environments_that_break_the_contract_are_named(method, rules, tmp_path):
    text = f"import test_thrust\ntest_thrust.each_breach_is_named({method!r}, {rules})"
    Program(tmp_path, text).end(0, "", 120)


POOL = "pool = thrust.EnvPool(thrust.CartPole, 4, {workers}, start_method={method!r})\n"
STOPPED = "pool.reset()\nos.kill(pool.pids[1], signal.SIGSTOP)\n"
SENT = "pool.reset()\npool.send([0] * 4)\n"
MINE = uncaught("KeyError: 'mine'")
ENDINGS = {  # what a program does with POOL, its exit code, and its stderr
    "forgotten": ("del pool\nassert not multiprocessing.active_children()", 0, ""),
    "never closed": ("pool.reset()", 0, ""),
    "in the middle of a step": (SENT, 0, ""),
    "sys.exit": (SENT + "sys.exit(5)", 5, ""),
    "sys.exit with a stopped worker": (STOPPED + "sys.exit(5)", 5, ""),
    "forgotten with a stopped worker": (STOPPED + "del pool", 0, ""),
    "an exception after send": (SENT + "raise KeyError('mine')", 1, MINE),
    "an exception in a with block": ("with pool: raise KeyError('mine')", 1, MINE),
    "an exception after send in a with block": (
        "with pool: pool.reset(), pool.send([0] * 4), {}['mine']", 1, MINE
    ),
}  # fmt: skip


@slow
@LINUX
@pytest.mark.parametrize(
    ("ending", "method"),
    [(ending, "fork") for ending in ENDINGS]
    + [("never closed", "spawn"), ("sys.exit with a stopped worker", "forkserver")],
)
def test_however_a_program_ends_its_workers_do_too(ending, method, tmp_path):
    text, code, expected = ENDINGS[ending]
    Program(tmp_path, POOL.format(workers=2, method=method) + text).end(code, expected, 30)


MAKE = "def make(num_envs): return thrust.CartPole(num_envs)\n"
UNFIT = {  # programs whose workers could not begin: guarded?, from standard input?, text, error
    "a lambda": (
        True, False, POOL.replace("thrust.CartPole", "lambda n: thrust.CartPole(n)"),
        "TypeError: workers cannot import make_env: it must be a function .*",
    ),
    "standard input": (
        True, True, POOL,
        "TypeError: workers cannot import make_env: .* not a lambda .* "
        r"\(what was typed in or came from standard input: save it as a file\)",
    ),
    "no guard": (
        False, False, POOL,
        r"thrust.WorkerError: worker 0 \(environments 0 to 1\) died with exit code 99 while "
        'starting: put what your program does under if __name__ == "__main__":',
    ),
    "no guard, training": (
        False, False, "thrust.train(thrust.Config(workers=2))",
        r"thrust.WorkerError: worker 0 .*: put what your program does under if __name__ .*",
    ),
}  # fmt: skip


@slow
@LINUX
@pytest.mark.parametrize(
    ("program", "method"),
    [(program, "forkserver") for program in UNFIT] + [("no guard", "spawn")],
)
def test_programs_that_workers_cannot_import_are_told_what_to_write(program, method, tmp_path):
    guard, stdin, text, error = UNFIT[program]
    text = text.format(workers=2, method=method)
    Program(tmp_path, text, guard=guard, stdin=stdin).end(1, uncaught(error))


@slow
@LINUX
def test_what_is_typed_in_may_use_a_make_env_that_has_a_file(tmp_path):
    text = "if True:\n" + textwrap.indent(PREAMBLE + POOL + "pool.reset()\npool.close()", " ")
    for name, code in (("thrust.CartPole", 0), ("make", 1)):
        program = MAKE + text.format(workers=2, method=None).replace("thrust.CartPole", name)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True,
            env={**os.environ, "THRUST_CASE": "typed-in"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert ("(what was typed in or came from standard" in done.stderr) == code


@slow
@LINUX
def test_with_fork_a_program_may_come_from_standard_input(tmp_path):
    text = POOL.format(workers=2, method="fork").replace("thrust.CartPole", "make")
    Program(tmp_path, MAKE + text + "pool.reset()", guard=False, stdin=True).end(0)


# How the command line is interrupted: a program runs thrust.main, and signals its own group, as
# a terminal would, at the moment that is named.
INTERRUPTED = """
import torch
number, moment, *flags = sys.argv[1:]
number = getattr(signal, number)
again = moment.endswith(" again")
moment = moment.removesuffix(" again")
if moment == "start-up":
    delay = random.uniform(0, 3)
    threading.Timer(delay, os.killpg, (0, number)).start()
else:
    owner, name = {
        "rollout": (thrust.Learner, "collect"), "update": (thrust, "ppo_update"),
        "checkpoint": (torch, "save"), "evaluation": (thrust, "evaluate"),
    }[moment]
    original, calls = getattr(owner, name), []
    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == (1 if moment == "evaluation" else 5):
            delay = random.uniform(0, 0.01)
            threading.Timer(delay, os.killpg, (0, number)).start()
        return original(*arguments, **options)
    setattr(owner, name, interrupted)
if again:  # and once more while the run is being saved because of that
    save = thrust.save_checkpoint
    def save_and_interrupt(*arguments):
        if sys.exc_info()[0]:
            os.killpg(0, number)
            time.sleep(0.01)
        save(*arguments)
    thrust.save_checkpoint = save_and_interrupt
sys.exit(thrust.main(flags))
"""


@slow
@LINUX
@pytest.mark.parametrize(("name", "workers"), [("SIGINT", 2), ("SIGTERM", 0)])
@pytest.mark.parametrize(
    "moment", ["start-up", "rollout", "update", "checkpoint", "evaluation", "rollout again"]
)
def test_wherever_a_run_is_interrupted_it_is_saved_and_says_no_more(
    moment, name, workers, undisturbed, tmp_path, monkeypatch
):
    config, result = undisturbed
    if moment == "start-up":
        workers = 2
    if moment != "evaluation":  # long enough to be interrupted with certainty
        config = dataclasses.replace(config, total_steps=100 * config.total_steps)
    program = Program(
        tmp_path, INTERRUPTED, name, moment, *flags_of(config), f"--workers={workers}"
    )
    out = program.end(130 if name == "SIGINT" else 143)
    run = program.folder / "runs" / "CartPole-0"
    if not (run / "checkpoint.pt").exists():
        assert moment == "start-up"
        return
    stopped = re.search(r"^stopped after update (\d+) of (\d+); to go on: ", out, re.M)
    _, (state,) = thrust.load_checkpoint(run)
    assert state["update"] == int(stopped[1]) == len(state["rows"])
    if moment == "evaluation":
        monkeypatch.chdir(program.folder)
        resumed = thrust.train(config, resume=run)
        assert thrust.weights_hash(resumed.policy) == thrust.weights_hash(result.policy)


class Raising:  # --env test_thrust:Raising.step
    build, reset, step = (Fails(moment, "raise") for moment in ("build", "reset", "step"))


@slow
@LINUX
def test_the_command_line_says_in_a_line_what_an_environment_raised(tmp_path):
    for moment, workers in (("build", 0), ("build", 2), ("step", 0), ("reset", 2)):
        (tmp_path / str(workers) / moment).mkdir(parents=True)
        text = (
            "import test_thrust\n"
            f"flags = ['--env=test_thrust:Raising.{moment}', '--workers={workers}']\n"
            "sys.exit(thrust.main(flags))"
        )
        expected = r"thrust: .*KeyError: 'door' \(test_thrust.py, line \d+\)"
        Program(tmp_path / str(workers) / moment, text).end(1, expected)


@LINUX
def test_main_also_works_outside_the_main_thread(tmp_path):
    flags = [*flags_of(small()), "--workers=2"]
    text = (
        "codes = []\n"
        f"thread = threading.Thread(target=lambda: codes.append(thrust.main({flags})))\n"
        "thread.start()\nthread.join()\nassert codes == [0]"
    )
    Program(tmp_path, text).end(0)


# ==============================================================================================
# 4. ActorCritic
# ==============================================================================================

BOX, TWO = thrust.Box(-np.ones(4), np.ones(4), (4,)), thrust.Discrete(2)


def make_policy(seed=0, space=TWO, hidden=(64, 64)):
    return thrust.ActorCritic(BOX, space, hidden, torch.Generator().manual_seed(seed))


def test_initial_weights_are_orthogonal_with_gains_sqrt2_001_and_1():
    policy = make_policy()
    for body, last_gain in ((policy.actor, 0.01), (policy.critic, 1.0)):
        weights, biases = list(body.parameters())[::2], list(body.parameters())[1::2]
        assert [tuple(weight.shape) for weight in weights[:2]] == [(64, 4), (64, 64)]
        for weight, bias, gain in zip(weights, biases, (2**0.5, 2**0.5, last_gain)):
            w = weight.detach()
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5, rtol=0)
            assert len(bias) == len(w) and not bias.any()
    assert {tuple(p.shape) for p in make_policy(hidden=()).parameters()} == {
        (2, 4),
        (2,),
        (1, 4),
        (1,),
    }


def test_weights_depend_on_the_generator_alone_and_leave_the_global_one_as_it_was():
    before = torch.get_rng_state()
    a = make_policy(1)
    torch.manual_seed(99)
    middle = torch.get_rng_state()
    b, c = make_policy(1), make_policy(2)
    assert torch.equal(torch.get_rng_state(), middle)
    assert thrust.weights_hash(a) == thrust.weights_hash(b) != thrust.weights_hash(c)
    torch.set_rng_state(before)


def test_logprob_and_entropy_are_those_of_torch_distributions():
    policy, obs = make_policy(space=thrust.Discrete(5)), torch.randn(300, 4) * 3
    with torch.no_grad():
        policy.actor.weight2 *= 300  # far from uniform
    action, logprob = policy.act(obs, generator=torch.Generator().manual_seed(1))
    reference = torch.distributions.Categorical(logits=policy.actor(obs))
    torch.testing.assert_close(logprob, reference.log_prob(action))
    again, entropy, value = policy.evaluate(obs, action)
    assert torch.equal(again, logprob) and again.requires_grad and not logprob.requires_grad
    torch.testing.assert_close(entropy, reference.entropy())
    assert torch.equal(value, policy.value(obs)) and value.shape == (300,)
    assert torch.equal(policy.act(obs, greedy=True)[0], reference.probs.argmax(-1))


def test_actions_are_drawn_with_the_policys_probabilities():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    policy, generator = make_policy(space=thrust.Discrete(4)), torch.Generator().manual_seed(0)
    noise = policy.noise(200_000, generator=generator)
    drawn = policy._choose(logits.expand(200_000, 4), noise)
    frequency = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = logits.softmax(0)
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((frequency - expected).abs() < 5 * deviation).all()


def test_numpy_and_tensor_observations_are_alike_and_of_any_shape():
    space = thrust.Box(np.zeros((2, 3)), np.ones((2, 3)), (2, 3))
    policy = thrust.ActorCritic(space, TWO, (8,), torch.Generator())
    obs = np.random.default_rng(0).normal(size=(5, 2, 3))
    assert torch.equal(policy.value(obs), policy.value(torch.tensor(obs).reshape(5, 6)))


class MultiDiscrete:
    """With the attributes of Gymnasium's."""

    def __init__(self, nvec):
        self.nvec, self.shape, self.dtype = np.array(nvec), np.shape(nvec), np.dtype(np.int64)


def test_several_choices_are_independent_categoricals():
    policy, obs = make_policy(space=MultiDiscrete([3, 2, 4])), torch.randn(100, 4) * 3
    with torch.no_grad():
        policy.actor.weight2 *= 300
    action, logprob = policy.act(obs, generator=torch.Generator().manual_seed(1))
    assert action.shape == (100, 3) and action.dtype == torch.int64
    assert action.amax(0).tolist() == [2, 1, 3] and action.amin(0).tolist() == [0, 0, 0]
    outputs = policy.actor(obs).split([3, 2, 4], -1)
    parts = [torch.distributions.Categorical(logits=logits) for logits in outputs]
    expected = sum(part.log_prob(a) for part, a in zip(parts, action.T))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(policy.evaluate(obs, action)[1], sum(p.entropy() for p in parts))
    greedy = torch.stack([part.probs.argmax(-1) for part in parts], -1)
    assert torch.equal(policy.act(obs, greedy=True)[0], greedy)


def test_real_actions_are_normal_stored_raw_and_clipped_only_for_the_environment():
    space = thrust.Box(np.full((2, 1), -0.5, np.float32), np.ones((2, 1), np.float32), (2, 1))
    policy, obs = make_policy(space=space), torch.randn(5000, 4)
    assert policy.log_std.tolist() == [0, 0]  # a parameter, whatever the observation
    action, logprob = policy.act(obs, generator=torch.Generator().manual_seed(1))
    assert action.shape == (5000, 2, 1) and action.abs().max() > 2
    normal = torch.distributions.Normal(policy.actor(obs), 1.0)
    torch.testing.assert_close(logprob, normal.log_prob(action[..., 0]).sum(-1))
    again, entropy, _ = policy.evaluate(obs, action)
    torch.testing.assert_close(again, logprob)
    torch.testing.assert_close(entropy, torch.full((5000,), math.log(2 * math.pi * math.e)))
    assert torch.equal(policy.act(obs, greedy=True)[0][..., 0], policy.actor(obs))
    sent = policy.to_env(action)
    assert same(sent, np.clip(action.numpy(), -0.5, 1)) and sent.dtype == np.float32
    entropy.sum().backward()
    assert policy.log_std.grad.tolist() == [5000, 5000]


def test_discrete_observations_are_one_hot_and_starts_are_honoured():
    space = thrust.Discrete(3, start=-1)
    policy = thrust.ActorCritic(space, thrust.Discrete(2, start=5), (), torch.Generator())
    with torch.no_grad():
        policy.critic.weight0[:] = torch.tensor([10.0, 20.0, 30.0])
    assert policy.value(np.array([-1, 1, 0, 1])).tolist() == [10, 30, 20, 30]
    action, _ = policy.act(np.array([0, 1]), greedy=True)
    assert set(action.tolist()) <= {0, 1}
    assert same(policy.to_env(action), action.numpy() + 5)


def test_unknown_spaces_are_refused_by_name():
    class MultiBinary:
        n, shape = 4, (4,)

        def __repr__(self):
            return "MultiBinary(4)"

    class Dict(MultiBinary):
        def __repr__(self):
            return "Dict('a': Discrete(2))"

    for unknown, name in ((MultiBinary(), r"MultiBinary\(4\)"), (Dict(), "Dict")):
        for spaces in ((BOX, unknown), (unknown, TWO)):
            with pytest.raises(ValueError, match=f"cannot be {name}"):
                thrust.ActorCritic(*spaces)


# ==============================================================================================
# 5. RolloutBuffer
# ==============================================================================================


def gae_by_definition(rewards, values, terminated, truncated, final_values, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode; O(T²), one number at a time."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n, t in itertools.product(range(N), range(T)):
        for k in range(T - t):
            s = t + k
            following = final_values[s, n] if truncated[s, n] else values[s + 1, n]
            following = 0.0 if terminated[s, n] else following
            delta = rewards[s, n] + gamma * following - values[s, n]
            advantages[t, n] += (gamma * lam) ** k * delta
            if terminated[s, n] or truncated[s, n]:
                break
    return advantages


def flags_and_numbers(T, seed):
    """Every combination of both flags in T steps, one per environment, and random numbers."""
    rng = np.random.default_rng(seed)
    flags = np.array(list(itertools.product([False, True], repeat=2 * T))).T  # (2T, 4^T)
    terminated, truncated = flags[:T], flags[T:]
    N = flags.shape[1]
    rewards, final = rng.normal(size=(2, T, N))
    return rewards, rng.normal(size=(T + 1, N)), terminated, truncated, final


@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_its_definition_for_all_flags_and_window_edges(T, gamma, lam):
    data = flags_and_numbers(T, seed=T)
    advantages, returns = thrust.gae(*data, gamma, lam)
    expected = gae_by_definition(*data, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected + data[1][:-1], atol=1e-12)


def test_gae_never_reads_what_it_says_it_does_not():
    rewards, values, terminated, truncated, final = flags_and_numbers(4, seed=0)
    clean = thrust.gae(rewards, values, terminated, truncated, final, 0.9, 0.9)
    final[~truncated] = np.nan
    final[terminated] = np.inf
    dirty = thrust.gae(rewards, values, terminated, truncated, final, 0.9, 0.9)
    assert same(clean[0], dirty[0]) and same(clean[1], dirty[1])


def test_gae_keeps_float32():
    data = [x.astype(np.float32) if x.dtype == float else x for x in flags_and_numbers(3, 0)]
    assert {array.dtype for array in thrust.gae(*data, 0.9, 0.9)} == {np.dtype(np.float32)}


def test_gae_is_stable_baselines3s():
    buffers = oracle("stable_baselines3.common.buffers")
    spaces = pytest.importorskip("gymnasium").spaces
    rng, T, N, gamma, lam = np.random.default_rng(3), 64, 16, 0.98, 0.8
    rewards, final = rng.normal(size=(2, T, N)).astype(np.float32)
    values = rng.normal(size=(T + 1, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < 0.1
    buffer = buffers.RolloutBuffer(
        T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, N
    )
    # Its collector adds γ·V(final_obs) to the reward of a truncated step, and ends there.
    buffer.rewards = rewards + gamma * final * (truncated & ~terminated)
    buffer.values = values[:-1]
    ended = terminated | truncated
    buffer.episode_starts = np.concatenate([np.zeros((1, N)), ended[:-1]]).astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(values[-1]), ended[-1])
    ours = thrust.gae(rewards, values, terminated, truncated, final, gamma, lam)
    np.testing.assert_allclose(ours[0], buffer.advantages, atol=2e-6)
    np.testing.assert_allclose(ours[1], buffer.returns, atol=2e-6)


def test_gae_is_torchrls():
    functional = oracle("torchrl.objectives.value.functional")
    rewards, values, terminated, truncated, final = flags_and_numbers(4, seed=4)
    following = np.where(truncated, final, values[1:])
    arrays = values[:-1], following, rewards, terminated | truncated, terminated
    tensors = [
        torch.from_numpy(np.ascontiguousarray(a.T))[..., None] for a in arrays
    ]  # (N, T, 1)
    theirs = functional.generalized_advantage_estimate(0.97, 0.9, *tensors)
    ours = thrust.gae(rewards, values, terminated, truncated, final, 0.97, 0.9)
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine, other[..., 0].numpy().T, atol=1e-6)


def test_a_batch_is_the_rollout_flattened_and_minibatches_cover_it():
    buffer = thrust.RolloutBuffer(3, 2, BOX, TWO)
    buffer.obs[:] = np.arange(4 * 2 * 4).reshape(4, 2, 4)
    buffer.action[:] = np.arange(6).reshape(3, 2)
    buffer.reward[:] = np.random.default_rng(0).random((3, 2))
    batch = buffer.batch(0.9, 0.9)
    assert batch.action.tolist() == [0, 1, 2, 3, 4, 5]
    assert same(batch.obs.numpy(), buffer.obs[:3].reshape(6, 4))
    pieces = list(batch.minibatches(4, 3, torch.Generator().manual_seed(0)))
    assert [len(piece.obs) for piece in pieces] == [
        4,
        2,
    ] * 3  # what is left over is not dropped
    passes = [pieces[i].action.tolist() + pieces[i + 1].action.tolist() for i in (0, 2, 4)]
    assert all(sorted(p) == [0, 1, 2, 3, 4, 5] for p in passes) and passes[0] != passes[1]
    for piece in pieces:  # rows stay together
        assert torch.equal(piece.obs[:, 0].long() // 4, piece.action)
        assert torch.equal(batch.returns[piece.action], piece.returns)


# ==============================================================================================
# 6. PPO
# ==============================================================================================


def some_batch(policy, size, seed=0, drift=0.3):
    """A batch whose old log-probabilities differ from the policy's by about `drift`."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(size, 4, generator=g)
    action, logprob = policy.act(obs, generator=g)
    noise = drift * torch.randn(size, generator=g)
    rest = torch.randn(2, size, generator=g)
    return thrust.Batch(obs, action, logprob + noise, *rest)


def test_on_the_first_minibatch_the_ratio_is_1_and_the_kl_0(in_tmp):
    seen, original = [], thrust.ppo_loss

    def spy(policy, batch, config):
        loss, stats = original(policy, batch, config)
        with torch.no_grad():
            ratio = (policy.evaluate(batch.obs, batch.action)[0] - batch.logprob).exp()
        seen.append((ratio, stats))
        return loss, stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thrust, "ppo_loss", spy)
        config = small()
        thrust.train(config)
    per_update = config.epochs * config.batch_size // config.minibatch_size
    firsts, lasts = seen[::per_update], seen[per_update - 1 :: per_update]
    assert len(firsts) == config.num_updates
    for ratio, stats in firsts:
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
        assert abs(stats["approx_kl"]) < 1e-6 and stats["clip_fraction"] == 0
    assert max(stats["approx_kl"] for _, stats in lasts) > 1e-4  # and it does move later


def test_a_whole_update_is_stable_baselines3s():
    sb3, gym = oracle("stable_baselines3"), oracle("gymnasium")
    size, knobs = 256, {"ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    policy = make_policy()
    with torch.no_grad():
        policy.actor.weight2 *= 100
    theirs = sb3.PPO(
        "MlpPolicy", gym.make("CartPole-v1"), n_steps=size, batch_size=size, n_epochs=1,
        learning_rate=1e-3, clip_range=0.2, device="cpu", **knobs
    )  # fmt: skip
    extractor = theirs.policy.mlp_extractor
    bodies = (policy.actor, extractor.policy_net, theirs.policy.action_net)
    bodies += (policy.critic, extractor.value_net, theirs.policy.value_net)
    pairs = []
    for ours, body, head in (bodies[:3], bodies[3:]):
        pairs += zip(ours.parameters(), [*body.parameters(), *head.parameters()])
    for mine, other in pairs:
        other.data.copy_(mine.data)
    batch, config = some_batch(policy, size), thrust.Config(**knobs)
    buffer = theirs.rollout_buffer
    buffer.reset()
    buffer.observations[:, 0], buffer.actions[:, 0, 0] = batch.obs, batch.action
    buffer.log_probs[:, 0], buffer.values[:, 0] = batch.logprob, 0
    buffer.advantages[:, 0], buffer.returns[:, 0] = batch.advantage, batch.returns
    buffer.full = True
    theirs.set_logger(sb3.common.logger.configure(None, []))
    theirs.train()

    before = thrust.weights_hash(policy)
    optimizer = thrust.Adam(policy)
    loss, stats = thrust.ppo_loss(policy, batch, config)
    loss.backward()
    length = optimizer.grad.norm()
    optimizer.grad *= min(1.0, 0.5 / (float(length) + 1e-6))
    for mine, other in pairs:  # the clipped gradients
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-7, rtol=1e-5)
    optimizer.step(1e-3, 1e9)
    for mine, other in pairs:  # and the weights after Adam's step
        torch.testing.assert_close(mine.data, other.data, atol=1e-7, rtol=0)
    assert thrust.weights_hash(policy) != before
    logged = theirs.logger.name_to_value
    for name, key in (("approx_kl", "approx_kl"), ("clip_fraction", "clip_fraction")):
        assert logged[f"train/{key}"] == pytest.approx(stats[name].item(), abs=1e-6)
    assert logged["train/value_loss"] == pytest.approx(stats["value_loss"].item(), rel=1e-5)


def test_adam_is_torchs_adam_with_its_gradient_clipping():
    ours, theirs = make_policy(3), make_policy(3)
    mine, other = thrust.Adam(ours), torch.optim.Adam(theirs.parameters(), eps=1e-5)
    for step in range(20):
        for policy in (ours, theirs):
            loss, _ = thrust.ppo_loss(policy, some_batch(ours, 64, step), thrust.Config())
            loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        other.param_groups[0]["lr"] = rate = 1e-2 / (step + 1)
        other.step()
        other.zero_grad()
        torch.testing.assert_close(mine.step(rate, 0.5), expected)
        assert not mine.grad.any()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_only_outside_the_band_on_the_winning_side_is_the_gradient_cut():
    class Fixed:
        def __init__(self, ratio):
            self.logprob = torch.tensor(ratio).log().requires_grad_()

        def evaluate(self, obs, action):
            return self.logprob, torch.zeros(len(self.logprob)), torch.zeros(len(self.logprob))

    #             inside   gained  gained  lost   lost
    ratio = [1.15, 0.9, 1.5, 1.3, 0.7, 0.6]
    sign = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    zeros = torch.zeros(6)
    policy = Fixed(ratio)
    batch = thrust.Batch(zeros[:, None], zeros, zeros, torch.tensor(sign), zeros)
    loss, stats = thrust.ppo_loss(policy, batch, thrust.Config(clip=0.2))
    loss.backward()
    pushed = (policy.logprob.grad != 0).tolist()
    assert pushed == [True, True, False, True, True, False]
    assert stats["clip_fraction"] == pytest.approx(4 / 6)
    # mean( min( ratio·Â, clip(ratio)·Â ) ), by hand; Â of ±1 in equal number scales by 1/std
    std = np.std(sign, ddof=1)
    by_hand = np.mean([1.15, -0.9, 1.2, -1.3, 0.7, -0.8]) / std
    assert -stats["policy_loss"].item() == pytest.approx(by_hand, abs=1e-6)


def test_a_minibatch_of_one_trains_to_finite_numbers():
    policy = make_policy()
    loss, stats = thrust.ppo_loss(policy, some_batch(policy, 1), thrust.Config())
    assert torch.isfinite(loss) and all(torch.isfinite(v) for v in stats.values())


def test_shapes_that_would_broadcast_are_refused():
    policy = make_policy()
    batch = some_batch(policy, 8)
    batch.returns = batch.returns[:, None]
    with pytest.raises(AssertionError, match="would make"):
        thrust.ppo_loss(policy, batch, thrust.Config())


@pytest.mark.parametrize("target", [None, 1e-4, 1e-30])
def test_target_kl_ends_the_whole_update(target):
    policy = make_policy()
    batch = some_batch(policy, 256, drift=0.0)
    config = thrust.Config(minibatch_size=64, epochs=10, target_kl=target)
    g = torch.Generator().manual_seed(0)
    stats = thrust.ppo_update(policy, thrust.Adam(policy), batch, config, 3e-2, g)
    steps = stats["gradient_steps"]
    assert steps == 40 if target is None else 1 <= steps < 10
    assert all(math.isfinite(value) for value in stats.values())


class Bandit(Stateless):
    """One step per episode: +1 for the action that the sign of the observation asks for."""

    def reset(self, *, seed=None):
        self.rng = np.random.default_rng(seed)
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        return self.obs, {}

    def step(self, actions):
        reward = np.where((self.obs[:, 0] > 0) == (actions == 1), 1.0, -1.0)
        final = self.obs
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        always = np.ones(self.num_envs, bool)
        return self.obs, reward, always, ~always, {"final_obs": final}


def test_a_contextual_bandit_is_solved_completely():
    config = thrust.Config(num_envs=64, num_steps=8, minibatch_size=128, learning_rate=1e-2)
    with thrust.EnvPool(Bandit, 64, 0) as envs:
        learner = thrust.Learner(config, envs)
        learner.buffer.obs[-1] = envs.reset(seed=0)[0]
        for _ in range(40):
            learner.collect()
            batch = learner.buffer.batch(config.gamma, config.gae_lambda)
            g = learner.generators["minibatches"]
            thrust.ppo_update(learner.policy, learner.optimizer, batch, config, 1e-2, g)
        magnitude = torch.linspace(0.05, 1, 100)
        obs = torch.cat([-magnitude, magnitude])[:, None]
        action, _ = learner.policy.act(obs, greedy=True)
    assert torch.equal(action, (obs[:, 0] > 0).long())


# ==============================================================================================
# 7. Training
# ==============================================================================================


def test_seeds_of_runs_purposes_ranks_and_updates_never_meet():
    widths = {"environments": 4096, "evaluation": 1000}
    ranges = sorted(
        (start := thrust.derive_seed(seed, purpose, *more), start + widths.get(purpose, 1))
        for seed in range(500)
        for purpose in thrust.PURPOSES
        for more in ([], [0, 0], [1, 0], [0, 1], [1, 1])  # ranks and updates
    )
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))
    assert ranges[-1][1] < 2**63


def test_a_truncated_step_is_valued_by_the_state_that_it_reached():
    config = thrust.Config(num_envs=2, num_steps=5, minibatch_size=10)
    with thrust.EnvPool(Short, 2, 0) as envs:
        learner = thrust.Learner(config, envs)
        learner.buffer.obs[-1] = envs.reset(seed=0)[0]
        learner.collect()
    buffer, shadow = learner.buffer, Short(2)
    assert buffer.truncated.any(1).tolist() == [False, False, True, False, False]
    obs, _ = shadow.reset(seed=0)
    for t in range(5):
        assert same(buffer.obs[t], obs)
        obs, _, _, _, info = shadow.step(buffer.action[t])
        if t == 2:
            expected = learner.policy.value(info["final_obs"]).detach().numpy()
            np.testing.assert_allclose(buffer.final_value[t], expected, rtol=1e-6)
            begun = learner.policy.value(buffer.obs[3]).detach().numpy()
            assert not np.allclose(expected, begun)
    assert learner.episodes == 2 and learner.recent == [[3.0, 3.0], [3.0, 3.0]]
    assert learner.running[:2].tolist() == [[2.0, 2.0], [2.0, 2.0]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run, to compare others with: (config, result)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        config = small(total_steps=8 * 16 * 40)
        result = thrust.train(config)
        return config, result._replace(run=result.run.absolute())


def test_the_same_config_gives_the_same_weights_and_log_for_any_workers(undisturbed, in_tmp):
    config, result = undisturbed
    for workers in (0, 1, 2):
        again = thrust.train(dataclasses.replace(config, workers=workers))
        assert thrust.weights_hash(again.policy) == thrust.weights_hash(result.policy)
        assert rows_without_clock(again.run) == rows_without_clock(result.run)
        assert same(again.evaluation.returns, result.evaluation.returns)
    other = thrust.train(dataclasses.replace(config, seed=1))
    assert thrust.weights_hash(other.policy) != thrust.weights_hash(result.policy)
    assert [p.name for p in sorted(in_tmp.glob("runs/*"))] == [
        "CartPole-0", "CartPole-0-2", "CartPole-0-3", "CartPole-1"
    ]  # fmt: skip


def flags_of(config):
    plain = (int, float, str)
    knobs = {k: v for k, v in dataclasses.asdict(config).items() if type(v) in plain}
    return [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(undisturbed, in_tmp):
    config, result = undisturbed
    log = in_tmp / "runs" / "CartPole-0" / "log.csv"
    for workers, flags in ((2, flags_of(config)), (0, ["--resume", "runs/CartPole-0"])):
        process = subprocess.Popen(
            command(*flags, f"--workers={workers}"), stdout=subprocess.DEVNULL
        )
        before = len(log.read_text().splitlines()) if log.exists() else 0
        deadline = time.monotonic() + 60
        while not log.exists() or len(log.read_text().splitlines()) < before + 6:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert len(log.read_text().splitlines()) < config.num_updates + 1  # it was on its way
    one_worker = dataclasses.replace(config, workers=1)
    resumed = thrust.train(one_worker, resume="runs/CartPole-0")
    assert thrust.weights_hash(resumed.policy) == thrust.weights_hash(result.policy)
    assert rows_without_clock(resumed.run) == rows_without_clock(result.run)
    assert len(rows_without_clock(resumed.run)) == config.num_updates
    (ours,), (theirs,) = (thrust.load_checkpoint(r.run)[1] for r in (resumed, result))
    assert len(ours["snapshots"]) == len(theirs["snapshots"]) == 8
    for a, b in zip(ours["snapshots"], theirs["snapshots"]):
        assert a["steps"] == b["steps"] and torch.equal(a["weights"], b["weights"])


def test_the_log_has_every_column_for_every_update(undisturbed):
    config, result = undisturbed
    rows = rows_without_clock(result.run)
    assert list(result.rows[0]) and set(result.rows[0]) == set(thrust.COLUMNS)
    assert [int(row["update"]) for row in rows] == list(range(1, config.num_updates + 1))
    assert int(rows[-1]["steps"]) == config.total_steps
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[0] == config.learning_rate and 0 < rates[-1] < rates[-2]
    np.testing.assert_allclose(np.diff(rates), -config.learning_rate / config.num_updates)
    assert all(math.isfinite(float(v)) for row in rows[3:] for v in row.values())
    assert json.loads((result.run / "config.json").read_text())["num_envs"] == config.num_envs


def test_a_checkpoint_is_data_and_its_policy_is_the_one_that_was_trained(undisturbed):
    _, result = undisturbed
    state = torch.load(result.run / "checkpoint.pt", weights_only=True)["ranks"][0]
    assert state["update"] == len(state["rows"]) == len(result.rows)
    policy, obs = thrust.load(result.run), np.random.default_rng(0).normal(size=(50, 4))
    assert thrust.weights_hash(policy) == thrust.weights_hash(result.policy)
    assert torch.equal(policy.act(obs, greedy=True)[0], result.policy.act(obs, greedy=True)[0])
    assert sorted(p.name for p in result.run.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "log.csv",
        "page.html",
        "policy.json",
    ]


def test_training_leaves_global_generators_and_threads_alone(in_tmp):
    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        before = state()
        first = thrust.train(small())
        assert state() == before and torch.get_num_threads() == 2
        random.seed(2), np.random.seed(2), torch.manual_seed(2)  # and does not read them either
        assert thrust.weights_hash(thrust.train(small()).policy) == thrust.weights_hash(
            first.policy
        )
    finally:
        torch.set_num_threads(threads)


def test_evaluation_disturbs_nothing_and_repeats_exactly(undisturbed):
    config, result = undisturbed
    again = thrust.evaluate(result.policy, config)
    assert same(again.returns, result.evaluation.returns) and len(again.returns) == 4
    assert again.mean == pytest.approx(np.mean(again.returns))
    assert again.std == pytest.approx(np.std(again.returns))


def test_a_resumed_run_keeps_its_config(undisturbed):
    config, result = undisturbed
    for knob, value in (("learning_rate", 1.0), ("num_envs", 4), ("seed", 3)):
        changed = dataclasses.replace(config, **{knob: value})
        with pytest.raises(ValueError, match=f"has {knob} = .*, not {value}; only workers"):
            thrust.train(changed, resume=result.run)


def test_an_error_in_training_saves_the_last_update_and_says_how_to_go_on(in_tmp, capsys):
    original, calls = thrust.ppo_update, []

    def fail_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("something broke")
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thrust, "ppo_update", fail_at_the_fourth)
        with pytest.raises(RuntimeError, match="something broke"):
            thrust.train(small(checkpoint_every=100))
    run = os.path.join("runs", "CartPole-0")
    assert f"stopped after update 3 of 6; to go on: python thrust.py --resume {run}" in (
        capsys.readouterr().out
    )
    resumed = thrust.train(small(), resume=run)
    whole = thrust.train(small())
    assert thrust.weights_hash(resumed.policy) == thrust.weights_hash(whole.policy)


# --- other environments


def trained(*flags):
    """Trains from flags, as the command line would, for three small updates."""
    sizes = (
        "--num-envs 4 --num-steps 32 --minibatch-size 64 --total-steps 384 --eval-episodes 2"
    )
    assert thrust.main([*sizes.split(), *flags]) == 0


@pytest.mark.parametrize(
    "env", ["Acrobot-v1", "Pendulum-v1", "FrozenLake-v1", "test_thrust:TwoChoices"]
)
def test_every_kind_of_space_trains_with_the_same_bits_for_any_workers(env, in_tmp, capsys):
    # Discrete actions; Box; Discrete observations; MultiDiscrete actions
    if ":" not in env:
        oracle("gymnasium")
    last_lines = set()
    for workers in ("0", "2"):
        trained("--env", env, "--workers", workers)
        last_lines.add(tuple(capsys.readouterr().out.splitlines()[-2:]))
    assert len(last_lines) == 1
    run = f"runs/{env.replace(':', '-')}-0"
    assert thrust.main(["--evaluate", run]) == 0
    assert tuple(capsys.readouterr().out.splitlines()) in last_lines


class TwoChoices(thrust.CartPole):
    """A CartPole with two buttons: it is pushed to the right if both or neither are pressed."""

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.single_action_space = MultiDiscrete([2, 2])

    def step(self, actions):
        return super().step((actions[:, 0] == actions[:, 1]).astype(np.int64))


def test_normalisation_is_the_same_for_any_workers_and_frozen_in_evaluation(in_tmp, capsys):
    outputs = set()
    for workers in ("0", "1", "2"):
        trained("--norm-obs", "--norm-reward", "--workers", workers)
        outputs.add(tuple(capsys.readouterr().out.splitlines()[-2:]))
    assert len(outputs) == 1
    _, (state,) = thrust.load_checkpoint("runs/CartPole-0")
    sums = state["tensors"]["obs_sums"]
    assert sums[0].tolist() == [4 * 97] * 4  # first observations and three rollouts of 4 x 32
    policy = thrust.load("runs/CartPole-0")
    first = thrust.evaluate(policy, small())
    assert same(first.returns, thrust.evaluate(policy, small()).returns)
    assert torch.equal(policy.normalizer.sums, sums)
    obs = np.random.default_rng(0).normal(size=(5, 4))
    mean, std = (m.numpy() for m in policy.normalizer.moments())
    by_hand = torch.from_numpy(np.clip((obs - mean) / std, -10, 10)).float()
    value, policy.normalizer = policy.value(obs), None
    torch.testing.assert_close(value, policy.value(by_hand))


def test_moments_are_those_of_everything_counted():
    norm, rng = thrust.Normalizer(3), np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(500, 3)) * [1, 10, 0.1] + [0, 100, -1])
    assert torch.equal(norm(rows[:1].float()), rows[:1].float().clamp(-10, 10))  # nothing yet
    for chunk in rows.split(70):
        norm.count(chunk)
    mean, std = norm.moments()
    torch.testing.assert_close(mean, rows.mean(0).float())
    torch.testing.assert_close(std, rows.std(0, correction=0).float())
    torch.testing.assert_close(
        norm(rows.float()), ((rows - mean) / std).float(), rtol=1e-4, atol=1e-4
    )
    assert norm(torch.tensor([[1e9, -1e9, 0]])).tolist()[0][:2] == [10, -10]


def test_the_buffer_keeps_the_observations_that_the_policy_saw():
    config = small(norm_obs=True, norm_reward=True, gamma=0.9)
    with thrust.EnvPool(Short, 8, 0) as envs:
        learner, shadow, seen = thrust.Learner(config, envs), Short(8), []
        learner.begin()
        choose = learner.policy.choose
        learner.policy.choose = lambda obs, noise: (
            seen.append(obs.copy()),
            choose(obs, noise),
        )[1]
        raw, _ = shadow.reset(seed=thrust.derive_seed(0, "environments", 0, 0))
        every_obs, returns, so_far = [raw.copy()], [], np.zeros(8)

        def normal(obs):
            rows = np.concatenate(every_obs).astype(float)
            return np.clip((obs - rows.mean(0)) / rows.std(0), -10, 10).astype(np.float32)

        for _ in range(3):
            learner.collect()
            for t in range(config.num_steps):
                assert same(learner.buffer.obs[t], seen.pop(0))
                np.testing.assert_allclose(
                    learner.buffer.obs[t], normal(raw), atol=1e-4, rtol=1e-4
                )
                raw, reward, _, truncated, info = shadow.step(learner.buffer.action[t])
                every_obs.append(raw.copy())
                so_far = 0.9 * so_far + reward
                returns.append(so_far.copy())
                scaled = reward / max(np.std(returns), 1e-4)
                np.testing.assert_allclose(
                    learner.buffer.reward[t], np.clip(scaled, -10, 10), rtol=1e-5, atol=1e-5
                )
                so_far[truncated] = 0
                if truncated.any():  # valued with the same statistics, which do not count it
                    value = learner.policy.value(normal(info["final_obs"])).detach().numpy()
                    np.testing.assert_allclose(
                        learner.buffer.final_value[t], value, atol=1e-4, rtol=1e-4
                    )
    assert learner.reward_norm.sums[0].item() == 3 * config.batch_size


class Short(thrust.CartPole):
    """Cut off after three steps."""

    def __init__(self, num_envs):
        super().__init__(num_envs, max_episode_steps=3)


def test_an_environment_without_state_is_resumed_in_new_episodes_and_says_so(in_tmp, capsys):
    flags = ["--env", "test_thrust:Stateless", "--total-steps=512", "--num-envs=4"]
    assert thrust.main([*flags, "--num-steps=32", "--minibatch-size=64"]) == 0
    capsys.readouterr()
    config, ranks = thrust.load_checkpoint("runs/test_thrust-Stateless-0")
    assert ranks[0]["envs"] == {} and config.num_updates == 4
    half = {**ranks[0], "update": 2, "rows": ranks[0]["rows"][:2]}
    thrust.save_checkpoint(in_tmp / "runs/test_thrust-Stateless-0", config, half)
    result = thrust.train(config, resume="runs/test_thrust-Stateless-0")
    assert "cannot be saved: going on with new episodes" in capsys.readouterr().out
    assert [row["update"] for row in result.rows] == [1, 2, 3, 4]


def test_what_env_can_not_be_is_one_sentence(in_tmp, capsys, monkeypatch):
    for env, reason in (
        ("nowhere:Env", "cannot be imported: No module named 'nowhere'"),
        ("test_thrust:Nothing", "cannot be imported: .*Nothing"),
        ("test_thrust:NextStep", "AutoresetMode.SAME_STEP"),
    ):
        assert thrust.main(["--env", env]) == 1
        error = capsys.readouterr().err
        assert re.match(rf"thrust: .*{reason}", error) and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert thrust.main(["--env", "Acrobot-v1"]) == 1
    assert "pip install gymnasium" in capsys.readouterr().err
    assert not (in_tmp / "runs").exists()


def test_gymnasiums_refusals_are_one_sentence(in_tmp, capsys):
    gym = oracle("gymnasium")
    assert thrust.main(["--env", "NoSuchGame-v7"]) == 1
    assert "Gymnasium cannot make NoSuchGame-v7" in capsys.readouterr().err
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    with pytest.raises(ValueError, match=r"CartPoleVectorEnv .*AutoresetMode.SAME_STEP"):
        thrust.EnvPool(CartPoleVectorEnv, 2, 0)
    assert gym.vector.AutoresetMode.SAME_STEP.value == "SameStep"


def test_render_needs_an_environment_that_can_be_shown(in_tmp, capsys):
    with pytest.raises(SystemExit):
        thrust.main(["--render"])
    assert "--render needs --evaluate RUN" in capsys.readouterr().err
    trained()
    assert thrust.main(["--evaluate", "runs/CartPole-0", "--render"]) == 1
    assert "--render needs an environment of Gymnasium's" in capsys.readouterr().err


def uneven_environments(num_envs):
    """Gymnasium environments that reuse one observation buffer; the i-th lasts 2 + i steps, and
    every second one is truncated."""
    import gymnasium as gym

    class Uneven(gym.Env):
        observation_space = gym.spaces.Box(-1e9, 1e9, (1,))
        action_space = gym.spaces.Discrete(2)

        def __init__(self, i):
            self.i, self.buffer = i, np.zeros(1, np.float32)

        def reset(self, *, seed=None, options=None):
            self.buffer[0] = self.steps = 0
            return self.buffer, {}

        def step(self, action):
            self.steps += 1
            self.buffer[0] = 10 * self.i + self.steps
            ended = self.steps == 2 + self.i
            return self.buffer, float(self.steps), ended and self.i % 2 == 0, ended, {}

    keep = gym.wrappers.TransformObservation
    makers = [
        lambda i=i: keep(Uneven(i), np.copy, Uneven.observation_space) for i in range(num_envs)
    ]
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv(makers, autoreset_mode=mode)


def test_uneven_episodes_of_gymnasium_give_the_targets_of_a_hand_computation():
    oracle("gymnasium")
    T, N, gamma, lam = 7, 3, 0.5, 0.5
    config = small(num_envs=N, num_steps=T, minibatch_size=21, total_steps=21)
    with thrust.EnvPool(uneven_environments, N, 0) as envs:
        learner = thrust.Learner(config, envs)
        learner.policy.critic = torch.nn.Identity()  # V(s) = s
        learner.begin()
        learner.collect()
        learner.estimate()
        batch = learner.buffer.batch(gamma, lam)
    expected = np.zeros((T, N))
    for n in range(N):
        length = 2 + n
        for t in reversed(range(T)):
            k = t % length  # steps into the episode
            here = 10 * n + k if k else 0
            reached = 10 * n + k + 1
            last = k == length - 1
            bootstrap = 0 if last and n % 2 == 0 else gamma * reached
            delta = (k + 1) + bootstrap - here
            later = 0 if last or t == T - 1 else expected[t + 1, n]
            expected[t, n] = delta + gamma * lam * later
    np.testing.assert_allclose(batch.advantage.view(T, N), expected, rtol=1e-6)


def test_an_environment_that_reuses_its_observation_loses_nothing(monkeypatch):
    gym = oracle("gymnasium")

    class Reuses(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (1,))
        action_space = gym.spaces.Discrete(2)
        buffer = np.zeros(1, np.float32)

        def reset(self, *, seed=None, options=None):
            self.buffer[0] = -1
            return self.buffer, {}

        def step(self, action):
            self.buffer[0] = 1
            return self.buffer, 0.0, True, False, {}

    gym.register("Reuses-v0", Reuses)
    env = thrust.MakeEnv("Reuses-v0")(2)
    env.reset(seed=0)
    obs, _, _, _, info = env.step(np.zeros(2, np.int64))
    assert obs.ravel().tolist() == [-1, -1]
    assert np.stack(info["final_obs"]).ravel().tolist() == [1, 1]
    gym.registry.pop("Reuses-v0")


def python_in_readme(heading):
    """The Python under a heading of README.md."""
    text = SOURCE.with_name("README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text.split(f"## {heading}")[1], re.DOTALL)[1]


def test_readmes_own_environment_trains_in_under_30_lines(in_tmp, monkeypatch, capsys):
    code = python_in_readme("Train your own environment")
    assert len(code.splitlines()) < 30
    (in_tmp / "my_game.py").write_text(code)
    monkeypatch.syspath_prepend(str(in_tmp))
    flags = "--env my_game:Walk --num-envs 16 --num-steps 32 --minibatch-size 128"
    assert thrust.main([*flags.split(), "--total-steps", "20480", "--eval-episodes", "20"]) == 0
    assert "evaluation: mean return 1.0 ± 0.0 over 20 episodes" in capsys.readouterr().out


def test_readmes_use_of_a_trained_policy_works(undisturbed, monkeypatch):
    _, result = undisturbed
    monkeypatch.chdir(result.run.parent.parent)
    exec(python_in_readme("Use a trained policy"), {})


def test_gymnasiums_wrappers_accept_a_cartpole_made_as_readme_shows():
    gym = oracle("gymnasium")
    names = {}
    exec(python_in_readme("Gymnasium's wrappers"), names)
    env = gym.wrappers.vector.RecordEpisodeStatistics(names["C"](4))
    env.reset(seed=0)
    lengths = []
    for _ in range(100):
        _, _, terminated, truncated, info = env.step(np.zeros(4, np.int64))
        lengths += (
            info["episode"]["l"][terminated | truncated].tolist() if "episode" in info else []
        )
    assert lengths and all(
        7 <= length <= 12 for length in lengths
    )  # always left: falls at once


def test_a_device_that_is_not_there_is_one_sentence(in_tmp, capsys):
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    assert thrust.main(["--device", missing]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith(f"thrust: device {missing} cannot be used") and error.count("\n") == 1
    )


# --- several processes that train together


def torchrun(*flags):
    """Starts training on two ranks in the current folder; their output can be read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launcher, f"--master-port={port}", str(SOURCE), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to kill")
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed"
)
def test_two_ranks_train_one_policy_and_go_on_after_a_kill(in_tmp):
    flags = "--num-envs 4 --num-steps 16 --minibatch-size 32 --total-steps 5120 --norm-obs"
    flags += " --norm-reward --target-kl 0.002 --eval-episodes 4 --checkpoint-every 3"
    whole = torchrun(*flags.split())
    out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("training CartPole: 40 updates of 128 steps")
    config, (first, second) = thrust.load_checkpoint("runs/CartPole-0")
    assert torch.equal(first["tensors"]["weights"], second["tensors"]["weights"])
    assert torch.equal(first["tensors"]["obs_sums"], second["tensors"]["obs_sums"])
    assert first["tensors"]["obs_sums"][0, 0] == 2 * 4 * (1 + 16 * 40)  # both ranks' counts
    assert not torch.equal(first["envs"]["seed"], second["envs"]["seed"])
    rows = rows_without_clock(in_tmp / "runs/CartPole-0")
    assert [int(row["steps"]) for row in rows] == [128 * (i + 1) for i in range(40)]
    assert any(int(row["gradient_steps"]) < 8 for row in rows)  # target_kl ended some, on both
    assert [s["steps"] for s in first["snapshots"]][::7] == [0, 5120]
    assert (in_tmp / "runs/CartPole-0/page.html").exists()
    with pytest.raises(ValueError, match="was trained by 2 ranks, and not 1"):
        thrust.train(config, resume="runs/CartPole-0")

    killed, log = torchrun(*flags.split()), in_tmp / "runs/CartPole-0-2/log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 10:
        assert killed.poll() is None
        time.sleep(0.001)
    killed.terminate()  # torchrun passes it on
    killed.communicate(timeout=60)
    assert len(log.read_text().splitlines()) < 41
    resumed = torchrun("--resume", "runs/CartPole-0-2")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert out.splitlines()[-2:] == lines[-2:]
    assert rows_without_clock(in_tmp / "runs/CartPole-0-2") == rows


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """What training with the defaults gives: (result, lines of output)."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(tmp_path_factory.mktemp("solved"))
        result = thrust.train(thrust.Config(seed=7))
        return result._replace(run=result.run.absolute()), output.getvalue().splitlines()


def test_the_defaults_solve_cartpole(solved):
    result, lines = solved
    assert result.evaluation.mean == 500.0 and len(result.evaluation.returns) == 100
    assert [line for line in lines if line.startswith("passed 195, the bar of CartPole-v0")]
    assert [line for line in lines if line.startswith("passed 475, the bar of CartPole-v1")]
    assert lines[-3] == f"page: {os.path.join('runs', 'CartPole-7', 'page.html')}"
    assert lines[-2] == "evaluation: mean return 500.0 ± 0.0 over 100 episodes"
    assert lines[-1] == f"weights: {thrust.weights_hash(result.policy)}"


# ==============================================================================================
# 8. Command line
# ==============================================================================================


def test_every_knob_is_a_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as done:
        thrust.main(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(thrust.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"] in text
    assert "(default: 64 64)" in text and "(default: 0.006)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--num-envs many", "argument --num-envs: invalid int value: 'many'"),
        ("--num-envs 0", "num_envs = 0 is not allowed: it must be a whole number, at least 1"),
        ("--gamma nan", "gamma = nan is not allowed"),
        ("--seed", "argument --seed: expected one argument"),
        ("--num-env 4", "unrecognized arguments: --num-env 4"),
        ("--resume a --evaluate b", "not allowed with argument"),
        ("--evaluate a --watch b", "not allowed with argument"),
        ("--watch a --seed 3", "--watch RUN takes no other flag"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, message, in_tmp, capsys):
    with pytest.raises(SystemExit) as done:
        thrust.main(flags.split())
    error = capsys.readouterr().err
    assert done.value.code == 2 and message in error and error.count("\n") == 1
    assert list(in_tmp.iterdir()) == []


def test_other_failures_are_one_line_and_exit_code_1(in_tmp, capsys):
    assert thrust.main(["--resume", "nowhere"]) == 1
    (in_tmp / "runs").write_text("a file where the folder should be")
    assert thrust.main(["--total-steps", "2048"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("thrust: ") for line in errors)


def test_flags_reach_the_run_and_a_run_can_be_evaluated(in_tmp, capsys):
    flags = "--num-envs 4 --num-steps 8 --minibatch-size 16 --total-steps 64 --hidden 8 8 8"
    assert thrust.main([*flags.split(), "--no-anneal", "--eval-episodes", "3"]) == 0
    trained = capsys.readouterr().out.splitlines()[-2:]
    config, _ = thrust.load_checkpoint("runs/CartPole-0")
    assert (config.hidden, config.anneal, config.num_envs) == ((8, 8, 8), False, 4)
    assert thrust.main(["--evaluate", "runs/CartPole-0"]) == 0
    assert capsys.readouterr().out.splitlines() == trained
    assert thrust.main(["--resume", "runs/CartPole-0"]) == 0  # nothing left: it evaluates again
    assert capsys.readouterr().out.splitlines()[-2:] == trained


# ==============================================================================================
# 9. Page
# ==============================================================================================


def test_policy_json_played_with_numpy_alone_is_the_policy(solved, in_tmp, capsys):
    spaces = ["test_thrust:TwoChoices", "CartPole"]
    spaces += ["Pendulum-v1", "FrozenLake-v1"] if importlib.util.find_spec("gymnasium") else []
    for env in spaces:
        trained("--env", env, *["--norm-obs"] * (env != "FrozenLake-v1"))
    runs = [solved[0].run, *sorted(in_tmp.glob("runs/*"))]
    assert len(runs) == 1 + len(spaces)
    for run in runs:
        policy, text = thrust.load(run), (run / "policy.json").read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity
        obs = np.random.default_rng(0).normal(size=(20, *policy.observation_space.shape))
        x = obs.reshape(20, -1)
        if content["observation"]["kind"] == "Discrete":
            obs = np.arange(content["observation"]["n"])
            x = np.eye(len(obs))
        if (norm := content["normalisation"]) is not None:
            x = (x - norm["mean"]) / norm["std"]
            x = np.clip(x, -norm["clip"], norm["clip"])
        flat = policy._flat(torch.as_tensor(obs))
        for name in ("actor", "critic"):
            outputs = x
            for layer in content[name]:
                outputs = outputs @ np.transpose(layer["weight"]) + layer["bias"]
                outputs = np.tanh(outputs) if layer["activation"] == "tanh" else outputs
            expected = getattr(policy, name)(flat).detach().numpy()
            np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        assert content["action"]["kind"] == policy.kinds[1]
        if policy.kinds[1] == "Box":
            assert content["log_std"] == policy.log_std.tolist()
            assert content["action"]["high"] == policy.action_space.high.tolist()
        origin, (config, (state,)) = content["provenance"], thrust.load_checkpoint(run)
        assert origin["weights"] == thrust.weights_hash(policy)
        assert origin["steps"] == state["rows"][-1]["steps"]
        assert thrust.Config(**origin["config"]) == config
    assert f"# Thrust {origin['thrust']}, MIT licence" in SOURCE.read_text(encoding="utf-8")


def run_data(page):
    """The data in a page."""
    return json.loads(re.search(r"const run = (.*), \{log,", page.read_text("utf-8"))[1])


def test_snapshots_are_spread_over_training_and_end_with_the_policy(solved):
    result, _ = solved
    data = run_data(result.run / "page.html")
    assert [p["steps"] // 2048 for p in data["policies"]] == [0, 14, 28, 42, 55, 69, 83, 97]
    _, (state,) = thrust.load_checkpoint(result.run)
    assert torch.equal(state["snapshots"][-1]["weights"], state["tensors"]["weights"])
    with thrust.EnvPool(thrust.CartPole, 64, 0) as envs:
        untrained = thrust.Learner(thrust.Config(seed=7), envs)
    torch.testing.assert_close(state["snapshots"][0]["weights"], untrained.optimizer.weights)


def test_a_page_holds_no_more_of_a_long_log_than_can_be_seen(in_tmp):
    result = thrust.train(small())
    config, (state,) = thrust.load_checkpoint(result.run)
    rows = [{**state["rows"][-1], "update": i, "steps": i} for i in range(1, 2001)]
    thrust.save_checkpoint(result.run, config, {**state, "rows": rows})
    page = thrust.write_page(result.run)
    steps = run_data(page)["log"]["steps"]
    assert len(steps) == thrust.ROWS_ON_PAGE and (steps[0], steps[-1]) == (1, 2000)


def test_names_cannot_end_the_pages_script(in_tmp, monkeypatch):
    result = thrust.train(small())
    config, (state,) = thrust.load_checkpoint(result.run)
    monkeypatch.setattr(thrust, "load", lambda run: result.policy)
    evil = dataclasses.replace(config, env="</script><script>alert(1)</script>RUN_DATA")
    thrust.save_checkpoint(result.run, evil, state)
    page = thrust.write_page(result.run)
    assert page.read_text("utf-8").count("</script>") == 1
    assert run_data(page)["name"] == f"{evil.env}, seed 0"


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no browser named by BROWSER")
def test_watch_writes_the_page_of_any_run_and_opens_it(in_tmp):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thrust, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a run that did not end
            thrust.train(small())
    browser, opened = in_tmp / "browser", in_tmp / "opened"
    browser.write_text(f'#!/bin/sh\necho noise; echo noise >&2; echo "$1" > {opened}\n')
    browser.chmod(0o755)
    run, page = os.path.join("runs", "CartPole-0"), in_tmp / "runs" / "CartPole-0" / "page.html"
    # A browser, and none
    for there, path in ((browser, os.environ["PATH"]), ("", "/nowhere")):
        page.unlink(missing_ok=True)
        environment = {**os.environ, "BROWSER": str(there), "PATH": path, "DISPLAY": ""}
        watch = subprocess.run(
            command("--watch", run), capture_output=True, text=True, env=environment
        )
        told = f"page: {os.path.join(run, 'page.html')}\n"
        assert (watch.returncode, watch.stdout, watch.stderr) == (0, told, "")
        assert run_data(page)["summary"] == "Not finished: update 6 of 6"
    assert opened.read_text().strip() == page.as_uri()


def test_watching_what_is_no_run_is_one_sentence(in_tmp, capsys):
    assert thrust.main(["--watch", "nowhere"]) == 1
    error = capsys.readouterr().err
    assert error == "thrust: nowhere holds no checkpoint.pt: give the folder of a run\n"


# --- in a browser


class Browser:
    """A headless Chromium, showing one page at a time."""

    def __init__(self, webdriver, profile):
        options, service = webdriver.ChromeOptions(), webdriver.ChromeService()
        options.binary_location = shutil.which("chromium")
        service.path = shutil.which("chromedriver")
        quiet = "disable-gpu disable-quic no-first-run disable-background-networking"
        for flag in f"headless=new no-sandbox {quiet} disable-component-update".split():
            options.add_argument("--" + flag)
        options.add_argument("--disable-sync")
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=service)
        self.js = self.driver.execute_script

    def open(self, page, width=1280, scheme="light", motion="no-preference"):
        """Opens a page anew, in a window of some width."""
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in media.items()]
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.complaints(), self.requests()
        self.driver.get(page.as_uri())

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """The addresses asked for since this was last called."""
        events = (
            json.loads(e["message"])["message"] for e in self.driver.get_log("performance")
        )
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def element(self, id):
        return self.driver.find_element("id", id)

    def text(self, id):
        return self.element(id).text

    def press(self, *keys, at="body"):
        self.js("document.activeElement.blur()")
        self.driver.find_element("css selector", at).send_keys(*keys)

    def wait(self, script):
        """Waits until JavaScript says yes."""
        for _ in range(500):
            if self.js("return " + script):
                return
            time.sleep(0.02)
        raise AssertionError(f"never: {script}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = oracle("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        missing = "needs a browser: apt-get install chromium chromium-driver"
        assert not os.environ.get("THRUST_ALL_TESTS"), missing
        pytest.skip(missing)
    browser = Browser(webdriver, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


def test_in_the_browser_the_physics_are_those_of_cartpole(solved, browser):
    browser.open(solved[0].run / "page.html")
    env, before, actions = poles_anywhere(2000)
    terminated = env.step(actions)[2]
    script = "const [s, a] = arguments; return s.map((x, i) => thrust.step(x, a[i] ? 10 : -10))"
    after = np.array(browser.js(script, before.tolist(), actions.tolist()))
    fell = browser.js("return arguments[0].map(thrust.fallen)", after.tolist())
    assert same(np.array(fell), terminated) and 0 < terminated.sum() < 1000
    difference = np.abs(after - env.state()["state"])[~terminated]
    assert difference.max() < 1e-12


STARTS = np.random.default_rng(1).uniform(-0.05, 0.05, (100, 4))


def played(policy, steps):
    """Plays from STARTS: (states before each step and at the end, actions, steps survived)."""
    env = thrust.CartPole(100)
    obs, _ = env.reset(seed=0)
    env.set_state({**env.state(), "state": STARTS})
    obs, states, actions = STARTS.astype(np.float32), [STARTS], []
    survived, alive = np.zeros(100), np.ones(100, bool)
    for _ in range(steps):
        actions.append(policy.act(obs, greedy=True)[0].numpy())
        obs, _, terminated, _, _ = env.step(actions[-1])
        survived += alive
        alive &= ~terminated
        states.append(env.state()["state"])
    return np.array(states), np.array(actions), survived


def test_running_free_fifty_steps_in_the_browser_agree(solved, browser):
    browser.open(solved[0].run / "page.html")
    states, actions, survived = played(solved[0].policy, 50)
    assert (survived == 50).all()
    script = """const [starts, actions] = arguments; return starts.map((state, i) => {
        for (const a of actions) state = thrust.step(state, a[i] ? 10 : -10);
        return state; })"""
    reached = np.array(browser.js(script, STARTS.tolist(), actions.tolist()))
    assert np.abs(reached - states[-1]).max() < 1e-9


def snapshot_policies(run):
    """The policies of a CartPole run's snapshots."""
    config, (state,) = thrust.load_checkpoint(run)
    for snapshot in state["snapshots"]:
        policy = thrust.load(run)
        nn = torch.nn.utils
        nn.vector_to_parameters(snapshot["weights"], policy.parameters())
        mean, std = snapshot["mean"], snapshot["std"]
        if config.norm_obs:
            policy.normalizer = lambda x, m=mean, s=std: ((x - m) / s).clamp(-10, 10)
        yield policy


def test_in_the_browser_every_snapshot_has_the_policys_probabilities(solved, browser, in_tmp):
    trained("--norm-obs", "--hidden", "16", "8", "24")
    for run, number in ((solved[0].run, 8), (in_tmp / "runs/CartPole-0", 4)):
        browser.open(run / "page.html")
        states = np.random.default_rng(2).uniform(-1, 1, (200, 4)) * [2.4, 3, 0.21, 3]
        script = (
            "return arguments[0].map((s) => thrust.think(thrust.policies[arguments[1]], s))"
        )
        policies = list(snapshot_policies(run))
        assert len(policies) == number == browser.js("return thrust.policies.length")
        for i, policy in enumerate(policies):
            # a function of its own, as `arguments` in an arrow function are the outer ones
            thoughts = browser.js(script, states.tolist(), i)
            expected = policy.actor(policy._flat(states)).softmax(-1).detach().numpy()
            got = np.array([thought["probabilities"] for thought in thoughts])
            assert np.abs(got - expected).max() < 1e-5
            value = policy.value(states).detach().numpy()
            np.testing.assert_allclose([t["value"] for t in thoughts], value, 1e-4, 1e-4)
            greedy = policy.act(states, greedy=True)[0].numpy()
            sure = np.abs(expected[:, 0] - 0.5) > 1e-5
            assert (np.array([t["action"] for t in thoughts]) == greedy)[sure].all()


def test_in_the_browser_policies_balance_as_often_and_learn_it(solved, browser):
    browser.open(solved[0].run / "page.html", motion="reduce")
    script = """const [policy, starts] = arguments; return starts.map((state) => {
        thrust.begin();
        Object.assign(thrust.live, {policy: thrust.policies[policy], state});
        thrust.live.thought = thrust.think(thrust.live.policy, state);
        while (thrust.live.steps < 500 && !thrust.fallen(thrust.live.state)) thrust.advance();
        return thrust.live.steps; })"""
    policies = list(snapshot_policies(solved[0].run))
    for i in (0, 1, 7):
        in_python = played(policies[i], 500)[2]
        in_browser = np.array(browser.js(script, i, STARTS.tolist()))
        stood = [(survived == 500).sum() for survived in (in_python, in_browser)]
        assert stood[0] == stood[1]
        assert abs(in_python.mean() - in_browser.mean()) < 5
        if i == 0:
            assert stood == [0, 0]
        if i == 7:
            assert min(stood) >= 99


def test_the_page_asks_for_nothing_and_complains_of_nothing(solved, browser, in_tmp, capsys):
    trained("--env", "test_thrust:Stateless")
    for run in (solved[0].run, in_tmp / "runs/test_thrust-Stateless-0"):
        page = run / "page.html"
        assert page.stat().st_size < 500_000
        for width, scheme in ((1280, "light"), (360, "dark")):
            browser.open(page, width, scheme)
            time.sleep(0.3)
            assert browser.requests() == [page.as_uri()] and browser.complaints() == []
            needed = browser.js("return document.documentElement.scrollWidth")
            assert needed <= browser.js("return innerWidth") == width
            paper = browser.js("return getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_buttons_and_keys_do_what_they_say(solved, browser):
    browser.open(solved[0].run / "page.html")
    began = time.monotonic()
    browser.wait("thrust.live.steps > 5")
    browser.press(" ")
    state, steps = browser.js("return [thrust.live.state, thrust.live.steps]")
    assert steps <= (time.monotonic() - began) * 50 + 10  # not faster than life
    assert browser.text("pause") == "Play" and browser.text("status") == f"step {steps}"
    time.sleep(0.1)
    assert browser.js("return thrust.live.steps") == steps
    shown = [dd.text for dd in browser.driver.find_elements("css selector", "#numbers dd")]
    assert shown[:4] == [f"{x:.3f}" for x in state]
    assert sum(map(float, shown[4:6])) == pytest.approx(1, abs=0.002) and float(shown[6]) > 10

    def one_step(*way):
        """Goes one step, and returns the force that this took."""
        before, thought = browser.js("return [thrust.live.state, thrust.live.thought]")
        for act in way:
            act()
        after = browser.js("return thrust.live.state")
        forces = [
            force
            for force in range(-90, 91, 10)
            if browser.js("return thrust.step(...arguments)", before, force) == after
        ]
        assert len(forces) == 1
        return forces[0] - (10 if thought["action"] else -10)

    def click(id):
        return browser.element(id).click

    def key(*keys):
        return lambda: browser.press(*keys)

    left, right = "\ue012", "\ue014"
    assert one_step(click("step")) == 0
    assert one_step(key("s")) == 0
    assert one_step(key(right), key("s")) == 40
    assert one_step(key(left), click("step")) == -40
    assert one_step(click("right"), click("right"), key("s")) == 80
    assert one_step(click("left"), click("step")) == -40
    assert browser.js("return thrust.live.steps") == steps + 6
    for again in (key("r"), click("again")):
        again()
        start, now = browser.js("return [thrust.live.state, thrust.live.steps]")
        assert now == 0 and max(map(abs, start)) < 0.05 and start != state
        one_step(key("s"))
    for go in (key(" "), click("pause")):
        go()
        assert browser.text("pause") == "Pause"
        now = browser.js("return thrust.live.steps")
        browser.wait(f"thrust.live.steps > {now}")
        click("pause")()
        assert browser.text("pause") == "Play"
    browser.press(" ", at="#pause")  # presses the button, and is not obeyed a second time
    assert browser.text("pause") == "Pause"
    assert browser.complaints() == []


def test_the_slider_goes_back_to_a_policy_that_falls(solved, browser):
    browser.open(solved[0].run / "page.html")
    assert browser.text("age") == "198,656"
    browser.press("\ue011", at="#policy")  # Home
    assert browser.text("age") == "0"
    browser.wait("document.getElementById('status').textContent.startsWith('fell at step ')")
    browser.wait("!thrust.fallen(thrust.live.state)")  # and then begins anew
    browser.press("\ue014", at="#policy")  # an arrow here moves the slider, and not the cart
    assert browser.text("age") == "28,672" and browser.js("return thrust.live.push") == 0


def test_where_motion_is_to_be_reduced_the_pole_waits(solved, browser):
    browser.open(solved[0].run / "page.html", motion="reduce")
    time.sleep(0.1)
    assert browser.js("return thrust.live.steps") == 0 and browser.text("pause") == "Play"


def test_the_curve_can_be_read_with_pointer_and_keys(solved, browser):
    browser.open(solved[0].run / "page.html")
    rows, chart = solved[0].rows, browser.element("chart")
    labels = [text.text for text in chart.find_elements("css selector", "text")]
    assert {"environment steps", "mean return", "195 solves CartPole-v0"} <= set(labels)
    assert browser.text("at") == "198,656 steps: 500"
    browser.press("\ue011", at="#chart")  # Home
    assert browser.text("at") == f"2,048 steps: {rows[0]['mean_return']:.4g}"
    assert chart.get_attribute("aria-valuenow") == "0"
    browser.press("\ue014", "\ue014", "\ue012", at="#chart")
    assert browser.text("at").startswith("4,096 steps: ")
    assert browser.js("return thrust.live.push") == 0
    mouse = importlib.import_module("selenium.webdriver").ActionChains(browser.driver)
    mouse.move_to_element(chart).perform()
    assert 80_000 < int(browser.text("at").split()[0].replace(",", "")) < 120_000
    for column in ("approx_kl", "entropy", "explained_variance", "clip_fraction"):
        browser.driver.find_element("css selector", f"option[value={column}]").click()
        assert column.replace("_", " ") in browser.element("chart").text
        assert thrust.COLUMNS[column] in browser.text("meaning")
        assert "CartPole-v0" not in browser.element("chart").text
    assert browser.complaints() == []


def test_the_page_of_another_environment_has_its_curve_and_no_pole(browser, in_tmp):
    gym = oracle("gymnasium")
    trained("--env", "Acrobot-v1", "--total-steps=3072")
    browser.open(in_tmp / "runs/Acrobot-v1-0/page.html")
    assert not browser.element("live").is_displayed()
    assert browser.text("name") == "Acrobot-v1, seed 0"
    threshold = gym.spec("Acrobot-v1").reward_threshold
    assert f"{threshold:g} solves Acrobot-v1" in browser.element("chart").text
    browser.press("\ue011", at="#chart")  # Home: no episode has ended yet
    assert browser.text("at") == "128 steps: none yet"
    path = browser.driver.find_element("css selector", ".curve").get_attribute("d")
    assert path.startswith("M") and "NaN" not in path
    assert browser.text("summary").startswith("Evaluation: mean return -")
    assert browser.complaints() == []


# ==============================================================================================
# Files and numbers: nothing is lost, and nothing wrong is believed (parts 1, 6 and 7)
# ==============================================================================================


def in_a_process(call, *arguments, **options):
    """Calls a function of this module in a process of its own; returns that, finished."""
    code = f"import test_thrust; test_thrust.{call.__name__}(*{arguments!r})"
    path = {"PYTHONPATH": str(SOURCE.parent), "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | path, **options,
    )  # fmt: skip


def some_state(config):
    with thrust.EnvPool(thrust.CartPole, config.num_envs, 0) as envs:
        learner = thrust.Learner(config, envs)
        learner.begin()
        return learner.state()


def kill_while_saving(kills):
    """Kills processes that save checkpoints in a loop, each as far as the loop has come."""
    torch.set_num_threads(1)
    config, rng, run, last = small(), random.Random(), pathlib.Path("."), 0
    state, full = some_state(config), 0
    thrust.save_checkpoint(run, config, {**state, "update": 0})
    size = len(state["tensors"]["weights"])
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            for i in itertools.count(last):
                tensors = state["tensors"] | {"weights": torch.full([size], float(i))}
                thrust.save_checkpoint(run, config, state | {"update": i, "tensors": tensors})
        time.sleep(rng.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        full += pathlib.Path("checkpoint.tmp").exists()
        _, (loaded,) = thrust.load_checkpoint(run)
        assert last <= loaded["update"]
        last = loaded["update"]
        assert last == 0 or (loaded["tensors"]["weights"] == last).all()
    print(last, full)


@slow
def test_killed_while_it_is_saved_a_checkpoint_is_the_old_or_the_new_one(in_tmp):
    done = in_a_process(kill_while_saving, 100)
    assert done.returncode == 0, done.stderr
    saves, torn = map(int, done.stdout.split())
    assert saves > 50 and torn > 10  # temporary files: they were killed in the middle


def train_and_be_killed(kills, updates):
    """A run of `updates`, killed `kills` times on the way, its workers 0, 1, 2, 0 and so on."""
    rng, log, nothing = random.Random(), pathlib.Path("runs/CartPole-0/log.csv"), os.devnull
    config, seen, run = killed_config(updates), 0, None
    thrust.EnvPool = functools.partial(thrust.EnvPool, start_method="fork")  # sooner started
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            with open(nothing, "w") as sys.stdout:
                thrust.train(dataclasses.replace(config, workers=kill % 3), resume=run)
            os._exit(0)
        goal = seen + rng.randint(1, updates // kills)
        while kill < kills and (lines(log) <= goal or lines(log) < seen):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        if kill < kills:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status == (signal.SIGKILL if kill < kills else 0), (kill, status)
        run = log.parent
        seen = len(thrust.load_checkpoint(run)[1][0]["rows"])
        print(kill, seen, flush=True)


def killed_config(updates):
    return small(total_steps=8 * 16 * updates, checkpoint_every=3, norm_obs=True)


def lines(log):
    return len(log.read_bytes().splitlines()) if log.exists() else 0


@slow
def test_killed_twenty_times_a_run_is_bit_for_bit_the_run_that_was_not(in_tmp):
    done = in_a_process(train_and_be_killed, 20, 200)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, run = thrust.train(killed_config(200)), in_tmp / "runs" / "CartPole-0"
    assert rows_without_clock(run) == rows_without_clock(whole.run)
    (ours,), (theirs,) = (thrust.load_checkpoint(r)[1] for r in (run, whole.run))
    assert thrust.weights_hash(thrust.load(run)) == thrust.weights_hash(whole.policy)
    assert equal(ours["snapshots"], theirs["snapshots"]) and len(ours["snapshots"]) == 8
    assert equal(ours["tensors"], theirs["tensors"]) and equal(ours["envs"], theirs["envs"])
    assert ours["evaluation"] == theirs["evaluation"]


def equal(a, b):
    """Whether two things made of dicts, lists, tensors and numbers are the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- a full disk


def disk_is_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("recovers", [True, False])
def test_on_a_full_disk_training_goes_on_and_warns_once(recovers, in_tmp, capsys, monkeypatch):
    update, space, logged = thrust.ppo_update, thrust.os.fsync, thrust.Report.write_log

    def fill(policy, optimizer, *arguments):
        done = int(optimizer.steps) // 8  # gradient steps per update
        full = done >= 2 and not (recovers and done >= 5)
        monkeypatch.setattr(thrust.os, "fsync", disk_is_full if full else space)
        monkeypatch.setattr(thrust.Report, "write_log", disk_is_full if full else logged)
        return update(policy, optimizer, *arguments)

    monkeypatch.setattr(thrust, "ppo_update", fill)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in vars(small()).items() if type(v) is int]
    assert thrust.main(flags) == (0 if recovers else 1)
    out, err = capsys.readouterr()
    warning, *error = err.splitlines()
    assert warning.endswith("No space left on device; training goes on, to try again later")
    assert out.splitlines()[-1].startswith("weights: ") and "evaluation: mean" in out
    run = in_tmp / "runs" / "CartPole-0"
    _, (state,) = thrust.load_checkpoint(run)
    assert state["update"] == (6 if recovers else 2) and not list(run.glob("*.tmp"))
    assert len(rows_without_clock(run)) == (6 if recovers else 2)
    if recovers:
        assert error == []
    else:
        assert len(error) == 1 and error[0].startswith("thrust: runs")
        assert all(name in error[0] for name in ("checkpoint.pt", "log.csv", "page.html"))
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    resumed, whole = thrust.train(small(), resume=run), thrust.train(small())
    assert thrust.weights_hash(resumed.policy) == thrust.weights_hash(whole.policy)
    assert rows_without_clock(run) == rows_without_clock(whole.run)


def train_with_little_space(recovers):
    """After 20 updates no file may be longer than 6,000 bytes, for ten more or for good.
    The kernel then writes a part of what it is given, and refuses the rest."""
    import resource

    update = thrust.ppo_update
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(policy, optimizer, *arguments):
        done = int(optimizer.steps) // 8
        if done == 20 or (done == 30 and recovers):
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000 if done == 20 else hard, hard))
        return update(policy, optimizer, *arguments)

    thrust.ppo_update = limit
    sys.exit(thrust.main(flags_of(small(total_steps=8 * 16 * 40))))


@slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("recovers", [True, False])
def test_a_log_that_was_written_in_part_is_whole_again(recovers, undisturbed, in_tmp):
    done = in_a_process(train_with_little_space, recovers)
    run, rows = in_tmp / "runs" / "CartPole-0", rows_without_clock(undisturbed[1].run)
    assert done.returncode == (0 if recovers else 1)
    assert len(done.stderr.splitlines()) == (1 if recovers else 2)
    assert "File too large; training goes on" in done.stderr
    if recovers:
        assert rows_without_clock(run) == rows
        assert thrust.load_checkpoint(run)[1][0]["update"] == 40
    else:
        assert (run / "log.csv").stat().st_size == 6000
        assert thrust.load_checkpoint(run)[1][0]["update"] == 20
        resumed = thrust.train(undisturbed[0], resume=run)
        assert thrust.weights_hash(resumed.policy) == thrust.weights_hash(undisturbed[1].policy)
        assert rows_without_clock(run) == rows


@slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_training_survives_that_its_output_cannot_be_written(in_tmp):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(*flags_of(small())), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert thrust.load_checkpoint("runs/CartPole-0")[1][0]["update"] == 6
    assert len(rows_without_clock(in_tmp / "runs/CartPole-0")) == 6


@contextlib.contextmanager
def read_only(folder):
    """As somebody who may not write there: for root, no folder is read-only."""
    root = os.geteuid() == 0
    os.chmod(folder, 0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        os.chmod(folder, 0o755)


def a_file(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text("not a folder")


def a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.skipif(os.name == "nt", reason="permissions are others on Windows")
@pytest.mark.parametrize(
    ("spoil", "path", "resume", "sentence"),
    [
        (a_file, "runs", False, "File exists: 'runs'"),
        (read_only, "runs", False, "Permission denied: 'runs/CartPole-0-2'"),
        (a_file, "runs/CartPole-0", True, "holds no checkpoint.pt: give the folder of a run"),
        (a_folder, "runs/CartPole-0/checkpoint.pt", True, "holds no checkpoint.pt"),
        (a_folder, "runs/CartPole-0/checkpoint.tmp", True, "Is a directory: "),
        (
            a_folder,
            "runs/CartPole-0/log.csv",
            True,
            "Is a directory: 'runs/CartPole-0/log.csv'",
        ),
        (read_only, "runs/CartPole-0", True, "Permission denied: 'runs/CartPole-0/"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_training(
    spoil, path, resume, sentence, in_tmp, capsys, monkeypatch
):
    thrust.train(small())
    capsys.readouterr()
    monkeypatch.setattr(thrust.Learner, "collect", lambda self: pytest.fail("it began"))
    spoiled = spoil(in_tmp / path) or contextlib.nullcontext()
    in_tmp.chmod(0o755)
    with spoiled:
        assert thrust.main(["--resume", "runs/CartPole-0"] if resume else []) == 1
    out, err = capsys.readouterr()
    assert err.startswith("thrust: ") and sentence in err and err.count("\n") == 1
    assert "steps/s" not in out


# --- what is no checkpoint, or not the one that was saved


@pytest.fixture
def saved(in_tmp):
    """A small checkpoint: its path and its content."""
    config = small(hidden=(4,), num_envs=2, num_steps=4, minibatch_size=8, total_steps=16)
    path = thrust.train(config).run.absolute() / "checkpoint.pt"
    return path, path.read_bytes()


def forge(path, content):
    """Puts bytes, or what torch is to save, there with a digest that matches."""
    if not isinstance(content, bytes):
        memory = io.BytesIO()
        torch.save(content, memory)
        content = memory.getvalue()
    path.write_bytes(content + hashlib.sha256(content).digest())


def mutated(content, rng):
    """The same bytes but for a change: a bit, a byte, two swapped, a slice, the length."""
    data, i, j = bytearray(content), rng.randrange(len(content)), rng.randrange(len(content))
    kind = rng.randrange(6)
    if kind <= 1:
        data[i] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[i], data[j] = data[j], data[i]
    elif kind == 3:
        data[i : i + 64] = rng.randbytes(len(data[i : i + 64]))
    elif kind == 4:
        data[min(i, j) : max(i, j)] = b""
    else:
        data[i:i] = rng.randbytes(rng.randrange(1, 64))
    return bytes(data)


def test_of_1500_mutations_none_is_accepted(saved):
    (path, content), rng, tried = saved, random.Random(0), 0
    while tried < 1500:
        data = mutated(content, rng)
        if data == content:  # two equal bytes were swapped
            continue
        tried += 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a checkpoint that can be loaded"):
            thrust.load_checkpoint(path.parent)
    path.write_bytes(content)
    assert thrust.load_checkpoint(path.parent)


def test_mutations_with_a_digest_that_matches_are_data_or_one_sentence(saved):
    (path, content), rng, refused = saved, random.Random(1), 0
    for _ in range(300):
        forge(path, mutated(content[:-32], rng))
        try:
            thrust.load(path.parent)
            thrust.write_page(path.parent)
        except (ValueError, RuntimeError) as error:
            assert "\n" not in str(error)
            refused += 1
    assert 50 < refused < 300


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def bomb():
    """An archive of a few kilobytes that declares a hundred megabytes."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]" + b"K\x00a" * 33_000_000 + b".")
        archive.writestr("archive/version", b"3\n")
    return memory.getvalue()


def older(path):
    """A checkpoint as torch saved it, without a digest."""
    torch.save({"format": 2, "config": {}, "ranks": []}, path)


@pytest.mark.parametrize(
    ("put", "sentence"),
    [
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "damaged"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000)), "damaged"),
        (lambda path: path.write_bytes(random.Random(0).randbytes(20_000)), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "damaged"),
        (older, "damaged, or of another version of Thrust"),
        (lambda path: path.unlink(), "holds no checkpoint.pt"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "holds no checkpoint.pt"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "holds no checkpoint.pt"),
        (lambda path: forge(path, b""), "File is not a zip file"),
        (lambda path: forge(path, pickle.dumps({"format": 3})), "File is not a zip file"),
        (lambda path: forge(path, bomb()), "it would unpack to more than its own size"),
        (lambda path: forge(path, {"format": 99}), "its format is 99, and not 3"),
        (lambda path: forge(path, {"format": 3, "evil": Evil()}), "Weights only load failed"),
        (lambda path: forge(path, [1, 2]), "list indices must be integers"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_one_sentence_and_not_run(put, sentence, saved, capsys):
    path, _ = saved
    put(path)
    for flag in ("--resume", "--evaluate", "--watch"):
        capsys.readouterr()
        assert thrust.main([flag, str(path.parent)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("thrust: ") and err.count("\n") == 1
        assert sentence in err
    assert not pathlib.Path("executed").exists()


def at(*keys):
    """Something that replaces what is at these keys by what a function makes of it."""

    def replace(content, function):
        for key in keys[:-1]:
            content = content[key]
        if function is None:
            del content[keys[-1]]
        else:
            content[keys[-1]] = function(content[keys[-1]])

    return replace


STATE = "ranks", 0
TENSORS = *STATE, "tensors"


@pytest.mark.parametrize(
    ("place", "change", "named"),
    [
        (at("config", "gamma"), lambda _: 2.0, "gamma = 2.0 is not allowed"),
        (at("config"), lambda c: {**c, "speed": 1}, "unexpected keyword argument 'speed'"),
        (at("config"), lambda _: None, "must be a mapping, not NoneType"),
        (at("config"), None, "config"),
        (at("config", "hidden"), lambda _: (5,), "tensors.weights"),
        (at("config", "num_envs"), lambda _: 3, "tensors.obs"),
        (at("config", "env"), lambda _: "test_thrust:Stateless", "tensors.weights"),
        (at("ranks"), lambda _: [], "ranks"),
        (at("ranks"), lambda ranks: ranks * 2, "was trained by 2 ranks, and not 1"),
        (at(*STATE), lambda _: 7, "ranks"),
        (at(*STATE, "tensors"), None, "ranks.tensors"),
        (at(*STATE, "update"), lambda _: 1.5, "update"),
        (at(*STATE, "rows"), lambda rows: [{**rows[0], "seconds": "3"}], "rows.seconds"),
        (at(*STATE, "rows", 0, "steps"), None, "ranks.rows.steps"),
        (at(*STATE, "recent"), lambda _: [1.0], "recent"),
        (at(*STATE, "snapshots", 0, "weights"), None, "snapshots.weights"),
        (at(*STATE, "snapshots", 0, "weights"), lambda w: w[:-1], "snapshots.weights"),
        (at(*TENSORS, "weights"), lambda w: w[:-1], "tensors.weights"),
        (at(*TENSORS, "weights"), lambda w: w[:1], "tensors.weights"),
        (at(*TENSORS, "weights"), lambda w: w.double(), "tensors.weights"),
        (at(*TENSORS, "adam_mean"), lambda m: m[:1], "tensors.adam_mean"),
        (at(*TENSORS, "adam_square"), None, "state.tensors.adam_square"),
        (at(*TENSORS, "obs"), lambda obs: obs[:1], "tensors.obs"),
        (at(*STATE, "generators", "actions"), lambda g: g[:-1], "generators.actions"),
        (at(*STATE, "envs", "seed"), lambda seed: seed.float(), "envs.seed"),
        (at(*STATE, "envs"), lambda _: {}, "envs"),
    ],
)
def test_a_forged_checkpoint_is_refused_and_the_field_named(
    place, change, named, saved, capsys
):
    path, _ = saved
    content = torch.load(path, weights_only=True)
    forge(path, content)
    assert thrust.main(["--resume", str(path.parent)]) == 0
    place(content, change)
    forge(path, content)
    capsys.readouterr()
    assert thrust.main(["--resume", str(path.parent)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("thrust: ") and named in err and err.count("\n") == 1


# --- NaN and infinity


class Broken(thrust.CartPole):
    """Returns, from its 40th step on, what a bug or a sensor may return."""

    obs = reward = None

    def __init__(self, num_envs):
        super().__init__(num_envs, max_episode_steps=7)
        self.count = 0

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        self.count += 1
        if self.count > 40:
            if self.obs is not None:
                obs[0, 1] = self.obs
            if self.reward is not None:
                reward = np.full(self.num_envs, self.reward)
        return obs, reward, terminated, truncated, info


class NanObs(Broken):
    obs = np.nan


class InfiniteObs(Broken):
    obs = -np.inf


class NanReward(Broken):
    reward = np.nan


class HugeReward(Broken):
    reward = 1e39  # finite, but not in float32


class LargeReward(Broken):
    reward = 1e25  # finite, but not its square


@pytest.mark.parametrize(
    ("knobs", "update", "quantity"),
    [
        ({"env": "test_thrust:NanObs"}, 3, "obs"),
        ({"env": "test_thrust:InfiniteObs"}, 3, "obs"),
        ({"env": "test_thrust:NanObs", "norm_obs": True}, 3, "obs"),
        ({"env": "test_thrust:NanReward"}, 3, "reward"),
        ({"env": "test_thrust:NanReward", "norm_reward": True}, 3, "reward"),
        ({"env": "test_thrust:HugeReward"}, 3, "reward"),
        ({"env": "test_thrust:LargeReward"}, 3, "value_loss"),
        ({"learning_rate": 1e30}, 1, "policy_loss"),
        ({"learning_rate": 1e300, "epochs": 1, "minibatch_size": 128}, 1, "weights"),
        ({"vf_coef": 1e300}, 1, "policy_loss"),
    ],
)
def test_nan_and_infinity_end_training_at_the_last_good_update(
    knobs, update, quantity, in_tmp, capsys
):
    config = small(**knobs)
    with pytest.raises((RuntimeError, ValueError)) as stopped:
        thrust.train(config)
    message = str(stopped.value)
    assert "\n" not in message and quantity in message and re.search("NaN|finite", message)
    if message.startswith("update"):  # the pool may have found it before
        assert message.startswith(f"update {update}: {quantity} is NaN or infinite")
        assert "learning rate" in message and "--norm-reward" in message
    _, (state,) = thrust.load_checkpoint(next((in_tmp / "runs").iterdir()))
    assert state["update"] == len(state["rows"]) == update - 1
    assert all(torch.isfinite(tensor).all() for tensor in state["tensors"].values())
    assert f"stopped after update {update - 1} of 6" in capsys.readouterr().out


def test_a_loss_that_is_nan_is_told_with_its_update_on_one_line(in_tmp, capsys, monkeypatch):
    original, calls = thrust.ppo_loss, itertools.count()

    def poisoned(*arguments):
        loss, stats = original(*arguments)
        return (loss * math.nan if next(calls) == 8 * 3 + 2 else loss), stats

    monkeypatch.setattr(thrust, "ppo_loss", poisoned)
    assert thrust.main(flags_of(small())) == 1
    assert capsys.readouterr().err.startswith("thrust: update 4: policy_loss is NaN")
    assert thrust.load_checkpoint("runs/CartPole-0")[1][0]["update"] == 3


NO_SIZES = [0, -1, 2.0, "8", None, 10**12, 10**30, math.nan]
NO_REALS = [math.inf, -math.inf, math.nan, -1.0, "x", 10**400]
TINY = [5e-324, 1e-300, 1e-8, np.float32(0.25)]
HUGE = [1, 1e30, 1e307]
KNOBS = {  # values that should do, and values that cannot be
    "env": (["test_thrust:TwoChoices", "test_thrust:Stateless"], ["", 3, "no:where", "a\0b"]),
    "seed": ([1, 10**18, 2**64], [10**300, 10**5000, -1, 0.5]),
    "num_envs": ([1, 2, 5], NO_SIZES),
    "num_steps": ([1, 2, 9], NO_SIZES),
    "minibatch_size": ([1, 3, 4], NO_SIZES),
    "epochs": ([2, 3], [0, -1, 1.5]),
    "learning_rate": (TINY + HUGE, [0.0, *NO_REALS]),
    "anneal": ([False], [None, 1]),
    "gamma": ([0.0, *TINY, 1 - 1e-16, 1.0], [1.01, *NO_REALS]),
    "gae_lambda": ([0.0, *TINY, 1 - 1e-16, 1.0], [1.01, *NO_REALS]),
    "clip": ([*TINY, 1 - 1e-16], [0.0, 1.0, *NO_REALS]),
    "ent_coef": ([0.0, *TINY, *HUGE], NO_REALS),
    "vf_coef": ([0.0, *TINY, *HUGE], NO_REALS),
    "max_grad_norm": (TINY + HUGE, [0.0, *NO_REALS]),
    "target_kl": ([*TINY, *HUGE, None], [0.0, *NO_REALS]),
    "norm_obs": ([True], [2]),
    "norm_reward": ([True], ["yes"]),
    "hidden": ([(), (1,), [3, 2], (2,) * 20, (64,)], [(10**9,), (0,), "64", 5, (1.5,), None]),
    "workers": ([0], [10**6, -1, 0.5]),
    "device": (["cpu"], ["meta", "nonsense", "", 0]),
    "threads": ([2], NO_SIZES),
    "checkpoint_every": ([1, 10**30], [0]),
    "eval_episodes": ([2], NO_SIZES),
}


def test_any_setting_trains_to_finite_numbers_or_ends_in_one_sentence(
    in_tmp, capsys, monkeypatch
):
    monkeypatch.setattr(thrust, "write_page", lambda run: run)  # for time, as is the next
    monkeypatch.setattr(thrust.os, "fsync", lambda _: None)
    rng, outcomes = random.Random(0), {"trained": 0, "refused": 0, "stopped": 0}
    count = 1000 if os.environ.get("THRUST_SLOW_TESTS") == "1" else 150
    for _ in range(count):
        knobs = {"num_envs": 4, "num_steps": 4, "minibatch_size": 8, "epochs": 1,
                 "eval_episodes": 1, "hidden": (8,)}  # fmt: skip
        for name in rng.sample(list(KNOBS), rng.randint(1, 6)):
            knobs[name] = rng.choice(KNOBS[name][rng.random() < 0.1])
        sizes = [knobs["num_envs"], knobs["num_steps"]]
        whole = all(type(size) is int for size in sizes)
        knobs["total_steps"] = math.prod(sizes) * rng.choice([1, 2, 3]) if whole else 48
        outcome = "refused"
        try:
            config = thrust.Config(**knobs)
            outcome = "stopped"
            result = thrust.train(config)
            outcome = "trained"
            assert all(p.isfinite().all() for p in result.policy.parameters()), knobs
            losses = [(row["policy_loss"], row["grad_norm"]) for row in result.rows]
            assert np.isfinite(losses).all(), knobs
        except (ValueError, RuntimeError, OSError, MemoryError, TypeError) as error:
            assert str(error) and "\n" not in str(error), (knobs, error)
            if outcome == "stopped" and not isinstance(error, (ValueError, OSError)):
                assert re.search("is NaN or infinite", str(error)), (knobs, error)
        outcomes[outcome] += 1
        capsys.readouterr()
        shutil.rmtree("runs", ignore_errors=True)
    assert min(outcomes.values()) > count / 20, outcomes


# --- nothing is left behind


def resources():
    """What this process holds: resident bytes, open files, threads, child processes."""
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
    threads = os.listdir("/proc/self/task")
    children = [pathlib.Path(f"/proc/self/task/{t}/children").read_text() for t in threads]
    return (
        resident,
        len(os.listdir("/proc/self/fd")),
        len(threads),
        len(" ".join(children).split()),
    )


@slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_many_steps_and_many_pools_leave_nothing_behind():
    steps = int(os.environ.get("THRUST_SOAK_STEPS", "500_000"))
    pools = int(os.environ.get("THRUST_SOAK_POOLS", "20"))
    actions = np.random.default_rng(0).integers(0, 2, (64, 1024))

    def play(steps):
        with thrust.EnvPool(thrust.CartPole, 1024, 2) as pool:
            pool.reset(seed=0)
            for t in range(steps // 1024):
                if t == 16:
                    warm = resources()
                pool.step(actions[t % 64])
            return warm, resources()

    def open_and_close(pools):
        for _ in range(pools):
            with thrust.EnvPool(thrust.CartPole, 4, 2) as pool:
                pool.reset(seed=0)
        return resources()

    play(32 * 1024)  # starts the server from which workers are forked, once for all pools
    (memory, *warm), (memory_after, *others) = play(steps)
    assert others == warm and memory_after - memory < 2**20
    # Python keeps a few small blocks of shared memory, to use them again.
    (memory, *warm), (memory_after, *others) = open_and_close(10), open_and_close(pools)
    assert others == warm and memory_after - memory < 2**20 + 2**14 * pools


@pytest.mark.parametrize("knobs", [{}, {"learning_rate": 1e30}], ids=["done", "stopped"])
def test_training_leaves_the_process_as_it_found_it(knobs, in_tmp):
    def found():
        return (
            random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            list(warnings.filters), np.geterr(), os.getcwd(), dict(os.environ), sys.path[:],
            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        )  # fmt: skip

    before, threads = found(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with contextlib.nullcontext() if not knobs else pytest.raises(RuntimeError):
            thrust.train(small(**knobs))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found() == before


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
