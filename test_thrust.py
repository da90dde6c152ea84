# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.24,<2.5", "torch>=1.13,<=2.13.0", "pytest>=7.2,<10"]
# ///
"""Tests of thrust.py, under the same part numbers. Each name is a claim.

Wherever it can be, a claim is checked against somebody else: Gymnasium's CartPole, the GAE of
Stable-Baselines3 and torchrl, Stable-Baselines3's PPO, torch's own Adam and distributions, or a
formula written out in full. Tests that need a package outside requirements.txt are skipped
where it is missing, unless THRUST_ALL_TESTS is set, as it is in CI.
"""

import contextlib
import csv
import dataclasses
import doctest
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing as mp
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch

import thrust

SOURCE, HERE = pathlib.Path(thrust.__file__), pathlib.Path(__file__)
METHODS = mp.get_all_start_methods()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sends signals and reads /proc")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def oracle(name):
    """Imports a package that newcomers need not have."""
    if os.environ.get("THRUST_ALL_TESTS"):
        return importlib.import_module(name)
    package = name.split(".")[0].replace("_", "-")
    return pytest.importorskip(name, reason=f"needs {package}: pip install {package}")


@pytest.fixture(scope="session", autouse=True)
def signals():
    """No signal is ignored, as background jobs ignore Ctrl-C, and those of nohup SIGHUP."""
    for number in thrust.SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """A new folder, which is the current one, and from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def small(**knobs):
    """A config that trains for a second: six updates of eight gradient steps."""
    sizes = {"num_envs": 8, "num_steps": 16, "minibatch_size": 64, "total_steps": 8 * 16 * 6}
    return thrust.Config(**{**sizes, "epochs": 4, "eval_episodes": 4, **knobs})


SMALL_FLAGS = "--num-envs 4 --num-steps 32 --minibatch-size 64 --total-steps 384"
SMALL_FLAGS = f"{SMALL_FLAGS} --eval-episodes 2".split()  # three updates


def start(*command, **options):
    """Starts a Python program that can import this file and thrust.py."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, env=env, text=True, **{**pipes, **options})


def wait_for_rows(process, log, rows):
    """Waits until the log of a training has so many rows."""
    until = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") <= rows:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)


def same(a, b):
    """Whether two arrays are equal in dtype, shape and every bit."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def equal(a, b):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return same(a.numpy(), b.numpy()) if isinstance(a, torch.Tensor) else a == b


def weights_of(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


def log_of(run):
    """The rows of log.csv, without what a clock says."""
    with open(pathlib.Path(run, "log.csv"), newline="") as file:
        clock = ("seconds", "steps_per_second")
        return [{k: v for k, v in r.items() if k not in clock} for r in csv.DictReader(file)]


BOX = thrust.Box(-np.ones(4, np.float32), np.ones(4, np.float32), (4,))
TWO = thrust.Discrete(2)


class MultiDiscrete:
    """With the attributes of Gymnasium's."""

    def __init__(self, nvec):
        self.nvec, self.shape, self.dtype = np.array(nvec), np.shape(nvec), np.dtype(np.int64)


class Stateless:
    """An environment of one's own, without a state: a contextual bandit. An episode is one
    step, which pays 1 for the action that the sign of the observation asks for, or else -1."""

    metadata = {"autoreset_mode": "SameStep"}
    single_observation_space = thrust.Box(np.zeros(1), np.ones(1), (1,))
    single_action_space = TWO

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed=None):
        self.rng = np.random.default_rng(seed)
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        return self.obs, {}

    def step(self, actions):
        reward = np.where((self.obs[:, 0] > 0) == (actions == 1), 1.0, -1.0)
        final_obs = self.obs
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        always = np.ones(self.num_envs, bool)
        return self.obs, reward, always, ~always, {"final_obs": final_obs}

    def close(self):
        pass


# == 0. The file ===============================================================================


def lift(number, folder):
    """Writes a part into a file of its own, with what its Needs line names, and imports it."""
    text = SOURCE.read_text(encoding="utf-8").partition('\nif __name__ == "__main__"')[0]
    banner = r"^# =+\n# \d\. .*\n# =+\n# Needs: (.*)\n"
    _, *pieces = re.split(banner, text, flags=re.MULTILINE)
    parts = dict(zip(USES, zip(pieces[::2], pieces[1::2])))
    needed = re.findall(r"\d", parts[number][0].partition("; part")[2])
    numbers = sorted({number, *map(int, needed)})
    imports = itertools.chain(*(parts[n][0].split("; ") for n in numbers))
    lines = [line for line in imports if not line.startswith("part")]
    text = "\n".join(lines + [parts[n][1] for n in numbers])
    (folder / f"lifted_{number}.py").write_text(text, encoding="utf-8")
    return importlib.import_module(f"lifted_{number}")


USES = {  # an expression with the lifted module m, and its value
    1: ("m.Config(num_steps=16).batch_size", 1024),
    2: ("m.CartPole(3).reset(seed=1)[0].shape", (3, 4)),
    3: ("m.ActorCritic(BOX, TWO).act(np.zeros((3, 4))).shape", (3,)),
    4: ("m.gae(*np.ones((3, 1, 1)), *np.zeros((2, 1, 1), bool), 0.5, 0.9)[0].item()", 0.5),
    5: ("m.PPO(thrust.CartPole(8), m.Config(**vars(small()))).update()['steps']", 128),
    6: ("[p.step([0] * 4)[0].shape for p in [m.EnvPool(thrust.CartPole, 4, 2)]]", [(4, 4)]),
    7: ("len(m.train(m.Config(**vars(small()))).returns)", 4),
    8: ("m.main(SMALL_FLAGS)", 0),
    9: ("m.make_page(m.load_checkpoint(thrust.train(small()).run)[1])[-8:]", "</html>\n"),
}


@pytest.mark.parametrize("number", USES)
def test_each_part_can_be_lifted_with_what_it_says_it_needs(number, in_tmp):
    expression, value = USES[number]
    assert eval(expression, {**globals(), "m": lift(number, in_tmp)}) == value


PROGRAM_OF_PART_5 = """
import os, random, sys, threading, numpy as np, torch
def state():
    generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    return generators, torch.get_num_threads(), threading.active_count(), os.listdir()
torch.set_num_threads(2); before = state()
from thrust import *
assert state() == before and not any(name.startswith("torch._dynamo") for name in sys.modules)
{loop}
assert state() == before
"""


def test_importing_only_defines_names_and_the_loop_of_part_5_leaves_no_trace(in_tmp):
    text = SOURCE.read_text(encoding="utf-8").split("PPO is complete here")[1]
    loop = re.search(r"\n#\n((?:#     .*\n){4})#\n", text)[1].replace("#     ", "")
    loop = loop.replace("Config()", "Config(total_steps=6144)")
    process = start("-c", PROGRAM_OF_PART_5.format(loop=loop))
    out, err = process.communicate()
    returns = [float(line) for line in out.splitlines()]
    assert err == "" and len(returns) == 3 and all(10 < mean < 100 for mean in returns)


def test_examples_in_docstrings_are_true():
    results = doctest.testmod(thrust, extraglobs={"np": np})
    assert results.attempted > 0 and results.failed == 0


def test_the_programs_in_readme_run(in_tmp, capsys):
    """Each Python block in turn, in the folder of a run; the environment also by its flag."""
    thrust.train(small())
    text = SOURCE.with_name("README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 4
    for program in programs:
        if "import gymnasium" in program:
            oracle("gymnasium")
        names = {"__name__": "readme"}
        exec(program, names)
        if "Walk" in names:
            (in_tmp / "my_game.py").write_text(program)
            flags = "--env my_game:Walk --num-envs 16 --total-steps 20480 --minibatch-size 128"
            assert thrust.main([*flags.split(), "--learning-rate", "2e-3"]) == 0
            assert "evaluation: mean return 1.0 ± 0.0" in capsys.readouterr().out
    names["envs"].reset(seed=0)  # Gymnasium's wrapper around a CartPole
    infos = [names["envs"].step(np.zeros(64, np.int64))[4] for _ in range(12)]
    assert any("episode" in info for info in infos)


# == 1. Config =================================================================================

WRONG = {
    "num_envs": (0, 64.0, True, "64", [64], None, math.inf),
    "gamma": (math.nan, 1.5, -0.1, "1", False),
    "learning_rate": (math.inf, -1e-3),
    "target_kl": (None, -1),
    "anneal": (1, "yes"),
    "hidden": ((64, 0), (64, 6.4), (True,), 64),
    "seed": (-1,),
    "minibatch_size": (2,),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_values_are_refused_with_knob_rule_and_value(name):
    kind = type(getattr(thrust.Config(), name)).__name__
    for value in WRONG[name]:
        sentence = f"^{name} must be of type {kind}.*; got {re.escape(repr(value))}$"
        with pytest.raises(ValueError, match=sentence):
            thrust.Config(**{name: value})


def test_rules_between_knobs_are_sentences_and_sizes_follow_from_the_knobs():
    with pytest.raises(ValueError, match="workers must be at most 64; got 65"):
        thrust.Config(workers=65)
    with pytest.raises(ValueError, match="total_steps must be at least one rollout, num_envs"):
        thrust.Config(total_steps=9)
    with pytest.raises(ValueError, match="must be at least 2: advantages are compared"):
        thrust.Config(num_envs=1, num_steps=1)
    config = thrust.Config(
        gamma=np.float64(1), hidden=[32], num_envs=8, num_steps=100, total_steps=2500
    )
    assert (config.gamma, config.hidden) == (1, (32,)) and thrust.Config(gamma=1)
    assert (config.batch_size, config.num_updates) == (800, 3)


# == 2. CartPole ===============================================================================


def gymnasium_cartpole(num_envs, max_episode_steps=20):
    gym = oracle("gymnasium")
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    options = {"max_episode_steps": max_episode_steps}
    return gym.make_vec("CartPole-v1", num_envs, "sync", mode, **options)


def check_same(envs, reference, steps):
    """Plays both alike; every bit must agree. Returns how many were terminated, truncated."""
    ends, rng, got = np.zeros(2, int), np.random.default_rng(0), []
    for t in range(steps):
        actions = rng.integers(0, 2, reference.num_envs)
        if t // 1000 % 2:  # with some skill, so that episodes are long
            actions = 1 * (got[0] @ [0, 0.02, 1, 0.5] > 0)
        *got, info = envs.step(actions)
        *expected, expected_info = reference.step(actions)
        ended = expected[2] | expected[3]
        assert ("final_obs" in info) == ended.any()
        if ended.any():
            got.append(info["final_obs"][ended])
            expected.append(np.stack(expected_info["final_obs"][ended]))
        assert all(map(same, got, expected)), f"they differ at step {t}"
        ends += expected[2].sum(), expected[3].sum()
    return ends


def test_it_is_gymnasiums_cartpole_bit_for_bit():
    theirs, ours = gymnasium_cartpole(8, 500), thrust.CartPole(8)
    assert same(theirs.reset(seed=5)[0], ours.reset(seed=5)[0])
    terminated, truncated = check_same(ours, theirs, 13_000)  # 104,000 steps
    assert terminated > 1000 and truncated > 10
    assert same(theirs.reset()[0], ours.reset()[0])  # without a seed, the streams go on


def test_an_environments_stream_depends_on_its_seed_alone():
    few, many = thrust.CartPole(3), thrust.CartPole(2000)
    few.reset(seed=7), many.reset(seed=5)
    for _ in range(300):  # more than two blocks of start states
        assert same(few.reset()[0], many.reset()[0][2:5])
    assert not same(thrust.CartPole(2).reset()[0], thrust.CartPole(2).reset()[0])  # no seed


def test_its_state_continues_exactly_in_another_object():
    first, rng = thrust.CartPole(5, max_episode_steps=30), np.random.default_rng(2)
    first.reset(seed=11)
    for t in range(4000):  # 200 episodes: also beyond a block of start states
        if t % 97 == 0:
            second = thrust.CartPole(5, max_episode_steps=30)
            second.set_state(first.state())
        actions = rng.integers(0, 2, 5)
        a, b = first.step(actions), second.step(actions)
        assert all(same(x, y) for x, y in zip(a[:4], b[:4]))
    assert all(len(array) == 5 for array in first.state().values())


def test_what_it_returns_is_the_callers():
    env = thrust.CartPole(2)
    kept = [env.reset(seed=0)[0], *env.step(np.array([0, 1]))[:4]]
    copies = [array.copy() for array in kept]
    kept[2][:] = 7
    for _ in range(30):
        assert env.step(np.array([0, 1]))[1].tolist() == [1.0, 1.0]
    assert all(same(a, b) for a, b in zip(kept[:2] + kept[3:], copies[:2] + copies[3:]))


NO_ACTIONS = [0, 1], [[0, 1, 0]], [0, 1, 2], [0, -1, 1], [0.0, 1.0, 0.0], [True] * 3, 1, "011"


@pytest.mark.parametrize("actions", NO_ACTIONS)
def test_what_is_no_action_is_refused_and_changes_nothing(actions):
    env = thrust.CartPole(3)
    before = env.state()
    with pytest.raises(ValueError, match="actions must be 3 ints, 0 or 1; got"):
        env.step(np.array(actions))
    assert all(same(before[k], array) for k, array in env.state().items())


# == 3. ActorCritic ============================================================================


def make_policy(seed=0, space=TWO, hidden=(64, 64), scale=1.0, **options):
    """A policy; `scale` makes its probabilities differ more than at first."""
    policy = thrust.ActorCritic(BOX, space, hidden, seed=seed, **options)
    policy.actor[-1].weight.data *= scale
    return policy


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_initial_weights_are_orthogonal_with_gains_and_leave_the_global_generator():
    before = torch.get_rng_state()
    policy = make_policy()
    assert torch.equal(before, torch.get_rng_state())
    layers = [*policy.actor[::2], *policy.critic[::2]]
    for layer, gain in zip(layers, [2, 2, 0.01**2, 2, 2, 1]):  # squared gains
        w = layer.weight.detach().double()
        product = (w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w) / gain
        torch.testing.assert_close(product, torch.eye(len(product)).double(), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    a, b, c = (weights_of(make_policy(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("nvec", [[5], [3, 2, 4], [[2, 3], [3, 2]]])
def test_choices_are_independent_categoricals(nvec):
    flat, g = np.ravel(nvec).tolist(), generator(1)
    space = thrust.Discrete(5) if nvec == [5] else MultiDiscrete(nvec)
    policy, obs = make_policy(space=space, scale=300), torch.randn(2000, 4, generator=g)
    action = policy.act(obs, generator=g)
    assert action.dtype == torch.int64 and action.shape == (2000, *space.shape)
    each = action.view(2000, -1)
    assert each.amax(0).tolist() == [n - 1 for n in flat] and not each.amin(0).any()
    outputs, categorical = policy.actor(obs).view(2000, len(flat), -1), torch.distributions
    several = [categorical.Categorical(logits=outputs[:, i, :n]) for i, n in enumerate(flat)]
    logprob, entropy, value = policy.evaluate(obs, action)
    torch.testing.assert_close(logprob, sum(c.log_prob(a) for c, a in zip(several, each.T)))
    torch.testing.assert_close(entropy, sum(c.entropy() for c in several))
    assert torch.equal(value, policy.value(obs)) and value.shape == (2000,)
    greedy = torch.stack([c.probs.argmax(-1) for c in several], -1)
    assert torch.equal(policy.act(obs, greedy=True).view(2000, -1), greedy)
    (logprob + entropy).sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.actor.parameters())


def test_actions_are_drawn_with_the_policys_probabilities():
    policy, n = make_policy(space=thrust.Discrete(4)), 200_000
    policy.actor[-1].bias.data[:] = torch.tensor([2.0, 0.0, -1.0, 1.0])
    drawn = policy.act(torch.zeros(n, 4), generator=generator())
    frequency, expected = torch.bincount(drawn) / n, policy.actor[-1].bias.softmax(0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_real_actions_are_normal_kept_raw_and_clipped_only_for_the_environment():
    space = thrust.Box(np.full((2, 1), -0.5, np.float32), np.ones((2, 1), np.float32), (2, 1))
    policy, obs = make_policy(space=space), torch.randn(5000, 4, generator=generator())
    policy.log_std.data[:] = torch.tensor([0.0, 0.5])
    action = policy.act(obs, generator=generator(1))
    assert action.shape == (5000, 2, 1) and action.abs().max() > 2
    normal = torch.distributions.Normal(policy.actor(obs), policy.log_std.exp())
    logprob, entropy, _ = policy.evaluate(obs, action)
    torch.testing.assert_close(logprob, normal.log_prob(action[..., 0]).sum(-1))
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))
    assert torch.equal(policy.act(obs, greedy=True)[..., 0], policy.actor(obs))
    sent = policy.to_env(action)
    assert same(sent, np.clip(action.numpy(), -0.5, 1)) and sent.dtype == np.float32
    whole = thrust.Box(np.full(3, -2), np.full(3, 2), (3,), np.int32)  # rounded, not cut off
    sent = make_policy(space=whole).to_env(torch.tensor([[0.6, -0.6, 9.0]]))
    assert sent.dtype == np.int32 and sent.tolist() == [[1, -1, 2]]


def test_observations_may_be_discrete_arrays_or_tensors_of_any_shape_but_not_one_alone():
    space = thrust.Discrete(3, start=-1)
    policy = thrust.ActorCritic(space, thrust.Discrete(2, start=5), ())
    policy.critic[0].weight.data[:] = torch.tensor([10.0, 20.0, 30.0])
    assert policy.value(np.array([-1, 1, 0, 1])).tolist() == [10, 30, 20, 30]
    action = policy.act(np.array([0, 1]), greedy=True)
    assert set(action.tolist()) <= {0, 1} and same(policy.to_env(action), action.numpy() + 5)
    space, obs = thrust.Box(np.zeros((2, 3)), np.ones((2, 3)), (2, 3)), np.ones((5, 2, 3))
    policy = thrust.ActorCritic(space, TWO, (8,))
    policy.actor = torch.nn.Sequential(torch.nn.Flatten(), policy.actor)  # of one's own
    assert torch.equal(policy.value(obs), policy.value(torch.tensor(obs)))
    for wrong in (obs[0], obs.reshape(5, 6), np.float32(1)):
        with pytest.raises(ValueError, match=r"observations must be \(k, \*\(2, 3\)\), got"):
            policy.act(wrong)


def test_unknown_spaces_are_refused_by_name():
    for spaces, norm, sentence in (
        ((MultiDiscrete([2]), TWO), False, "observations cannot be .*, only Box or Discrete"),
        ((TWO, TWO), True, "observations cannot be .*, only Box with norm_obs"),
        ((BOX, "text"), False, "actions cannot be text, only Discrete, MultiDiscrete or Box"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            thrust.ActorCritic(*spaces, norm_obs=norm)


def test_a_normalizer_knows_the_moments_of_all_that_was_counted_in_at_any_offset():
    normalizer, rng = thrust.Normalizer(3), np.random.default_rng(0)
    rows = rng.normal(size=(1000, 3)) * [1e-3, 1, 100] + [1e5, 0, -3]
    for part in np.split(rows, [10, 300, 310]):
        x = torch.from_numpy(part)
        normalizer.count_in(len(x), x.mean(0), x.var(0, unbiased=False))
    assert normalizer.count == 1000
    np.testing.assert_allclose(normalizer.mean, rows.mean(0), rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(normalizer.var, rows.var(0), rtol=1e-8)
    x = torch.tensor([[1e5 + 2e-3, 0, 1e6]], dtype=torch.float64)
    assert normalizer(x)[0, 2] == 10 and normalizer(x)[0, 0] == pytest.approx(2, abs=0.2)


# == 4. Rollout ================================================================================


def gae_by_definition(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode; O(T²), one number at a time."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n, t in itertools.product(range(N), range(T)):
        for s in range(t, T):
            following = 0.0 if terminated[s, n] else next_values[s, n]
            delta = rewards[s, n] + gamma * following - values[s, n]
            advantages[t, n] += (gamma * lam) ** (s - t) * delta
            if terminated[s, n] or truncated[s, n]:
                break
    return advantages


def every_flag(T, seed):
    """Every combination of both flags in T steps, one per environment, and random numbers."""
    flags = np.array(list(itertools.product([False, True], repeat=2 * T))).T  # (2T, 4^T)
    numbers = np.random.default_rng(seed).normal(size=(3, T, flags.shape[1]))
    return (*numbers, flags[:T], flags[T:])


@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_its_definition_for_all_flags(T, gamma, lam):
    data = every_flag(T, seed=T)
    expected = gae_by_definition(*data, gamma, lam)
    data[2][data[3]] = np.nan  # where terminated, the next value is not read
    advantages, returns = thrust.gae(*data, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected + data[1], atol=1e-12)


def test_gae_is_stable_baselines3s():
    buffers = oracle("stable_baselines3.common.buffers")
    spaces = oracle("gymnasium").spaces
    rng, T, N, gamma, lam = np.random.default_rng(3), 64, 16, 0.98, 0.8
    rewards, values, next_values = rng.normal(size=(3, T, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < 0.1
    ended = terminated | truncated
    next_values[:-1] = np.where(ended[:-1], next_values[:-1], values[1:])
    box, two = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    buffer = buffers.RolloutBuffer(T, box, two, "cpu", lam, gamma, N)
    # Its collector adds γ·V(final_obs) to the reward of a truncated step, and ends there.
    buffer.rewards = rewards + gamma * next_values * (truncated & ~terminated)
    buffer.values = values
    buffer.episode_starts = np.concatenate([np.zeros((1, N)), ended[:-1]]).astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(next_values[-1]), ended[-1])
    ours = thrust.gae(rewards, values, next_values, terminated, truncated, gamma, lam)
    # Theirs is float32: 2**-24 of numbers up to 16, in some ten operations.
    np.testing.assert_allclose(ours[0], buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(ours[1], buffer.returns, atol=1e-5)


def test_gae_is_torchrls():
    functional = oracle("torchrl.objectives.value.functional")
    rewards, values, next_values, terminated, truncated = every_flag(4, seed=4)
    arrays = values, next_values, rewards, terminated | truncated, terminated
    tensors = [torch.from_numpy(a.T.copy())[..., None] for a in arrays]  # (N, T, 1)
    theirs = functional.generalized_advantage_estimate(0.97, 0.9, *tensors)
    ours = thrust.gae(rewards, values, next_values, terminated, truncated, 0.97, 0.9)
    for mine, other in zip(ours, theirs):  # theirs is float32 in parts
        np.testing.assert_allclose(mine, other[..., 0].numpy().T, atol=1e-6)


def test_a_rollout_keeps_what_was_reached_in_the_environments_own_dtype():
    obs = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rollout = thrust.Rollout(4, obs, torch.zeros(2, 5))
    objects = np.array([None, np.full(3, 9, np.uint8)], object)  # as Gymnasium has it
    flags = np.array([False, True]), np.array([False, False])
    rollout.add(1, (obs, np.array([1, 2]), *flags, {"final_obs": objects}))
    assert same(rollout.next_obs[1], np.array([[0, 1, 2], [9, 9, 9]], np.uint8))
    assert rollout.reward[1].tolist() == [1, 2] and rollout.action.shape == (4, 2, 5)


# == 5. PPO ====================================================================================


def some_batch(policy, size, seed=0, drift=0.3):
    """A batch whose old log-probabilities differ from the policy's by about `drift`."""
    g = generator(seed)
    obs = torch.randn(size, 4, generator=g)
    action = policy.act(obs, generator=g)
    logprob = policy.evaluate(obs, action)[0].detach()
    logprob = logprob + drift * torch.randn(size, generator=g)
    return thrust.Batch(obs, action, logprob, *torch.randn(2, size, generator=g))


def learner_of(envs=None, **knobs):
    config = small(**knobs)
    return thrust.PPO(envs or thrust.CartPole(config.num_envs), config)


def trained(make_env, updates, **knobs):
    """A learner after so many updates of 512 steps, and the last row."""
    sizes = {"num_steps": 8, "minibatch_size": 128, "total_steps": 512 * updates}
    learner = thrust.PPO(make_env(64), thrust.Config(**sizes, **knobs))
    return learner, [learner.update() for _ in range(updates)][-1]


def test_only_outside_the_band_on_the_winning_side_is_the_gradient_cut():
    class Fixed:
        def __init__(self, ratio):
            self.logprob = torch.tensor(ratio).log().requires_grad_()

        def evaluate(self, obs, action):
            return self.logprob, torch.zeros(len(self.logprob)), torch.zeros(len(self.logprob))

    #             inside   gained  gained  lost   lost
    ratio = [1.15, 0.9, 1.5, 1.3, 0.7, 0.6]
    sign = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    policy, zeros = Fixed(ratio), torch.zeros(6)
    batch = thrust.Batch(zeros[:, None], zeros, zeros, torch.tensor(sign), zeros)
    loss, stats = thrust.ppo_loss(policy, batch, thrust.Config(clip=0.2))
    loss.backward()
    assert (policy.logprob.grad != 0).tolist() == [True, True, False, True, True, False]
    assert stats["clip_fraction"] == pytest.approx(4 / 6)
    # mean( min( ratio·Â, clip(ratio)·Â ) ), by hand; Â of ±1 in equal number scales by 1/std
    by_hand = np.mean([1.15, -0.9, 1.2, -1.3, 0.7, -0.8]) / np.std(sign, ddof=1)
    assert -stats["policy_loss"].item() == pytest.approx(by_hand, abs=1e-6)
    with pytest.raises(AssertionError, match="would make"):  # (M, M) of it
        thrust.ppo_loss(policy, batch._replace(returns=zeros[:, None]), small())


def test_adam_is_torchs_adam_with_its_gradient_clipping():
    ours, theirs = make_policy(3), make_policy(3)
    mine, other = thrust.Adam(ours), torch.optim.Adam(theirs.parameters(), eps=1e-5)
    for step in range(20):
        for policy in (ours, theirs):
            thrust.ppo_loss(policy, some_batch(ours, 64, step), thrust.Config())[0].backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        other.param_groups[0]["lr"] = rate = 1e-2 / (step + 1)
        other.step()
        other.zero_grad()
        torch.testing.assert_close(mine.step(rate, 0.5), expected)
        assert not mine.grad.any()
    # 20 steps of up to 1e-2, each rounded to 24 bits and divided by roots of small numbers
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("leave", ["double", "forget", "forget and backward"])
def test_adam_refuses_parameters_that_left_its_memory(leave):
    policy = make_policy()
    adam = thrust.Adam(policy)
    adam.step(1e-3, 0.5)
    if leave == "double":
        policy.double()
    for p in policy.parameters() if "forget" in leave else ():
        p.grad = None  # as zero_grad does from torch 2.0 on
    if "backward" in leave:
        policy.value(torch.zeros(3, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="left Adam's memory: make a new Adam"):
        adam.step(1e-3, 0.5)


def test_a_whole_update_is_stable_baselines3s():
    sb3, gym = oracle("stable_baselines3"), oracle("gymnasium")
    size, knobs = 256, {"ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    policy = make_policy(scale=100)
    same_knobs = {"n_steps": size, "batch_size": size, "learning_rate": 1e-3, "clip_range": 0.2}
    same_knobs |= {"n_epochs": 1, "device": "cpu", "seed": 0, **knobs}
    theirs = sb3.PPO("MlpPolicy", gym.make("CartPole-v1"), **same_knobs)
    extractor = theirs.policy.mlp_extractor
    networks = extractor.policy_net, theirs.policy.action_net
    networks += extractor.value_net, theirs.policy.value_net
    others = [p for network in networks for p in network.parameters()]
    pairs = list(zip([*policy.actor.parameters(), *policy.critic.parameters()], others))
    for mine, other in pairs:
        other.data.copy_(mine.data)
    batch, buffer = some_batch(policy, size), theirs.rollout_buffer
    buffer.reset()
    buffer.observations[:, 0], buffer.actions[:, 0, 0] = batch.obs, batch.action
    buffer.log_probs[:, 0], buffer.values[:, 0] = batch.logprob, 0
    buffer.advantages[:, 0], buffer.returns[:, 0] = batch.advantage, batch.returns
    buffer.full = True
    theirs.set_logger(sb3.common.logger.configure(None, []))
    theirs.train()
    adam = thrust.Adam(policy)
    before = adam.weights.clone()
    loss, stats = thrust.ppo_loss(policy, batch, thrust.Config(**knobs))
    loss.backward()
    scaled = min(1.0, 0.5 / (adam.grad.norm().item() + 1e-6))
    # Sums over 256 rows in another order (theirs are shuffled): some 2**-24 of numbers up to 1
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad * scaled, other.grad, atol=1e-6, rtol=1e-4)
    adam.step(1e-3, 0.5)
    # The first step is rate·g/(|g| + 1e-5·√…): a gradient off by 1e-6 moves it by at most 1e-4
    for mine, other in pairs:
        torch.testing.assert_close(mine.data, other.data, atol=2e-4, rtol=0)
    moved = torch.cat([(mine.data - other.data).flatten() for mine, other in pairs]).abs()
    assert moved.median() < 1e-6 and (adam.weights - before).abs().median() > 1e-4
    logged = theirs.logger.name_to_value
    for name in ("approx_kl", "clip_fraction", "value_loss"):
        assert logged[f"train/{name}"] == pytest.approx(stats[name].item(), rel=1e-4, abs=1e-6)


def test_on_the_first_minibatch_of_every_update_the_ratio_is_1_and_the_kl_0(monkeypatch):
    seen, original = [], thrust.ppo_loss

    def spy(policy, batch, config):
        with torch.no_grad():
            ratio = (policy.evaluate(batch.obs, batch.action)[0] - batch.logprob).exp()
        loss, stats = original(policy, batch, config)
        seen.append((ratio, stats))
        return loss, stats

    monkeypatch.setattr(thrust, "ppo_loss", spy)
    learner = learner_of(norm_obs=True)
    for _ in range(4):
        learner.update()
    assert len(seen) == 4 * 8
    for ratio, stats in seen[::8]:
        # Logits of up to 10 have 2**-21 of rounding; a log-probability sums a few of them.
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
        assert abs(stats["approx_kl"]) < 1e-6 and stats["clip_fraction"] == 0
    assert max(stats["approx_kl"] for _, stats in seen[7::8]) > 1e-4  # and it does move later


def test_the_targets_of_a_rollout_are_the_definitions_with_the_states_really_reached():
    """With time limits of 15 steps, an update's advantages and returns, computed one by one."""
    learner = learner_of(thrust.CartPole(8, max_episode_steps=15), norm_reward=True)
    learner.update()
    learner._collect()
    batch, r = learner._advantages(*learner._estimate()), learner.rollout
    assert r.truncated.any() and r.terminated.any()
    ended = r.terminated | r.truncated
    assert same(r.next_obs[:-1][~ended[:-1]], r.obs[1:][~ended[:-1]])
    starts = np.abs(r.obs[1:][ended[:-1]])
    assert (starts <= 0.05).all() and not (np.abs(r.next_obs[ended]) <= 0.05).all(1).any()
    with torch.no_grad():
        value = [learner.policy.value(x.reshape(-1, 4)).numpy() for x in (r.obs, r.next_obs)]
    values, next_values = (v.reshape(16, 8) for v in value)
    rewards = r.reward / learner.reward_normalizer.std().item()
    flags, gamma = (r.terminated, r.truncated), learner.config.gamma
    expected = gae_by_definition(rewards, values, next_values, *flags, gamma, 0.95)
    # The values are float32, up to 20: their last bit is 2**-20.
    np.testing.assert_allclose(batch.advantage.view(16, 8), expected, atol=1e-4)
    np.testing.assert_allclose(batch.returns.view(16, 8), expected + values, atol=1e-4)


def test_rewards_are_scaled_by_the_deviation_of_discounted_sums():
    learner = learner_of(thrust.CartPole(8, max_episode_steps=9), norm_reward=True, gamma=0.9)
    sums, running, r = [], np.zeros(8), learner.rollout
    for _ in range(3):
        learner.update()
        for reward, ended in zip(r.reward, r.terminated | r.truncated):
            running = 0.9 * running + reward
            sums.append(running.copy())
            running[ended] = 0
    assert learner.reward_normalizer.std().item() == pytest.approx(np.std(sums), rel=1e-12)


@pytest.mark.parametrize("size", [512, 128, 100, 513, 9999])
def test_minibatches_cover_the_rollout_in_almost_equal_pieces(size):
    learner = learner_of(num_envs=27, num_steps=19, total_steps=10**4, minibatch_size=size)
    numbers, pieces = torch.arange(513), math.ceil(513 / size)
    rows = thrust.Batch(numbers.float()[:, None], *(numbers,) * 4)
    minibatches = list(learner._minibatches(rows))
    assert len(minibatches) == 4 * pieces
    epochs = torch.cat([m.action for m in minibatches]).view(4, 513)
    assert all(torch.equal(epoch.sort()[0], numbers) for epoch in epochs)
    assert torch.equal(epochs[0], epochs[1]) == (pieces == 1)  # one needs no new order
    lengths = {len(m.action) for m in minibatches}
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= size
    for m in minibatches:  # rows stay together
        assert torch.equal(m.obs[:, 0].long(), m.action) and torch.equal(m.returns, m.action)


def test_the_learning_rate_falls_from_full_to_almost_zero_and_never_below():
    learner = learner_of(learning_rate=1.0)
    rates = [learner.update()["learning_rate"] for _ in range(8)]
    np.testing.assert_allclose(rates, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0], atol=1e-12)
    assert learner_of(anneal=False).update()["learning_rate"] == small().learning_rate


def test_a_contextual_bandit_is_solved_completely():
    learner, row = trained(Stateless, 40, learning_rate=1e-2)
    assert row["mean_return"] > 0.9 and row["mean_length"] == 1
    assert row["episodes"] == 64 * 8 * 40
    obs = torch.cat([-torch.linspace(0.05, 1, 100), torch.linspace(0.05, 1, 100)])[:, None]
    assert torch.equal(learner.policy.act(obs, greedy=True), (obs[:, 0] > 0).long())


class Offset(Stateless):
    """The bandit, seen in float64 with an offset far larger than its deviation."""

    single_observation_space = thrust.Box(np.zeros(1), np.ones(1), (1,), np.float64)

    def reset(self, *, seed=None):
        return 100_000.004 + 1e-3 * super().reset(seed=seed)[0].astype(float), {}

    def step(self, actions):
        obs, *others, info = super().step(actions)
        final_obs = 100_000.004 + 1e-3 * info["final_obs"].astype(float)
        return 100_000.004 + 1e-3 * obs.astype(float), *others, {"final_obs": final_obs}


def test_an_offset_does_not_keep_normalised_observations_from_being_learned_from():
    learner, row = trained(Offset, 60, norm_obs=True)
    normalizer = learner.policy.normalizer
    assert row["mean_return"] > 0.8 and normalizer.count == 64 * 8 * 60
    assert normalizer.mean.item() == pytest.approx(100_000.004, abs=1e-4)


class Whole(Stateless):
    """Pays minus the distance of a whole number from 3."""

    single_action_space = thrust.Box(np.full(1, -9), np.full(1, 9), (1,), np.int64)

    def step(self, actions):
        assert actions.dtype == np.int64 and (abs(actions) <= 9).all()
        obs, _, *others = super().step(np.zeros(self.num_envs))
        return obs, -np.abs(actions[:, 0] - 3.0), *others


def test_whole_numbers_as_actions_are_learned_from_as_they_were_drawn():
    learner, row = trained(Whole, 80)
    action = learner.rollout.action
    assert action.dtype == np.float32 and not np.array_equal(action, action.round())
    assert row["mean_return"] > -0.7


class NextStep(thrust.CartPole):
    metadata = {"autoreset_mode": "NextStep"}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["obs", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_never_saved(name, value, norm, in_tmp, monkeypatch):
    steps, original = itertools.count(), thrust.CartPole.step

    def step(self, actions):
        result = original(self, actions)
        if next(steps) >= 40:
            result[("obs", "reward").index(name)][1] = value
        return result

    monkeypatch.setattr(thrust.CartPole, "step", step)
    sentence = "update 3 led to NaN or infinity in .*; usual causes are a learning rate"
    with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=sentence):
        thrust.train(small(norm_obs=norm, norm_reward=norm, checkpoint_seconds=0))
    learner = thrust.load_checkpoint("runs/CartPole-0")[1]["learner"]
    assert learner["counts"][1] == 2 * 128
    flat = [learner["running"], *learner["adam"].values(), *learner["policy"].values()]
    assert all(tensor.isfinite().all() for tensor in flat)
    page = pathlib.Path("runs/CartPole-0/page.html").read_text(encoding="utf-8")
    assert "Trained by Thrust for 256 of 768 steps." in page


def test_a_learners_state_is_a_copy_and_all_that_it_goes_on_from():
    first, second = learner_of(norm_obs=True), learner_of(norm_obs=True, seed=5)
    first.update()
    state = first.state_dict()
    row = first.update()
    second.config = first.config
    second.load_state_dict(state)
    assert equal(state, second.state_dict()) and not equal(state, first.state_dict())
    assert {**row, "steps_per_second": 0} == {**second.update(), "steps_per_second": 0}


def test_seeds_of_runs_ranks_and_updates_never_meet():
    starts = []
    for seed, rank, update in itertools.product(range(100), range(4), (0, 1, 50)):
        _, environments, _, evaluation = thrust.derive_seeds(seed, rank, update)
        starts += [(environments, 4096), (evaluation, 1000)]
    starts.sort()
    assert all(a + width <= b for (a, width), (b, _) in zip(starts, starts[1:]))
    assert starts[-1][0] + 10**6 < 2**63


# == 6. EnvPool ================================================================================

ZEROS, ONES = np.zeros(8, int), np.ones(8, int)
SHORT = functools.partial(thrust.CartPole, max_episode_steps=20)  # so that some are truncated
start_pool = functools.partial(thrust.EnvPool, start_method=METHODS[0])  # Python's own choice


class Faulty(NamedTuple):
    """A make_env: in worker 1, `code` may change a method's result, or [env] as it is made."""

    code: str
    moment: str = "step"

    def __call__(self, num_envs):
        env = thrust.CartPole(num_envs)
        if mp.current_process().name.startswith("worker 1"):
            if self.moment == "make":
                return self.change([env])[0]
            call = getattr(env, self.moment)
            setattr(env, self.moment, lambda *a, **k: self.change([*call(*a, **k)]))
        return env

    def change(self, result):
        exec(self.code)
        return result


@contextlib.contextmanager
def pool_and_reference(make_env=thrust.CartPole, n=8, workers=2, method=METHODS[0]):
    reference = make_env(n)
    with thrust.EnvPool(make_env, n, workers, start_method=method) as pool:
        assert len({os.getpid(), *pool.pids}) == 1 + workers
        assert same(pool.reset(seed=3)[0], reference.reset(seed=3)[0])
        yield pool, reference


def check_refused(pool, sentence):
    state = thrust.CartPole(8).state()
    calls = [pool.reset, pool.state, lambda: pool.send(ZEROS), lambda: pool.step(ZEROS)]
    for call in [*calls, lambda: pool.set_state(state)]:
        with pytest.raises(RuntimeError, match=rf"^{sentence}$"):
            call()


@pytest.mark.parametrize("cut", [(1,), (2,), (3,), *((2, m) for m in METHODS[2:])])
@np.printoptions(precision=3, threshold=2)
def test_a_pool_gives_the_same_bits_as_one_process_however_arrays_are_printed(cut):
    with pool_and_reference(SHORT, 7, *cut) as both:
        assert all(check_same(*both, 300) > 20)  # environment i is seeded seed + i
        assert same(*(envs.reset()[0] for envs in both))  # without a seed, they go on


def test_a_state_goes_on_in_any_number_of_workers_and_in_one_process():
    with start_pool(SHORT, 5, 1) as one, start_pool(SHORT, 5, 2) as two:
        one.reset(seed=3)
        for source, target in itertools.permutations([one, two, SHORT(5)], 2):
            [source.step(np.arange(5) % 2) for _ in range(15)]
            target.set_state(source.state())
            assert check_same(target, source, 60).sum() > 5


def test_the_state_of_very_many_poles_passes_through():
    with start_pool(thrust.CartPole, 65_536, 2) as pool:
        pool.reset(seed=1)
        state = pool.state()
        assert same(state["seeds"], np.arange(65_536) + 1)
        pool.set_state({name: array + 2 for name, array in state.items()})
        assert all(same(array, state[name] + 2) for name, array in pool.state().items())


def test_results_stand_in_the_same_memory_and_are_valid_until_the_next_send():
    with start_pool(functools.partial(thrust.CartPole, max_episode_steps=1), 8, 2) as pool:
        *first, info = [*pool.reset(seed=0)[:1], *pool.step(ZEROS)]
        kept = [array.copy() for array in (*first, info["final_obs"])]
        assert pool.state() and all(map(same, (*first, info["final_obs"]), kept))
        *second, again = [*pool.reset(seed=1)[:1], *pool.step(ZEROS)]
        assert all(map(np.shares_memory, first, second)) and not same(first[0], kept[0])
        assert np.shares_memory(info["final_obs"], again["final_obs"])


def test_send_does_not_wait_for_workers_and_recv_waits_for_all(tmp_path):
    gate = tmp_path / "gate"
    code = f"while not os.path.exists({str(gate)!r}): time.sleep(0.001)"
    with pool_and_reference(Faulty(code)) as (pool, reference):
        pool.send(ZEROS)  # if this waited, it would do so for ever
        threading.Timer(0.2, gate.touch).start()
        assert same(pool.recv()[0], reference.step(ZEROS)[0])


def test_numbers_actions_and_calls_that_do_not_fit_are_refused_and_change_nothing():
    with pool_and_reference() as (pool, reference):
        for workers in (-1, 0, 9):
            with pytest.raises(ValueError, match=f"8 environments cannot have {workers} work"):
                start_pool(thrust.CartPole, 8, workers)
        with pytest.raises(ValueError, match="is 9, envs has 8"):
            thrust.PPO(pool, small(num_envs=9))
        for wrong in (ZEROS[:2], ZEROS[:, None], ZEROS / 1):
            sentence = f"action must be int64 (8,); got {wrong.dtype} {wrong.shape}"
            with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
                pool.step(wrong)
            with pytest.raises(RuntimeError, match=r"^recv\(\) needs a send\(\) before it$"):
                pool.recv()
            pool.send(ONES)
            check_refused(pool, r"a send\(\) is under way: call recv\(\) first")
            assert same(pool.recv()[0], reference.step(ONES)[0])


def test_a_pool_that_is_closed_has_no_workers_and_refuses_every_call():
    with contextlib.suppress(KeyError), start_pool(thrust.CartPole, 8, 2) as pool:
        processes = mp.active_children()
        pool.reset(seed=0), pool.send(ZEROS)
        raise KeyError
    assert [process.exitcode for process in processes] == [0, 0]
    pool.close(), pool.close()
    check_refused(pool, "this pool is closed")
    with pytest.raises(RuntimeError, match=r"^this pool is closed$"):
        pool.recv()


def failure(make_env, **options):
    """How 8 environments in 2 workers fail, in their first step or before. None is left."""
    pool = None
    with pytest.raises(thrust.WorkerError) as caught:
        pool = thrust.EnvPool(make_env, 8, 2, **{"start_method": METHODS[0], **options})
        pool.reset(seed=0)
        pool.step(ZEROS)
    assert caught.value.worker == 1 and not mp.active_children()
    if pool:
        check_refused(pool, "this pool is closed")
    return caught.value


FAULTS = [  # what a worker does, what is said of it, its exit code (who raised may still run)
    ("raise KeyError(7)", "raised while {}: KeyError: 7 (<string>, line 1)", (None, 1)),
    ("os._exit(3)", "died with exit code 3 while {}", (3,)),
    ("os.kill(os.getpid(), 9), time.sleep(9)", "died with exit code -9 while {}", (-9,)),
    ("while True: pass", "was still {} after 0.3 s", (None,)),
]
CASES = [(*fault, "step", method) for fault in FAULTS for method in METHODS]
CASES += [(*fault, at, METHODS[0]) for fault in FAULTS[:2] for at in ("make", "reset")]


@pytest.mark.parametrize(("code", "sentence", "exitcodes", "moment", "method"), CASES)
def test_a_worker_that_fails_is_one_error(code, sentence, exitcodes, moment, method):
    if "kill" in code and os.name == "nt":
        pytest.skip("needs SIGKILL")
    timeout = 0.3 if "while" in code else 60
    error = failure(Faulty(code, moment), start_method=method, timeout=timeout)
    doing = {"make": "starting", "reset": "resetting", "step": "stepping"}[moment]
    line, *after = str(error).splitlines()
    assert line == "worker 1 (environments 4 to 7) " + sentence.format(doing)
    trace = ["Traceback (most recent call last):", "KeyError: 7"] if "raise" in code else []
    assert after[:1] + after[-1:] == trace and error.exitcode in exitcodes


FINAL = "result[2:] = result[2] | True, result[3], {'final_obs': np.zeros((4, 1), 'f')}"
MISFITS = {
    "result[0] = result[0][:, :3]": "obs must be float32 (4, 4); got float32 (4, 3)",
    "result[0] = result[0][:3]": "obs must be float32 (4, 4); got float32 (3, 4)",
    "result[1] = result[1][:, None]": "reward must be float64 (4,); got float64 (4, 1)",
    "result[2] = result[2] / 1": "terminated must be bool (4,); got float64 (4,)",
    "result[3] = False": "truncated must be bool (4,); got bool ()",
    FINAL: "final_obs must be float32 (4, 4); got float32 (4, 1)",
    "result[0].metadata = {'autoreset_mode': 'NextStep'}": "must be SAME_STEP, not NextStep",
}


@pytest.mark.parametrize("code", MISFITS)
def test_environments_that_do_not_fit_are_told_what_must_be(code):
    error = failure(Faulty(code, "make" if "metadata" in code else "step"))
    assert MISFITS[code] in str(error).splitlines()[0]


@LINUX
def test_a_pool_that_is_forgotten_ends_its_workers_even_one_that_is_stopped():
    pool = start_pool(thrust.CartPole, 8, 2)
    os.kill(pool.pids[1], signal.SIGSTOP)
    assert len(mp.active_children()) == 2
    began = time.monotonic()
    del pool
    left = [(process, process.kill()) for process in mp.active_children()]
    assert not left and time.monotonic() - began < 10


PROGRAM = """
import contextlib, os, signal, threading, time, thrust
if __name__ == "__main__":
    pools = [thrust.EnvPool({make_env}, 8, 2, start_method=m) for m in {methods}]
    for pool in pools:
        pool.reset(seed=0), pool.send([0] * 8)
    {code}
"""


def run_program(folder, code, make_env="thrust.CartPole", methods=("fork", "forkserver")):
    """Runs PROGRAM: (exit code, stderr). Seconds later none of its processes may be left."""
    path, running = folder / "program.py", True
    path.write_text(PROGRAM.format(code=code, make_env=make_env, methods=methods))
    process = start(path)
    try:
        code, until = process.wait(60), time.monotonic() + 10
        while running := group(process.pid):
            assert time.monotonic() < until, running
            time.sleep(0.02)
    finally:
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        print(error := process.communicate()[1])
    return code, error


def group(number):
    found = []  # names; zombies do not count
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            found += [name] * (rest.split()[0] != "Z" and rest.split()[2] == str(number))
    return found


@LINUX
def test_workers_end_with_a_learner_that_is_killed_even_if_they_are_stuck(tmp_path):
    stuck = f"__import__({HERE.stem!r}).Faulty('while True: pass')"
    code, _ = run_program(tmp_path, "time.sleep(0.1), os.kill(os.getpid(), 9)", stuck, METHODS)
    assert code == -signal.SIGKILL


@LINUX
def test_workers_end_with_a_program_that_never_closes_its_pools(tmp_path):
    assert run_program(tmp_path, "pools[0].recv()") == (0, "")


@LINUX
def test_ctrl_c_concerns_only_the_learner_and_is_one_traceback(tmp_path):
    program = """with contextlib.suppress(KeyboardInterrupt): os.killpg(0, 2), time.sleep(9)
    threading.Timer(0.2, os.killpg, [0, 2]).start()
    while True: [(pool.recv(), pool.send([0] * 8)) for pool in pools]"""
    code, error = run_program(tmp_path, program)
    assert code == -signal.SIGINT and error.endswith("\nKeyboardInterrupt\n")
    assert error.count("Traceback") == 1 and error.count("KeyboardInterrupt") == 1


# == 7. Runs ===================================================================================


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run, to compare others with: (config, result)."""
    knobs = {"norm_obs": True, "norm_reward": True, "hidden": (32, 16), "anneal": False}
    runs = str(tmp_path_factory.mktemp("undisturbed"))
    config = small(**knobs, total_steps=8 * 16 * 40, runs=runs)
    return config, thrust.train(config)


def assert_same_run(result, other):
    """Equal weights, log, returns, state and snapshots, bit for bit."""
    assert torch.equal(weights_of(result.policy), weights_of(other.policy))
    assert same(result.returns, other.returns) and log_of(result.run) == log_of(other.run)
    (_, saved), (_, others) = map(thrust.load_checkpoint, (result.run, other.run))
    assert all(equal(saved[name], others[name]) for name in ("learner", "snapshots"))


@pytest.mark.parametrize("env", ["CartPole", "test_thrust:gymnasium_cartpole", "Acrobot-v1"])
def test_the_same_config_gives_the_same_weights_and_log_for_any_workers(env, in_tmp):
    if env != "CartPole":
        oracle("gymnasium")
    knobs = {"env": env, "norm_obs": True, "norm_reward": True}
    first, *others = (thrust.train(small(workers=w, **knobs)) for w in range(4))
    for other in others:  # those of three workers have uneven slices
        assert_same_run(first, other)
    names = sorted(path.name for path in (in_tmp / "runs").iterdir())
    assert len(names) == 4 and names[1].endswith("-0-2")  # no folder is used twice


class TwoChoices(Stateless):
    single_action_space = MultiDiscrete([2, 3])

    def step(self, actions):
        return super().step(actions[:, 0] * (actions[:, 1] > 0))


# Box actions; Discrete observations; MultiDiscrete actions
@pytest.mark.parametrize("env", ["Pendulum-v1", "FrozenLake-v1", "test_thrust:TwoChoices"])
def test_every_kind_of_space_trains_and_is_evaluated_again_from_its_run(env, in_tmp, capsys):
    if ":" not in env:
        oracle("gymnasium")
    assert thrust.main([*SMALL_FLAGS, "--env", env]) == 0
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert last_lines[0].startswith("evaluation: mean return")
    assert thrust.main(["--evaluate", f"runs/{env.replace(':', '-')}-0"]) == 0
    assert capsys.readouterr().out.splitlines() == last_lines


@POSIX
def test_killed_again_and_again_a_run_is_bit_for_bit_the_run_that_was_not(undisturbed, in_tmp):
    config, result = undisturbed
    run, flags = in_tmp / "here/there/CartPole-0", "--checkpoint-seconds 0.03 --epochs 4"
    flags += " --num-envs 8 --num-steps 16 --minibatch-size 64 --total-steps 5120 --no-anneal"
    flags += " --hidden 32 16 --norm-obs --norm-reward --eval-episodes 4 --runs here/there"
    for workers in (2, 0, 1):
        flags = f"--resume {run}" if run.exists() else flags
        rows = len(log_of(run)) if run.exists() else 0
        process = start(SOURCE, *flags.split(), "--workers", workers)
        wait_for_rows(process, run / "log.csv", rows + 6)
        process.kill(), process.communicate()
        assert len(log_of(run)) < 40  # it was on its way
    config = dataclasses.replace(config, workers=3)
    assert_same_run(thrust.train(config, resume=run), result)


def test_a_finished_run_can_be_extended_and_what_may_not_change_is_told(in_tmp, capsys):
    thrust.train(small())
    longer = "--resume runs/CartPole-0 --total-steps 1536 --num-steps 32 --epochs 2"
    assert thrust.main(longer.split()) == 0
    rows = log_of("runs/CartPole-0")
    assert [int(row["update"]) for row in rows] == list(range(1, 10))
    assert [int(row["steps"]) for row in rows] == [*range(128, 769, 128), 1024, 1280, 1536]
    assert rows[5]["gradient_steps"] == rows[6]["gradient_steps"] == "8"
    assert json.loads(pathlib.Path("runs/CartPole-0/config.json").read_text())["epochs"] == 2
    capsys.readouterr()
    kept = "--seed 1", "--hidden 8", "--num-envs 4", "--norm-obs", "--norm-reward", "--env my:E"
    for flags in kept:
        assert thrust.main(["--resume", "runs/CartPole-0", *flags.split()]) == 1
        name, error = flags.split()[0][2:].replace("-", "_"), capsys.readouterr().err
        assert f"runs/CartPole-0 has {name} = " in error and "cannot become" in error


def test_an_environment_without_state_is_resumed_in_new_episodes(in_tmp):
    run = "runs/test_thrust-Stateless-0"
    assert thrust.main([*SMALL_FLAGS, "--env", "test_thrust:Stateless"]) == 0
    assert thrust.main(["--resume", run, "--total-steps", "768"]) == 0
    assert [int(row["episodes"]) for row in log_of(run)] == [128 * (i + 1) for i in range(6)]


def test_no_cost_grows_with_the_log(in_tmp):
    sizes = {"num_envs": 2, "num_steps": 2, "minibatch_size": 4, "total_steps": 4 * 600}
    thrust.train(small(**sizes, epochs=1))
    told = json.loads(thrust.load_checkpoint("runs/CartPole-0")[1]["told"])
    steps = [steps for steps, _ in told["curve"]]
    assert 125 <= len(steps) <= 250 and set(np.diff(steps)) == {4 * told["stride"]}


def test_training_leaves_the_process_as_it_was_and_closes_its_pool(in_tmp, monkeypatch):
    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        generators = str(np.random.get_state()), torch.get_rng_state().tolist()
        settings = torch.get_num_threads(), np.get_printoptions(), np.geterr()
        return handlers, generators, settings, mp.active_children()

    began, original = [], thrust.evaluate

    def count(*args):  # when an evaluation begins
        began.append((len(mp.active_children()), torch.get_num_threads()))
        return original(*args)

    monkeypatch.setattr(thrust, "evaluate", count)
    torch.set_num_threads(2)
    before = state()
    thrust.train(small(workers=3, eval_episodes=1))
    thrust.main([*SMALL_FLAGS, "--seed", "1"])
    thrust.main(["--evaluate", "runs/CartPole-1"])
    assert began == [(1, 1), (0, 1), (0, 1)]  # workers of its own, config.threads
    with pytest.raises(RuntimeError, match="NaN or infinity"), np.errstate(all="ignore"):
        thrust.train(small(learning_rate=1e30))
    assert state() == before
    torch.set_num_threads(1)


class Endless(Stateless):
    """An episode that never ends."""

    def step(self, actions):
        obs, reward, terminated, truncated, _ = super().step(actions)
        return obs, np.ones(self.num_envs), truncated, truncated, {}


def test_an_evaluation_that_never_ends_is_cut_off_and_says_so(in_tmp, capsys):
    envs = Endless(3)
    policy = thrust.ActorCritic(envs.single_observation_space, TWO)
    returns, finished = thrust.evaluate(policy, envs, 0, limit=50)
    assert returns.tolist() == [50, 50, 50] and not finished.any()
    assert thrust.main([*SMALL_FLAGS, "--env", "test_thrust:Endless"]) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.endswith("10000.0 ± 0.0 over 2 episodes, 2 of them cut off after 10,000 steps")
    assert {row["mean_return"] for row in log_of("runs/test_thrust-Endless-0")} == {"nan"}


def test_evaluation_counts_first_episodes_only_and_repeats(undisturbed):
    config, result = undisturbed
    envs, seed = thrust.CartPole(4), thrust.derive_seeds(config.seed, 0)[3]
    returns, finished = thrust.evaluate(result.policy, envs, seed)
    assert same(returns, result.returns) and finished.all()
    obs, lengths, running = envs.reset(seed=seed)[0], np.zeros(4), np.ones(4, bool)
    while running.any():
        action = result.policy.to_env(result.policy.act(obs, greedy=True))
        obs, _, terminated, truncated, _ = envs.step(action)
        lengths += running
        running &= ~(terminated | truncated)
    assert lengths.tolist() == returns.tolist()
    with pytest.raises(ValueError, match="must be SAME_STEP"):
        thrust.evaluate(result.policy, NextStep(4), seed)


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_whole(in_tmp, monkeypatch, capsys):
    calls, original = itertools.count(), os.fsync

    def fsync(number):  # from the tenth call on, the disk is full
        if next(calls) >= 9:
            raise OSError(28, "No space left on device")
        original(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert thrust.main([*SMALL_FLAGS, "--checkpoint-seconds", "0"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(in_tmp.rglob("*.tmp"))
    assert thrust.load_checkpoint("runs/CartPole-0")[1]["learner"]["counts"][1] > 0
    assert thrust.main(["--resume", "runs/CartPole-0"]) == 0


def test_of_hundreds_of_flipped_bits_none_is_loaded_as_another_value(undisturbed, in_tmp):
    _, result = undisturbed
    content, rng = (result.run / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    saved, refused = list(thrust.load_checkpoint(result.run)), 0
    for _ in range(300):
        at, forged = rng.integers(len(content)), bytearray(content)
        forged[at] ^= 1 << rng.integers(8)
        pathlib.Path("checkpoint.pt").write_bytes(forged)
        try:
            assert equal(list(thrust.load_checkpoint(".")), saved)
        except ValueError as error:
            refused += "checkpoint.pt cannot be loaded as a run's checkpoint: " in str(error)
    assert refused > 200


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


BAD = {"FileNotFoundError": None, "BadZipFile": b"text", "UnpicklingError": {"config": Evil()}}
BAD |= {"KeyError": {"other": 1}, "ValueError: gamma must": {"config": '{"gamma": 7}'}}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_checkpoint_is_one_sentence_and_not_run(reason, in_tmp, capsys):
    if isinstance(content := BAD[reason], dict):
        torch.save(content, "checkpoint.pt")
    elif content is not None:
        pathlib.Path("checkpoint.pt").write_bytes(content)
    for flag in ("--resume", "--evaluate"):
        assert thrust.main([flag, "."]) == 1
        error = capsys.readouterr().err
        assert f"cannot be loaded as a run's checkpoint: {reason}" in error
        assert error.count("\n") == 1 and not os.path.exists("hacked")


def test_names_of_environments(in_tmp, monkeypatch, capsys):
    """Part 2's, a module's, Gymnasium's, also with Gymnasium's own module: before its id."""
    assert type(thrust.make_env("CartPole", 2)) is thrust.CartPole
    assert thrust.make_env("test_thrust:Stateless", 2).num_envs == 2
    oracle("gymnasium")
    register = "gym.register('Mine/Pole-v5', 'gymnasium.envs.classic_control:CartPoleEnv')"
    (in_tmp / "my_envs.py").write_text(f"import gymnasium as gym\n{register}")
    assert thrust.make_env("my_envs:Mine/Pole-v5", 2).num_envs == 2
    refused = {"no_module:Env": "No module named 'no_module'", "math:Env": "'Env'"}
    refused |= {"Nonsense-v1": "`Nonsense` doesn't exist.", "Acrobot-v1": "gymnasium"}
    for name, sentence in refused.items():
        if name == "Acrobot-v1":
            monkeypatch.setitem(sys.modules, "gymnasium", None)  # as if it were not installed
        assert thrust.main(["--env", name]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


def test_an_environment_that_reuses_its_observation_loses_no_final_obs():
    gym = oracle("gymnasium")

    class Reuses(gym.Env):
        observation_space = gym.spaces.Box(-9, 9, (1,))
        action_space = gym.spaces.Discrete(2)
        obs = np.zeros(1, np.float32)

        def reset(self, *, seed=None, options=None):
            self.obs[:] = 0
            return self.obs, {}

        def step(self, action):
            self.obs += 1
            return self.obs, 1.0, self.obs[0] == 3, False, {}

    gym.register("Reuses-v0", Reuses)
    learner = learner_of(thrust.make_env("Reuses-v0", 1), num_envs=1)
    learner._collect()
    assert learner.rollout.next_obs[:6, 0, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert learner.rollout.obs[:6, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]


no_group = not torch.distributed.is_available() or os.name == "nt"
DISTRIBUTED = pytest.mark.skipif(no_group, reason="no torch.distributed")


@DISTRIBUTED
@pytest.mark.skipif(torch.__version__ < "2.1", reason="older torch's own ranks fail or hang")
def test_two_ranks_under_torchrun_log_save_and_go_on_after_a_kill(in_tmp):
    def torchrun(port, *flags):
        launcher = "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"
        return start(*launcher, port + os.getpid() % 10_000, SOURCE, *flags)

    flags = "--num-envs 4 --num-steps 16 --minibatch-size 32 --total-steps 5120 --norm-obs"
    flags += " --norm-reward --target-kl 0.002 --eval-episodes 4"
    process, run = torchrun(20_000, *flags.split()), in_tmp / "runs/CartPole-0"
    wait_for_rows(process, run / "log.csv", 8)
    process.terminate()  # torchrun passes it on
    process.communicate(timeout=60)
    resumed = torchrun(30_000, "--resume", run)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert re.search(r"\npage: .*\nevaluation: .*\nweights: .*\n$", out)
    assert out.count("training CartPole: 40 updates of 128 steps") == 1
    rows = log_of(run)
    assert [int(row["steps"]) for row in rows] == [128 * (i + 1) for i in range(40)]
    assert any(int(row["gradient_steps"]) < 6 for row in rows)  # target_kl ended some, on both


def one_rank(rank, folder, queue, limits):
    """Trains as one of two ranks of a process group that the caller began."""
    os.chdir(folder)
    torch.distributed.init_process_group("gloo", f"file:{folder}/g?rank={rank}&world_size=2")
    original = thrust.ppo_loss

    def far(*arguments):  # rank 1 alone is far beyond target_kl; the mean of both decides
        loss, stats = original(*arguments)
        return loss, {**stats, "approx_kl": stats["approx_kl"] + rank}

    for limit in limits:  # of the KL
        thrust.ppo_loss = original if limit == math.inf else far
        with contextlib.redirect_stdout(io.StringIO()):
            result = thrust.train(small(norm_obs=True, norm_reward=True, target_kl=limit))
        assert torch.distributed.is_initialized()  # it is the caller's
        moments = [m.numpy() for m in result.policy.normalizer.state_dict().values()]
        queue.put((limit, rank, weights_of(result.policy).numpy(), moments, result.run))
    queue.close(), queue.join_thread()
    os._exit(0)  # leaving a group, or Python with one, hangs at times in some versions of torch


@DISTRIBUTED
def test_ranks_of_somebody_elses_group_keep_equal_weights_and_stop_together(in_tmp):
    context, limits = mp.get_context("spawn"), (math.inf, 0.6, 0.4)
    args = in_tmp, context.Queue(), limits
    ranks = [context.Process(target=one_rank, args=(rank, *args)) for rank in (0, 1)]
    [process.start() for process in ranks]
    results = {r[:2]: r[2:] for r in (args[1].get(timeout=60) for _ in range(6))}
    assert [process.join(20) or process.exitcode for process in ranks] == [0, 0]
    for limit in limits:
        (a, moments, run), (b, others, none) = results[limit, 0], results[limit, 1]
        assert same(a, b) and all(map(same, moments, others)) and none is None
        assert moments[0] == 2 * 8 * 16 * 3  # the rows of both ranks, in three updates
        rows = log_of(run)
        assert [int(row["steps"]) for row in rows] == [256, 512, 768]
        # Their mean KL is about 0.5: above 0.4, so both stop after the first gradient step.
        assert {int(row["gradient_steps"]) for row in rows} == {1 if limit == 0.4 else 8}


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """What training with the defaults gives: (result, lines of output)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        result = thrust.train(thrust.Config(runs=str(tmp_path_factory.mktemp("solved"))))
    return result, output.getvalue().splitlines()


def test_the_defaults_solve_cartpole(solved):
    result, lines = solved
    assert result.returns.tolist() == [500.0] * 100
    assert all(math.isfinite(float(v)) for row in log_of(result.run) for v in row.values())
    assert torch.equal(weights_of(thrust.load(result.run)), weights_of(result.policy))
    names = sorted(path.name for path in result.run.iterdir())
    assert names == ["checkpoint.pt", "config.json", "log.csv", "page.html"]
    assert lines[0].startswith("training CartPole: 97 updates of 2048 steps; everything is ke")
    for passed in ("passed 195, the bar of CartPole-v0", "passed 475, the bar of CartPole-v1"):
        assert [line for line in lines if line.startswith(passed)]
    assert lines[-3] == f"page: {result.run / 'page.html'}"
    assert lines[-2] == "evaluation: mean return 500.0 ± 0.0 over 100 episodes"
    assert re.fullmatch("weights: [0-9a-f]{64}", lines[-1])


# == 8. Command line ===========================================================================


def test_every_knob_is_a_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as done:
        thrust.main(["--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(thrust.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"{field.metadata['help']} (default: {field.default})" in text


class Raises(thrust.CartPole):
    def step(self, actions):
        raise KeyError("door")


class Stubborn(thrust.CartPole):
    """Swallows whatever is raised while it steps."""

    def step(self, actions):
        for i in itertools.count():
            try:
                print("" if i else "stuck\n", end="", flush=True)
                time.sleep(0.05)
            except BaseException:  # a careless environment
                print("swallowed", flush=True)


FAILURES = {
    "--nonsense": "unrecognized arguments: --nonsense",
    "--num-envs many": "argument --num-envs: invalid int value: 'many'",
    "--num-envs 0": "num_envs must be of type int, from 1 to 1000000; got 0",
    "--gamma nan": "gamma must be of type float, from 0 to 1; got nan",
    "--seed": "argument --seed: expected one argument",
    "--num-env 4": "unrecognized arguments: --num-env 4",
    "--resume a --evaluate b": "not allowed with argument",  # up to here flags, with code 2
    "--evaluate nowhere": "nowhere/checkpoint.pt cannot be loaded as a run's checkpoint: ",
    "--env test_thrust:NextStep": "must be SAME_STEP, not NextStep",
    "--env test_thrust:Raises": "thrust: KeyError: 'door' (test_thrust.py, line ",
    "--env test_thrust:Raises --workers 2": "raised while stepping: KeyError: 'door'",
    "--env test_thrust:Stubborn --workers 2 --timeout 0.5": "still stepping after 0.5 s",
    "--runs a_file": "a_file",
    "--device nonsense": "nonsense",
}


@pytest.mark.parametrize("flags", FAILURES)
def test_a_wrong_flag_is_one_line_and_code_2_any_other_failure_one_and_1(flags, in_tmp, capsys):
    (in_tmp / "a_file").write_text("")
    wrong_flag = list(FAILURES).index(flags) < 7
    with pytest.raises(SystemExit) if wrong_flag else contextlib.nullcontext() as done:
        code = thrust.main(flags.split())
    error = capsys.readouterr().err
    assert (done.value.code == 2 if wrong_flag else code == 1) and FAILURES[flags] in error
    assert error.startswith("thrust") and error.count("\n") == 1
    assert not wrong_flag or len(list(in_tmp.iterdir())) == 1


STOPS = [("SIGINT", 130, 2), ("SIGTERM", 143, 0), ("SIGHUP", 129, 2)]


@POSIX
@pytest.mark.parametrize(("name", "code", "workers"), STOPS)
def test_a_signal_ends_a_run_with_its_code_and_nothing_is_lost(name, code, workers, in_tmp):
    flags = "--total-steps", 10**7, "--checkpoint-seconds", "0.05", "--workers", workers
    process = start(SOURCE, *flags)
    wait_for_rows(process, in_tmp / "runs/CartPole-0/log.csv", 8)
    os.killpg(process.pid, getattr(signal, name))  # as a terminal does
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err == "" or (name == "SIGHUP" and "resource_tracker" in err)  # Python's own dies
    assert "stopped; to go on: python thrust.py --resume runs/CartPole-0" in out
    assert thrust.load_checkpoint("runs/CartPole-0")[1]["learner"]["counts"][1] > 0
    assert not list(in_tmp.rglob("*.tmp"))


@POSIX
def test_a_second_signal_ends_what_swallowed_the_first(in_tmp):
    process = start(SOURCE, "--env", "test_thrust:Stubborn")
    assert "training" in process.stdout.readline() and process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "swallowed\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


@POSIX
def test_ignored_signals_stay_ignored_and_no_standard_output_is_needed(in_tmp, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(thrust.CartPole, "close", lambda _: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert thrust.main(SMALL_FLAGS) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# == 9. Page ===================================================================================


class Browser:
    """A headless Chromium that shows one page at a time."""

    def __init__(self, webdriver):
        options, service = webdriver.ChromeOptions(), webdriver.ChromeService()
        options.binary_location = shutil.which("chromium")
        service.path = shutil.which("chromedriver")
        for flag in ("headless=new", "no-sandbox", "disable-gpu"):
            options.add_argument("--" + flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=service)
        self.js, self.cdp = self.driver.execute_script, self.driver.execute_cdp_cmd

    def open(self, page, width=1280, motion="reduce"):
        """Opens a page anew. With motion="reduce", the pole waits."""
        features = [{"name": "prefers-reduced-motion", "value": motion}]
        size = {"width": width, "height": 1300, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setEmulatedMedia", {"features": features})
        self.cdp("Emulation.setDeviceMetricsOverride", size)
        self.logged("browser"), self.logged("performance")  # what was before is forgotten
        self.driver.get(page.as_uri())
        self.wait("document.querySelector('#chart text')")

    def logged(self, kind):
        """What was logged since this was last called."""
        return [entry["message"] for entry in self.driver.get_log(kind)]

    def text(self, id):
        return self.driver.find_element("id", id).text

    def press(self, key, at="body"):
        self.js("document.activeElement.blur()")
        self.driver.find_element("css selector", at).send_keys(key)

    def wait(self, script):
        until = time.monotonic() + 10
        while not self.js("return " + script):
            assert time.monotonic() < until, f"never: {script}"


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromedriver") and not os.environ.get("THRUST_ALL_TESTS"):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    browser = Browser(oracle("selenium.webdriver"))
    yield browser
    browser.driver.quit()


def test_in_the_browser_large_single_steps_and_fifty_free_steps_are_cartpoles(solved, browser):
    browser.open(solved[0].run / "page.html")
    script = "const [s, a] = arguments; return s.map((s, i) => step(s, a[i] ? 10 : -10))"
    rng, env = np.random.default_rng(0), thrust.CartPole(1000)
    env.X_LIMIT = env.ANGLE_LIMIT = np.inf  # plays on wherever the pole is
    for scale, steps, error in (1, 1, 1e-12), (30, 1, 1e-12), (0.02, 50, 1e-9):
        env.set_state({**env.state(), "state": scale * rng.normal(size=(1000, 4))})
        states = env.state()["state"].tolist()
        for actions in rng.integers(2, size=(steps, 1000)):
            env.step(actions)
            states = browser.js(script, states, actions.tolist())
        np.testing.assert_allclose(states, env.state()["state"], rtol=error, atol=error)
        lost = (np.abs(states) > env.single_observation_space.high / 2).any(1)
        assert browser.js("return arguments[0].map(fallen)", states) == lost.tolist()


def test_in_the_browser_every_snapshot_thinks_as_the_policy_did(solved, browser, tmp_path):
    config = thrust.Config(total_steps=16_384, hidden=(8, 4), norm_obs=True, runs=str(tmp_path))
    script = "return policies.map((p) => arguments[0].map((s) => Object.values(think(p, s))))"
    states = np.random.default_rng(2).normal(size=(300, 4)).astype(np.float32)
    states *= np.repeat(np.float32([0.1, 1, 30]), 100)[:, None]
    for run in (solved[0].run, thrust.train(config).run):
        browser.open(run / "page.html")
        thoughts = np.array(browser.js(script, states.tolist()))
        saved, policy = thrust.load_checkpoint(run)[1], thrust.load(run)
        weights = {then["steps"]: then["policy"] for then in saved["snapshots"]}
        weights[saved["learner"]["counts"][1]] = saved["learner"]["policy"]
        steps = browser.js("return policies.map((p) => p.steps)")
        assert steps == list(weights) and steps[0] == 0 and 7 <= len(steps) <= 9
        assert max(np.diff(steps)) < steps[-1] / 3  # spread over training
        for (right, value), then in zip(thoughts.transpose(0, 2, 1), weights.values()):
            policy.load_state_dict(then)
            logprob, _, expected = policy.evaluate(states, torch.ones(300, dtype=torch.int64))
            assert np.abs(right - logprob.detach().exp().numpy()).max() < 1e-5
            np.testing.assert_allclose(value, expected.detach(), rtol=1e-3, atol=1e-5)


def test_pages_are_small_and_silent_and_show_what_there_is(solved, browser, tmp_path):
    oracle("gymnasium")
    sizes = {"num_envs": 8, "minibatch_size": 64, "eval_episodes": 4, "runs": str(tmp_path)}
    short = thrust.train(thrust.Config(**sizes, num_steps=8, total_steps=64)).run
    acrobot = thrust.Config(**sizes, env="Acrobot-v1", num_steps=64, total_steps=6144)
    script = """return [document.documentElement.scrollWidth, $("live").checkVisibility(),
        document.querySelector("polyline").points.length]"""
    for run, read, bar in (
        (solved[0].run, "500 at 198,656 steps", "475 solves CartPole-v1"),
        (short, "none yet", "195 solves CartPole-v0"),  # no episode has ended
        (thrust.train(acrobot).run, r"-[\d.]+ at 6,144 steps", "-100 solves Acrobot-v1"),
    ):
        page, points = run / "page.html", sum(r["mean_return"] != "nan" for r in log_of(run))
        for width in (1280, 360):
            browser.open(page, width, motion="no-preference")
            browser.press(RIGHT + LEFT + "r ")
            asked = [e for e in browser.logged("performance") if 'requestWillBeSent"' in e]
            assert len(asked) == 1 and page.as_uri() in asked[0]
            assert browser.logged("browser") == [] and page.stat().st_size < 500_000
            assert re.fullmatch(read, browser.text("at"))
            assert {bar, "environment steps"} < {*browser.text("chart").split("\n")}
            assert browser.js(script) == [width, "CartPole" in bar, points]


HOME, LEFT, RIGHT = "\ue011", "\ue012", "\ue014"  # keys, as selenium writes them


def test_buttons_keys_slider_and_pointer_do_what_they_say(solved, browser):
    browser.open(solved[0].run / "page.html")

    def ways(id, key):
        return browser.driver.find_element("id", id).click, lambda: browser.press(key)

    for id, key, newtons in (("left", LEFT, -40), ("right", RIGHT, 40)):
        for push in ways(id, key):
            browser.js("begin()")  # or the pole might fall
            push()
            for extra in (newtons, 0):  # in one step, and not in the next
                state, thought = browser.js("return [live.state, live.thought]")
                force = extra + (10 if thought["right"] > 0.5 else -10)
                expected = browser.js("return step(...arguments)", state, force)
                assert browser.js("advance(); return live.state") == expected
    for start_over in ways("again", "r"):
        assert browser.js("advance(); return live.steps") > 0
        start_over()
        assert browser.js("return live.steps") == 0
    for toggle in ways("pause", " "):
        toggle()
        browser.wait("live.steps > 5 && $('pause').textContent === 'Pause'")
        toggle()
        steps, right, value = browser.js("return [live.steps, ...Object.values(live.thought)]")
        shown = [browser.text(id) for id in ("pause", "status", "probability", "value")]
        assert shown == ["Play", f"step {steps}", f"{right:.3f}", f"{value:.1f}"]
        browser.press("r")
    browser.press(LEFT, at="#policy")  # moves the slider only
    assert browser.js("return [$('policy').value, live.arrow]") == ["6", 0]
    browser.press(HOME, at="#policy")
    assert browser.text("age") == "0 steps"
    browser.press(" ")
    browser.wait("$('status').textContent.startsWith('fell at step ')")
    browser.wait("!fallen(live.state)")  # it begins anew
    browser.js("chart({clientX: 0})")
    assert browser.text("at").endswith(" at 2,048 steps")


def test_a_name_cannot_end_the_pages_script(solved, browser, tmp_path):
    saved, page = thrust.load_checkpoint(solved[0].run)[1], tmp_path / "page.html"
    evil = "m:</script><!--<script>alert(1)</script>\"'\\`${P}"
    config = json.dumps({**json.loads(saved["config"]), "env": evil})
    page.write_text(thrust.make_page({**saved, "config": config}), "utf-8")
    browser.open(page)
    assert browser.js("return $('name').textContent") == f"{evil}, seed 0"
    assert browser.logged("browser") == []
