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
import importlib.util
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
import socket
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch

import thrust

SOURCE = pathlib.Path(thrust.__file__)
HERE = pathlib.Path(__file__)
METHODS = mp.get_all_start_methods()
WALL_CLOCK = ("seconds", "steps_per_second")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="sends signals and reads /proc")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


def oracle(name):
    """Imports a package that newcomers need not have."""
    if os.environ.get("THRUST_ALL_TESTS"):
        return importlib.import_module(name)
    package = name.split(".")[0].replace("_", "-")
    return pytest.importorskip(name, reason=f"needs {package}: pip install {package}")


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


def rows_without_clock(run):
    with open(pathlib.Path(run, "log.csv"), newline="") as file:
        return [
            {k: v for k, v in r.items() if k not in WALL_CLOCK} for r in csv.DictReader(file)
        ]


def command(*flags):
    return [sys.executable, str(SOURCE), *map(str, flags)]


BOX = thrust.Box(-np.ones(4, np.float32), np.ones(4, np.float32), (4,))
TWO = thrust.Discrete(2)


class MultiDiscrete:
    """With the attributes of Gymnasium's."""

    def __init__(self, nvec):
        self.nvec, self.shape, self.dtype = np.array(nvec), np.shape(nvec), np.dtype(np.int64)


class Stateless:
    """An environment of one's own, without a state: a contextual bandit."""

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
        """One step per episode: +1 for the action that the sign of the observation asks for."""
        reward = np.where((self.obs[:, 0] > 0) == (actions == 1), 1.0, -1.0)
        final_obs = self.obs
        self.obs = self.rng.uniform(-1, 1, (self.num_envs, 1)).astype(np.float32)
        always = np.ones(self.num_envs, bool)
        return self.obs, reward, always, ~always, {"final_obs": final_obs}

    def close(self):
        pass


# ==============================================================================================
# 0. The file
# ==============================================================================================

PART = re.compile(r"^# =+\n# (\d)\. (\w[\w ]*)\n# =+\n# Needs: (.*)\n", re.MULTILINE)


def parts():
    """{number: (imports, numbers of the parts it needs, text)} of thrust.py."""
    text = SOURCE.read_text(encoding="utf-8")
    found = list(PART.finditer(text))
    ends = [m.start() for m in found[1:]] + [text.index('\nif __name__ == "__main__"')]
    result = {}
    for match, end in zip(found, ends):
        number, _, needs = match.groups()
        statements = [s for s in needs.split("; ") if not re.match(r"parts? \d", s)]
        numbers = [int(n) for n in re.findall(r"\d", needs.partition("; part")[2])]
        result[int(number)] = statements, numbers, text[match.start() : end]
    return result


def lift(number, folder):
    """Writes a part into a file of its own, with what its Needs line names, and imports it."""
    everything = parts()
    numbers = sorted({*everything[number][1], number})
    pieces = [*itertools.chain(*(everything[n][0] for n in numbers))]
    pieces += [everything[n][2] for n in numbers]
    path = folder / f"lifted_{number}.py"
    path.write_text("\n".join(pieces), encoding="utf-8")
    return importlib.import_module(path.stem)


SMALL_FLAGS = "--num-envs 4 --num-steps 32 --minibatch-size 64 --total-steps 384"
SMALL_FLAGS += " --eval-episodes 2"
USES = {  # an expression with the lifted module m, and its value
    1: ("m.Config(num_steps=16).batch_size", 1024),
    2: ("m.CartPole(3).reset(seed=1)[0].shape", (3, 4)),
    3: ("m.ActorCritic(BOX, TWO).act(np.zeros((3, 4))).shape", (3,)),
    4: ("m.gae(*np.ones((3, 1, 1)), *np.zeros((2, 1, 1), bool), 0.5, 0.9)[0].item()", 0.5),
    5: ("m.PPO(thrust.CartPole(8), m.Config(**vars(small()))).update()['steps']", 128),
    6: ("[p.step([0] * 4)[0].shape for p in [m.EnvPool(thrust.CartPole, 4, 2)]]", [(4, 4)]),
    7: ("len(m.train(m.Config(**vars(small()))).returns)", 4),
    8: ("m.main(SMALL_FLAGS.split())", 0),
    9: ("m.make_page(m.load_checkpoint(thrust.train(small()).run)[1])[-8:]", "</html>\n"),
}


@pytest.mark.parametrize("number", USES)
def test_each_part_can_be_lifted_with_what_it_says_it_needs(number, in_tmp):
    assert list(parts()) == list(USES)
    expression, value = USES[number]
    assert eval(expression, {**globals(), "m": lift(number, in_tmp)}) == value


def test_importing_it_does_nothing_but_define_names(tmp_path):
    state = "random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()"
    code = (
        "import random, sys, threading, torch, numpy as np\n"
        f"before = {state}\n"
        f"sys.path.insert(0, {str(SOURCE.parent)!r}); import thrust\n"
        f"assert before == ({state}) and threading.active_count() == 1\n"
        "assert not any(name.startswith('torch._dynamo') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


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


def test_the_loop_at_the_end_of_part_5_trains_and_leaves_no_trace(tmp_path):
    text = SOURCE.read_text(encoding="utf-8")
    loop = re.search(r"\n#\n((?:#     .*\n){4})#\n", text.split("PPO is complete here")[1])[1]
    loop = re.sub("^#     ", "", loop, flags=re.MULTILINE)
    program = (
        "import os, random, numpy as np, torch\n"
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r})\n"
        "from thrust import *\n"
        "def state(): return (random.getstate(), str(np.random.get_state()),\n"
        "    torch.get_rng_state().tolist(), torch.get_num_threads(), os.listdir('.'))\n"
        "torch.set_num_threads(2); before = state()\n"
        + loop.replace("Config()", "Config(total_steps=6144)")
        + "assert state() == before\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == ""
    returns = [float(line) for line in done.stdout.splitlines()]
    assert len(returns) == 3 and all(10 < mean < 100 for mean in returns)


# ==============================================================================================
# 1. Config
# ==============================================================================================


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"num_envs": 0}, "num_envs must be of type int, from 1 to 1000000; got 0"),
        ({"num_envs": 64.0}, "num_envs must be of type int"),
        ({"num_envs": True}, "num_envs must be of type int"),
        ({"num_envs": "64"}, "num_envs must be of type int"),
        ({"num_envs": [64]}, "num_envs must be of type int"),
        ({"gamma": math.nan}, "gamma must be of type float, from 0 to 1; got nan"),
        ({"gamma": 1.5}, "gamma must be"),
        ({"clip": False}, "clip must be of type float"),
        ({"learning_rate": math.inf}, "learning_rate must be"),
        ({"learning_rate": -1e-3}, "learning_rate must be"),
        ({"target_kl": None}, "target_kl must be"),
        ({"anneal": 1}, "anneal must be of type bool"),
        ({"env": 5}, "env must be of type str"),
        ({"hidden": (64, 0)}, "hidden must be of type tuple, from 1 to 100000"),
        ({"hidden": (64, 6.4)}, "hidden must be"),
        ({"hidden": 64}, "hidden must be"),
        ({"seed": -1}, "seed must be"),
        ({"minibatch_size": 2}, "minibatch_size must be of type int, from 3"),
        ({"workers": 65}, "workers must be at most 64; got 65"),
        ({"total_steps": 2047}, "total_steps must be at least one rollout, num_envs"),
    ],
)
def test_impossible_values_are_refused_with_knob_rule_and_value(knobs, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        thrust.Config(**knobs)


def test_ints_do_for_floats_lists_for_tuples_and_sizes_follow_from_the_knobs():
    config = thrust.Config(gamma=1, hidden=[32], num_envs=8, num_steps=100, total_steps=2500)
    assert (config.gamma, config.hidden, config.batch_size, config.num_updates) == (
        1,
        (32,),
        800,
        3,
    )


# ==============================================================================================
# 2. CartPole
# ==============================================================================================


def balance(obs):
    """Actions of a simple controller that keeps poles up for a long time, not for ever."""
    return ((obs[:, 2] + 0.5 * obs[:, 3] + 0.02 * obs[:, 1]) > 0).astype(np.int64)


def test_it_is_gymnasiums_cartpole_bit_for_bit():
    gym = oracle("gymnasium")
    n, steps, rng, ends = 8, 13_000, np.random.default_rng(1), [0, 0]
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    theirs = gym.make_vec("CartPole-v1", n, "sync", mode)
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
            ends = [ends[0] + expected[2].sum(), ends[1] + expected[3].sum()]
        obs = got[0]
    assert same(theirs.reset()[0], ours.reset()[0])  # without a seed, the streams go on
    assert ends[0] > 1000 and ends[1] > 10


def test_physics_are_the_papers_equations():
    env, rng = thrust.CartPole(500), np.random.default_rng(0)
    env.reset(seed=0)
    start = env.state()
    start["state"] = rng.uniform(-1, 1, (500, 4)) * [2.3, 3.0, 0.2, 3.0]
    env.set_state(start)
    actions = rng.integers(0, 2, 500)
    _, _, terminated, _, info = env.step(actions)
    for i, (x, x_dot, theta, theta_dot) in enumerate(start["state"]):  # math's, one at a time
        temp = ((20 * actions[i] - 10) + 0.05 * theta_dot**2 * math.sin(theta)) / 1.1
        theta_acc = (9.8 * math.sin(theta) - math.cos(theta) * temp) / (
            0.5 * (4.0 / 3.0 - 0.1 * math.cos(theta) ** 2 / 1.1)
        )
        x_acc = temp - 0.05 * theta_acc * math.cos(theta) / 1.1
        x, theta = x + 0.02 * x_dot, theta + 0.02 * theta_dot
        reached = [x, x_dot + 0.02 * x_acc, theta, theta_dot + 0.02 * theta_acc]
        assert terminated[i] == (abs(x) > 2.4 or abs(theta) > math.radians(12))
        # Float32 keeps 24 bits, so half a unit of its last place is 2**-24 of a number.
        np.testing.assert_allclose(info["final_obs"][i], reached, rtol=2**-23)
    assert 0 < terminated.sum() < 500


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


def test_what_it_returns_is_the_callers():
    env = thrust.CartPole(2)
    kept = [env.reset(seed=0)[0], *env.step(np.array([0, 1]))[:4]]
    copies = [array.copy() for array in kept]
    kept[2][:] = 7
    for _ in range(30):
        assert env.step(np.array([0, 1]))[1].tolist() == [1.0, 1.0]
    assert all(same(a, b) for a, b in zip(kept[:2] + kept[3:], copies[:2] + copies[3:]))


@pytest.mark.parametrize(
    "actions",
    [
        [0, 1],
        [[0, 1, 0]],
        [0, 1, 2],
        [0, -1, 1],
        [0.0, 1.0, 0.0],
        [True, False, True],
        1,
        "011",
    ],
)
def test_what_is_no_action_is_refused_and_changes_nothing(actions):
    env = thrust.CartPole(3)
    env.reset(seed=0)
    before = env.state()
    with pytest.raises(ValueError, match="actions must be 3 integers, 0 or 1; got"):
        env.step(np.array(actions))
    assert all(same(before[k], array) for k, array in env.state().items())


# ==============================================================================================
# 3. ActorCritic
# ==============================================================================================


def make_policy(seed=0, space=TWO, hidden=(64, 64), scale=1.0, **options):
    """A policy; `scale` makes its probabilities differ more than at first."""
    policy = thrust.ActorCritic(BOX, space, hidden, seed=seed, **options)
    policy.actor[-1].weight.data *= scale
    return policy


def test_initial_weights_are_orthogonal_with_gains_and_leave_the_global_generator():
    before = torch.get_rng_state()
    policy = make_policy()
    assert torch.equal(before, torch.get_rng_state())
    linear = [layer for layer in policy.modules() if isinstance(layer, torch.nn.Linear)]
    gains = [2, 2, 0.01**2, 2, 2, 1]  # squared, of the actor's layers and the critic's
    for layer, gain in zip(linear, gains):
        w = layer.weight.detach().double()
        product = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        torch.testing.assert_close(
            product / gain, torch.eye(len(product)).double(), atol=1e-5, rtol=0
        )
        assert not layer.bias.any()
    assert torch.equal(weights_of(make_policy(5)), weights_of(make_policy(5)))
    assert not torch.equal(weights_of(make_policy(5)), weights_of(make_policy(6)))


@pytest.mark.parametrize("nvec", [[5], [3, 2, 4], [[2, 3], [3, 2]]])
def test_choices_are_independent_categoricals(nvec):
    flat, g = np.ravel(nvec).tolist(), torch.Generator().manual_seed(1)
    space = thrust.Discrete(5) if nvec == [5] else MultiDiscrete(nvec)
    policy, obs = make_policy(space=space, scale=300), torch.randn(2000, 4, generator=g)
    action = policy.act(obs, generator=g)
    assert action.dtype == torch.int64 and action.shape == (2000, *space.shape)
    action = action.view(2000, -1)
    assert action.amax(0).tolist() == [n - 1 for n in flat] and not action.amin(0).any()
    outputs = policy.actor(obs).view(2000, len(flat), max(flat))
    several = [
        torch.distributions.Categorical(logits=outputs[:, i, :n]) for i, n in enumerate(flat)
    ]
    logprob, entropy, value = policy.evaluate(obs, action.view(2000, *space.shape))
    torch.testing.assert_close(logprob, sum(c.log_prob(a) for c, a in zip(several, action.T)))
    torch.testing.assert_close(entropy, sum(c.entropy() for c in several))
    assert torch.equal(value, policy.value(obs)) and value.shape == (2000,)
    greedy = torch.stack([c.probs.argmax(-1) for c in several], -1)
    assert torch.equal(policy.act(obs, greedy=True).view(2000, -1), greedy)
    (logprob + entropy).sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.actor.parameters())


def test_actions_are_drawn_with_the_policys_probabilities():
    policy, g, n = (
        make_policy(space=thrust.Discrete(4)),
        torch.Generator().manual_seed(0),
        200_000,
    )
    policy.actor[-1].bias.data[:] = torch.tensor([2.0, 0.0, -1.0, 1.0])
    drawn = policy.act(torch.zeros(n, 4), generator=g)
    frequency, expected = torch.bincount(drawn) / n, policy.actor[-1].bias.softmax(0)
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_real_actions_are_normal_kept_raw_and_clipped_only_for_the_environment():
    space = thrust.Box(np.full((2, 1), -0.5, np.float32), np.ones((2, 1), np.float32), (2, 1))
    policy, obs, g = (
        make_policy(space=space),
        torch.randn(5000, 4),
        torch.Generator().manual_seed(1),
    )
    policy.log_std.data[:] = torch.tensor([0.0, 0.5])
    action = policy.act(obs, generator=g)
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


def test_discrete_observations_are_one_hot_and_starts_are_honoured():
    space = thrust.Discrete(3, start=-1)
    policy = thrust.ActorCritic(space, thrust.Discrete(2, start=5), ())
    policy.critic[0].weight.data[:] = torch.tensor([10.0, 20.0, 30.0])
    assert policy.value(np.array([-1, 1, 0, 1])).tolist() == [10, 30, 20, 30]
    action = policy.act(np.array([0, 1]), greedy=True)
    assert set(action.tolist()) <= {0, 1} and same(policy.to_env(action), action.numpy() + 5)


def test_observations_may_be_arrays_or_tensors_of_any_shape_but_not_one_alone():
    space = thrust.Box(np.zeros((2, 3)), np.ones((2, 3)), (2, 3))
    policy, obs = (
        thrust.ActorCritic(space, TWO, (8,)),
        np.random.default_rng(0).normal(size=(5, 2, 3)),
    )
    assert torch.equal(policy.value(obs), policy.value(torch.tensor(obs)))
    for wrong in (obs[0], obs.reshape(5, 6), np.float32(1)):
        with pytest.raises(ValueError, match=r"observations must be \(k, \*\(2, 3\)\), got"):
            policy.act(wrong)


@pytest.mark.parametrize(
    ("spaces", "sentence"),
    [
        (
            (MultiDiscrete([2]), TWO),
            "observations cannot be .*MultiDiscrete.*, only Box or Discrete",
        ),
        ((BOX, "text"), "actions cannot be text, only Discrete, MultiDiscrete or Box"),
    ],
)
def test_unknown_spaces_are_refused_by_name(spaces, sentence):
    with pytest.raises(ValueError, match=sentence):
        thrust.ActorCritic(*spaces)
    with pytest.raises(ValueError, match="only Box with norm_obs"):
        thrust.ActorCritic(TWO, TWO, norm_obs=True)


def test_a_normalizer_knows_the_moments_of_all_that_was_counted_in_at_any_offset():
    normalizer, rng = thrust.Normalizer(3), np.random.default_rng(0)
    rows = rng.normal(size=(1000, 3)) * [1e-3, 1, 100] + [1e5, 0, -3]
    for part in np.split(rows, [10, 300, 310]):
        x = torch.from_numpy(part)
        normalizer.count_in(len(x), x.mean(0), x.var(0, unbiased=False))
    assert normalizer.count == 1000
    np.testing.assert_allclose(normalizer.mean, rows.mean(0), rtol=1e-14, atol=1e-12)
    np.testing.assert_allclose(normalizer.var, rows.var(0), rtol=1e-8)
    policy = make_policy()
    policy.normalizer = thrust.Normalizer(4)
    policy.normalizer.count_in(9, torch.arange(4.0).double(), torch.full((4,), 4.0).double())
    obs = np.array([[2.0, 3, 4, 999]])
    seen = torch.tensor([[1.0, 1, 1, 10]])  # kept within ±10
    assert torch.equal(policy.value(obs), make_policy().value(seen))


# ==============================================================================================
# 4. Rollout
# ==============================================================================================


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
    buffer = buffers.RolloutBuffer(
        T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", lam, gamma, N
    )
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
    tensors = [
        torch.from_numpy(np.ascontiguousarray(a.T))[..., None] for a in arrays
    ]  # (N, T, 1)
    theirs = functional.generalized_advantage_estimate(0.97, 0.9, *tensors)
    ours = thrust.gae(rewards, values, next_values, terminated, truncated, 0.97, 0.9)
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(
            mine, other[..., 0].numpy().T, atol=1e-6
        )  # theirs has float32 parts


def test_a_rollout_keeps_what_was_reached_in_the_environments_own_dtype():
    obs = np.arange(6, dtype=np.uint8).reshape(2, 3)
    rollout = thrust.Rollout(4, obs, torch.zeros(2, 5))
    objects = np.array([None, np.full(3, 9, np.uint8)], object)  # as Gymnasium has it
    flags = np.array([False, True]), np.array([False, False])
    rollout.add(1, obs, np.array([1, 2]), *flags, {"final_obs": objects})
    assert rollout.next_obs.dtype == np.uint8
    assert rollout.next_obs[1].tolist() == [[0, 1, 2], [9, 9, 9]]
    assert rollout.reward[1].tolist() == [1, 2] and rollout.action.shape == (4, 2, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("obs", np.zeros((2, 1), np.float32)),
        ("obs", np.zeros((2, 4), complex)),
        ("reward", np.zeros((2, 1))),
        ("reward", 1.0),
        ("terminated", np.zeros(2)),
        ("truncated", np.zeros(3, bool)),
    ],
)
def test_what_would_be_broadcast_or_cut_off_is_refused_by_name(name, value):
    rollout = thrust.Rollout(4, np.zeros((2, 4), np.float32), torch.zeros(2))
    step = {"obs": np.zeros((2, 4), np.float32), "reward": np.zeros(2)}
    step |= {"terminated": np.zeros(2, bool), "truncated": np.zeros(2, bool), "info": {}}
    with pytest.raises(ValueError, match=rf"{name} must be .*; got"):
        rollout.add(0, **{**step, name: value})


# ==============================================================================================
# 5. PPO
# ==============================================================================================


def some_batch(policy, size, seed=0, drift=0.3):
    """A batch whose old log-probabilities differ from the policy's by about `drift`."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(size, 4, generator=g)
    action = policy.act(obs, generator=g)
    logprob = policy.evaluate(obs, action)[0].detach()
    noise = drift * torch.randn(size, generator=g)
    return thrust.Batch(obs, action, logprob + noise, *torch.randn(2, size, generator=g))


def learner_of(envs=None, **knobs):
    config = small(**knobs)
    return thrust.PPO(envs or thrust.CartPole(config.num_envs), config)


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


def test_shapes_that_would_broadcast_are_refused():
    batch = some_batch(make_policy(), 8)
    with pytest.raises(AssertionError, match="would make"):
        thrust.ppo_loss(make_policy(), batch._replace(returns=batch.returns[:, None]), small())


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
    theirs = sb3.PPO(
        "MlpPolicy", gym.make("CartPole-v1"), n_steps=size, batch_size=size, n_epochs=1,
        learning_rate=1e-3, clip_range=0.2, device="cpu", seed=0, **knobs
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

    adam = thrust.Adam(policy)
    before = adam.weights.clone()
    loss, stats = thrust.ppo_loss(policy, batch, config)
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
        loss, stats = original(policy, batch, config)
        with torch.no_grad():
            ratio = (policy.evaluate(batch.obs, batch.action)[0] - batch.logprob).exp()
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
    envs = thrust.CartPole(8, max_episode_steps=15)
    learner = learner_of(envs, norm_reward=True)
    learner.update()
    learner._collect()
    batch, r = learner._advantages(*learner._estimate()), learner.rollout
    assert r.truncated.any() and r.terminated.any()
    ended = r.terminated | r.truncated
    assert same(r.next_obs[:-1][~ended[:-1]], r.obs[1:][~ended[:-1]])
    assert (np.abs(r.next_obs[ended]).max(1) > np.abs(r.obs).max(2).min()).any()
    starts = np.abs(r.obs[1:][ended[:-1]])
    assert (starts <= 0.05).all() and not (np.abs(r.next_obs[ended]) <= 0.05).all(1).any()
    with torch.no_grad():
        value = [learner.policy.value(x.reshape(-1, 4)).numpy() for x in (r.obs, r.next_obs)]
    values, next_values = (v.reshape(16, 8) for v in value)
    rewards = r.reward / learner.reward_normalizer.std().item()
    flags, config = (r.terminated, r.truncated), learner.config
    expected = gae_by_definition(rewards, values, next_values, *flags, config.gamma, 0.95)
    # The values are float32, up to 20: their last bit is 2**-20.
    np.testing.assert_allclose(batch.advantage.view(16, 8), expected, atol=1e-4)
    np.testing.assert_allclose(batch.returns.view(16, 8), expected + values, atol=1e-4)


def test_rewards_are_scaled_by_the_deviation_of_discounted_sums(monkeypatch):
    learner = learner_of(thrust.CartPole(8, max_episode_steps=9), norm_reward=True, gamma=0.9)
    sums, running = [], np.zeros(8)
    for _ in range(3):
        learner.update()
        for reward, ended in zip(
            learner.rollout.reward, learner.rollout.terminated | learner.rollout.truncated
        ):
            running = 0.9 * running + reward
            sums.append(running.copy())
            running[ended] = 0
    assert learner.reward_normalizer.std().item() == pytest.approx(np.std(sums), rel=1e-12)


@pytest.mark.parametrize(
    ("size", "pieces"), [(512, 2), (128, 5), (100, 6), (513, 1), (9999, 1)]
)
def test_minibatches_cover_the_rollout_in_almost_equal_pieces(size, pieces):
    learner = learner_of(num_envs=27, num_steps=19, total_steps=10**4, minibatch_size=size)
    numbers = torch.arange(513)
    batch = thrust.Batch(numbers.float()[:, None], *(numbers,) * 4)
    epochs = list(learner._minibatches(batch))
    assert len(epochs) == 4 * pieces
    passes = [
        torch.cat([b.action for b in epochs[i::1][:pieces]])
        for i in range(0, 4 * pieces, pieces)
    ]
    assert all(torch.equal(p.sort()[0], numbers) for p in passes)
    assert not torch.equal(passes[0], passes[1])
    lengths = {len(b.action) for b in epochs}
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= size
    for b in epochs:  # rows stay together
        assert torch.equal(b.obs[:, 0].long(), b.action) and torch.equal(b.returns, b.action)


def test_a_batch_that_is_one_larger_than_a_minibatch_still_learns():
    """(A defect of the first edition: the minibatch of one that was left ruined training.)"""
    config = thrust.Config(
        num_envs=27, num_steps=19, minibatch_size=512, total_steps=513 * 120, seed=3
    )
    learner = thrust.PPO(thrust.CartPole(27), config)
    rows = [learner.update() for _ in range(config.num_updates)]
    assert rows[-1]["mean_return"] > 150 and max(row["value_loss"] for row in rows) < 1e3


@pytest.mark.parametrize("target", [math.inf, 1e-4, 0.0])
def test_target_kl_ends_the_whole_update(target):
    row = learner_of(epochs=10, target_kl=target, learning_rate=3e-2).update()
    assert (
        row["gradient_steps"] == 20 if target == math.inf else 1 <= row["gradient_steps"] < 10
    )


def test_the_learning_rate_falls_from_full_to_almost_zero_and_never_below():
    learner = learner_of(learning_rate=1.0)
    rates = [learner.update()["learning_rate"] for _ in range(8)]
    np.testing.assert_allclose(rates, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0], atol=1e-12)
    assert learner_of(anneal=False).update()["learning_rate"] == small().learning_rate


def test_a_contextual_bandit_is_solved_completely():
    knobs = {"num_envs": 64, "num_steps": 8, "minibatch_size": 128, "learning_rate": 1e-2}
    config = thrust.Config(**knobs, total_steps=64 * 8 * 40)
    learner = thrust.PPO(Stateless(64), config)
    for _ in range(40):
        row = learner.update()
    assert (
        row["mean_return"] > 0.9 and row["mean_length"] == 1 and row["episodes"] == 64 * 8 * 40
    )
    magnitude = torch.linspace(0.05, 1, 100)
    obs = torch.cat([-magnitude, magnitude])[:, None]
    assert torch.equal(learner.policy.act(obs, greedy=True), (obs[:, 0] > 0).long())


class Offset(Stateless):
    """The bandit, seen with an offset far larger than its deviation, in float64."""

    single_observation_space = thrust.Box(np.zeros(1), np.ones(1), (1,), np.float64)

    def reset(self, *, seed=None):
        return 1e5 + 1e-3 * super().reset(seed=seed)[0].astype(float), {}

    def step(self, actions):
        obs, *others, info = super().step(actions)
        info["final_obs"] = 1e5 + 1e-3 * info["final_obs"].astype(float)
        return 1e5 + 1e-3 * obs.astype(float), *others, info


def test_an_offset_does_not_keep_normalised_observations_from_being_learned_from():
    config = thrust.Config(
        num_envs=64, num_steps=8, minibatch_size=128, norm_obs=True, total_steps=64 * 8 * 60
    )
    learner = thrust.PPO(Offset(64), config)
    rows = [learner.update() for _ in range(60)]
    assert rows[-1]["mean_return"] > 0.8
    normalizer = learner.policy.normalizer
    assert normalizer.count == 64 * 8 * 60 and normalizer.mean.item() == pytest.approx(
        1e5, abs=1e-3
    )


class Whole(Stateless):
    """Pays minus the distance of a whole number from 3."""

    single_action_space = thrust.Box(np.full(1, -9), np.full(1, 9), (1,), np.int64)

    def step(self, actions):
        assert actions.dtype == np.int64 and (abs(actions) <= 9).all()
        obs, _, *others = super().step(np.zeros(self.num_envs))
        return obs, -np.abs(actions[:, 0] - 3.0), *others


def test_whole_numbers_as_actions_are_learned_from_as_they_were_drawn():
    config = thrust.Config(
        num_envs=64, num_steps=8, minibatch_size=128, total_steps=64 * 8 * 80
    )
    learner = thrust.PPO(Whole(64), config)
    learner.update()
    action = learner.rollout.action
    assert action.dtype == torch.float32 and not torch.equal(action, action.round())
    for _ in range(79):
        row = learner.update()
    assert row["mean_return"] > -0.7


class NextStep(thrust.CartPole):
    metadata = {"autoreset_mode": "NextStep"}


@pytest.mark.parametrize(
    ("envs", "knobs", "sentence"),
    [
        (NextStep(8), {}, "must be SAME_STEP, not NextStep: make it with SyncVectorEnv"),
        (thrust.CartPole(4), {}, "config.num_envs is 8, envs has 4"),
    ],
)
def test_environments_that_do_not_fit_are_refused(envs, knobs, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        learner_of(envs, **knobs)


class Broken(thrust.CartPole):
    """Returns NaN or infinity from its 40th step on."""

    what = "obs", np.nan

    def step(self, actions):
        self.done = getattr(self, "done", 0) + 1
        result = list(super().step(actions))
        if self.done > 40:
            result[("obs", "reward").index(self.what[0])][1] = self.what[1]
        return tuple(result)


@pytest.mark.parametrize("name", ["obs", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("norm", [False, True])
def test_nan_and_infinity_end_training_before_they_are_saved(
    name, value, norm, in_tmp, monkeypatch
):
    monkeypatch.setattr(thrust, "CartPole", type("B", (Broken,), {"what": (name, value)}))
    with (
        np.errstate(all="ignore"),
        pytest.raises(RuntimeError, match="update 3 led to NaN or inf"),
    ):
        thrust.train(small(norm_obs=norm, norm_reward=norm, checkpoint_seconds=0))
    learner = thrust.load_checkpoint("runs/CartPole-0")[1]["learner"]
    assert learner["counts"][1] == 2 * 128
    flat = [learner["running"], *learner["adam"].values(), *learner["policy"].values()]
    assert all(tensor.isfinite().all() for tensor in flat)


@pytest.mark.parametrize("knobs", [{}, {"norm_obs": True, "norm_reward": True}])
def test_a_learner_goes_on_exactly_from_its_state(knobs):
    first, second = learner_of(**knobs), learner_of(**knobs, seed=5)
    for _ in range(2):
        first.update()
    state = first.state_dict()
    rows = [first.update() for _ in range(2)]
    assert not equal(state, first.state_dict())  # copies
    second.config = first.config
    second.load_state_dict(state)
    assert equal(state, second.state_dict())
    again = [second.update() for _ in range(2)]
    for a, b in zip(rows, again):
        assert {**a, "steps_per_second": 0} == {**b, "steps_per_second": 0}
    assert equal(first.state_dict(), second.state_dict())


def test_seeds_of_runs_ranks_and_updates_never_meet():
    starts = []
    for seed, rank, update in itertools.product(range(100), range(4), (0, 1, 50)):
        _, environments, _, evaluation = thrust.derive_seeds(seed, rank, update)
        starts += [(environments, 4096), (evaluation, 1000)]
    starts.sort()
    assert all(a + width <= b for (a, width), (b, _) in zip(starts, starts[1:]))
    assert starts[-1][0] + 10**6 < 2**63


# ==============================================================================================
# 6. EnvPool
# ==============================================================================================

ZEROS, ONES = np.zeros(8, int), np.ones(8, int)
SHORT = functools.partial(thrust.CartPole, max_episode_steps=20)  # so that some are truncated
start_pool = functools.partial(thrust.EnvPool, start_method=METHODS[0])  # Python's own choice


def gymnasium_cartpole(num_envs):
    import gymnasium as gym

    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return gym.make_vec("CartPole-v1", num_envs, "sync", mode, max_episode_steps=20)


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


def check_same(envs, reference, steps):
    """Plays both alike; every bit must agree. Returns how many were terminated, truncated."""
    ends, rng = np.zeros(2, int), np.random.default_rng(0)
    for _ in range(steps):
        actions = rng.integers(0, 2, reference.num_envs)
        *got, info = envs.step(actions)
        *expected, expected_info = reference.step(actions)
        ended = expected[2] | expected[3]
        if ended.any():
            got.append(info.pop("final_obs")[ended])
            expected.append(np.stack(expected_info["final_obs"][ended]))
        assert info == {} and all(map(same, got, expected))
        ends += expected[2].sum(), expected[3].sum()
    return ends


def check_refused(pool, sentence):
    env = thrust.CartPole(8)
    env.reset()
    calls = [pool.reset, pool.state, lambda: pool.send(ZEROS), lambda: pool.step(ZEROS)]
    for call in [*calls, lambda: pool.set_state(env.state())]:
        with pytest.raises(RuntimeError, match=rf"^{sentence}$"):
            call()


@pytest.mark.parametrize("cut", [(1,), (2,), (3,), *((2, m) for m in METHODS[1:])])
def test_a_pool_gives_the_same_bits_as_one_process(cut):
    with pool_and_reference(SHORT, 7, *cut) as both:
        assert all(check_same(*both, 300) > 20)


@pytest.mark.parametrize("workers", [1, 3])
def test_gymnasiums_environments_run_in_a_pool_and_have_an_empty_state(workers):
    oracle("gymnasium")
    with pool_and_reference(gymnasium_cartpole, 4, workers) as both:
        assert all(check_same(*both, 200) > 5) and both[0].state() == {}
        both[0].set_state({}), both[0].reset()


@np.printoptions(precision=3, threshold=2)
def test_how_the_caller_prints_arrays_changes_nothing():
    with pool_and_reference(SHORT) as both:
        check_same(*both, 50)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_environment_i_is_seeded_seed_plus_i_and_goes_on_without_a_seed(workers):
    envs = [thrust.CartPole(1) for _ in range(7)]
    with start_pool(thrust.CartPole, 7, workers) as pool:
        for seed in (40, None, None, 7):
            alone = [env.reset(seed=seed and seed + i)[0] for i, env in enumerate(envs)]
            assert same(pool.reset(seed=seed)[0], np.concatenate(alone))


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


def test_results_stand_in_the_same_memory_until_the_next_send():
    with start_pool(functools.partial(thrust.CartPole, max_episode_steps=1), 8, 2) as pool:
        obs, _ = pool.reset(seed=0)
        *first, info = pool.step(ZEROS)
        first += [obs, info["final_obs"]]
        kept = [array.copy() for array in first]
        assert pool.state() and all(map(same, first, kept))
        *second, info = pool.step(ZEROS)
        second += [second[0], info["final_obs"]]
        assert all(map(np.shares_memory, first, second)) and all(map(same, first, second))
        assert not same(first[0], kept[0]) and not same(first[-1], kept[-1])


def test_send_does_not_wait_for_workers_and_recv_waits_for_all(tmp_path):
    gate = tmp_path / "gate"
    code = f"while not os.path.exists({str(gate)!r}): time.sleep(0.001)"
    with pool_and_reference(Faulty(code)) as (pool, reference):
        pool.send(ZEROS)  # if this waited, it would do so for ever
        threading.Timer(0.2, gate.touch).start()
        assert same(pool.recv()[0], reference.step(ZEROS)[0])


def test_calls_out_of_order_are_one_sentence_and_change_nothing():
    with pool_and_reference() as (pool, reference):
        for _ in range(2):
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


@pytest.mark.parametrize("actions", [ZEROS[:2], ZEROS[:, None], ZEROS / 1])
def test_actions_that_do_not_fit_are_refused_and_the_pool_goes_on(actions):
    sentence = f"action must be int64 (8,); got {actions.dtype} {actions.shape}"
    with pool_and_reference() as (pool, reference):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            pool.step(actions)
        check_same(pool, reference, 5)


@pytest.mark.parametrize("workers", [-1, 0, 5])
def test_numbers_of_workers_that_do_not_fit_are_refused(workers):
    with pytest.raises(ValueError, match=f"4 environments cannot have {workers} workers"):
        start_pool(thrust.CartPole, 4, workers)


def failure(make_env, **options):
    """How 8 environments in 2 workers fail, in their first step or before. None is left."""
    pool = None
    with pytest.raises(thrust.WorkerError) as caught:
        pool = start_pool(make_env, 8, 2, **options)
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
    ("while True: pass", "was still {} after 0.5 s", (None,)),
]
CASES = [(*fault, "step", method) for fault in FAULTS for method in METHODS]
CASES += [(*fault, at, METHODS[0]) for fault in FAULTS[:2] for at in ("make", "reset")]
MISFITS = [
    ("result[0] = result[0][:, :3]", "obs must be float32 (4, 4); got float32 (4, 3)"),
    ("result[0] = result[0][:3]", "obs must be float32 (4, 4); got float32 (3, 4)"),
    ("result[1] = result[1][:, None]", "reward must be float64 (4,); got float64 (4, 1)"),
    ("result[2] = result[2] / 1", "terminated must be bool (4,); got float64 (4,)"),
    ("result[3] = False", "truncated must be bool (4,); got bool ()"),
    (
        "result[2:] = result[2] | True, result[3], {'final_obs': np.zeros((4, 1), 'f')}",
        "final_obs must be float32 (4, 4); got float32 (4, 1)",
    ),
    ("result[0].metadata = {'autoreset_mode': 'NextStep'}", "must be SAME_STEP, not NextStep"),
]


@pytest.mark.parametrize(("code", "sentence", "exitcodes", "moment", "method"), CASES)
def test_a_worker_that_fails_is_one_error(code, sentence, exitcodes, moment, method):
    if "kill" in code and os.name == "nt":
        pytest.skip("needs SIGKILL")
    timeout = 0.5 if "while" in code else 60
    error = failure(Faulty(code, moment), start_method=method, timeout=timeout)
    doing = {"make": "starting", "reset": "resetting", "step": "stepping"}[moment]
    line, *after = str(error).splitlines()
    assert line == "worker 1 (environments 4 to 7) " + sentence.format(doing)
    trace = ["Traceback (most recent call last):", "KeyError: 7"] if "raise" in code else []
    assert after[:1] + after[-1:] == trace and error.exitcode in exitcodes


@pytest.mark.parametrize(("code", "sentence"), MISFITS)
def test_environments_that_do_not_fit_are_told_what_must_be(code, sentence):
    error = failure(Faulty(code, "make" if "metadata" in code else "step"))
    assert sentence in str(error).splitlines()[0]


def test_a_pool_that_is_forgotten_ends_its_workers():
    pool = start_pool(thrust.CartPole, 8, 2)
    assert len(mp.active_children()) == 2
    del pool
    assert not mp.active_children()


@LINUX
def test_a_pool_with_a_stopped_worker_closes_within_seconds():
    pool = start_pool(thrust.CartPole, 8, 2)
    os.kill(pool.pids[1], signal.SIGSTOP)
    began = time.monotonic()
    pool.close()
    left = [(process, process.kill()) for process in mp.active_children()]
    assert not left and time.monotonic() - began < 10


PROGRAM = """
import contextlib, os, signal, threading, time, thrust
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs may ignore it
    pools = [thrust.EnvPool({make_env}, 8, 2, start_method=m) for m in {methods}]
    for pool in pools:
        pool.reset(seed=0), pool.send([0] * 8)
    {code}
"""


def run_program(folder, code, make_env="thrust.CartPole", methods=("fork", "forkserver")):
    """Runs PROGRAM: (exit code, stderr). Seconds later none of its processes may be left."""
    path, running = folder / "program.py", True
    path.write_text(PROGRAM.format(**locals()))
    process = subprocess.Popen(
        [sys.executable, path], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
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


# ==============================================================================================
# 7. Runs
# ==============================================================================================


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run, to compare others with: (config, result)."""
    config = small(total_steps=8 * 16 * 40, runs=str(tmp_path_factory.mktemp("undisturbed")))
    return config, thrust.train(config)


def assert_same_run(result, other):
    """Equal weights, log, returns and snapshots, bit for bit."""
    assert torch.equal(weights_of(result.policy), weights_of(other.policy))
    assert same(result.returns, other.returns)
    assert rows_without_clock(result.run) == rows_without_clock(other.run)
    (_, saved), (_, others) = map(thrust.load_checkpoint, (result.run, other.run))
    assert equal(saved["learner"], others["learner"])
    assert equal(saved["snapshots"], others["snapshots"])


def uneven_cartpole(num_envs):
    """Gymnasium's CartPole, with a time limit, so that final_obs are objects of its own."""
    gym = oracle("gymnasium")
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return gym.make_vec("CartPole-v1", num_envs, "sync", mode, max_episode_steps=30)


@pytest.mark.parametrize("env", ["CartPole", "test_thrust:uneven_cartpole", "Acrobot-v1"])
def test_the_same_config_gives_the_same_weights_and_log_for_any_workers(env, in_tmp):
    if env != "CartPole":
        oracle("gymnasium")
    results = [
        thrust.train(small(env=env, workers=workers, norm_obs=True, norm_reward=True))
        for workers in (0, 1, 2, 3)  # three workers have uneven slices
    ]
    for other in results[1:]:
        if env == "CartPole":
            assert_same_run(results[0], other)
        assert torch.equal(weights_of(results[0].policy), weights_of(other.policy))
        assert rows_without_clock(results[0].run) == rows_without_clock(other.run)
    names = sorted(path.name for path in (in_tmp / "runs").iterdir())
    assert len(names) == 4 and names[1].endswith("-0-2")  # no folder is used twice


class TwoChoices(thrust.CartPole):
    """A CartPole with two buttons: it is pushed to the right if both or neither are pressed."""

    def __init__(self, num_envs):
        super().__init__(num_envs)
        self.single_action_space = MultiDiscrete([2, 2])

    def step(self, actions):
        return super().step((actions[:, 0] == actions[:, 1]).astype(np.int64))


@pytest.mark.parametrize("env", ["Pendulum-v1", "FrozenLake-v1", "test_thrust:TwoChoices"])
def test_every_kind_of_space_trains_and_is_evaluated_again_from_its_run(env, in_tmp, capsys):
    # Box actions; Discrete observations; MultiDiscrete actions
    if ":" not in env:
        oracle("gymnasium")
    assert thrust.main([*SMALL_FLAGS.split(), "--env", env]) == 0
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    assert last_lines[0].startswith("evaluation: mean return")
    assert thrust.main(["--evaluate", f"runs/{env.replace(':', '-')}-0"]) == 0
    assert capsys.readouterr().out.splitlines() == last_lines


def kill_when(process, log, rows):
    """Kills a training once its log has so many rows."""
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()


@POSIX
def test_killed_again_and_again_a_run_is_bit_for_bit_the_run_that_was_not(undisturbed, in_tmp):
    config, result = undisturbed
    log, flags = in_tmp / "runs/CartPole-0/log.csv", ["--checkpoint-seconds", "0.03"]
    for name in (
        "num_envs",
        "num_steps",
        "minibatch_size",
        "total_steps",
        "epochs",
        "eval_episodes",
    ):
        flags += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    for i, workers in enumerate((2, 0, 1)):
        start = flags if i == 0 else ["--resume", "runs/CartPole-0"]
        process = subprocess.Popen(
            command(*start, "--workers", workers), stdout=subprocess.DEVNULL
        )
        rows = log.read_text().count("\n") if log.exists() else 0
        kill_when(process, log, max(rows, 1) + 6)
        assert log.read_text().count("\n") < 41  # it was on its way
    config = dataclasses.replace(config, runs="runs", workers=3)
    assert_same_run(thrust.train(config, resume="runs/CartPole-0"), result)


def test_a_finished_run_can_be_extended_and_what_may_not_change_is_told(in_tmp, capsys):
    thrust.train(small())
    longer = ["--resume", "runs/CartPole-0", "--total-steps", "1536", "--epochs", "2"]
    assert thrust.main(longer) == 0
    rows = rows_without_clock("runs/CartPole-0")
    assert [int(row["steps"]) for row in rows] == [128 * (i + 1) for i in range(12)]
    assert rows[5]["gradient_steps"] == "8" and rows[6]["gradient_steps"] == "4"
    assert json.loads(pathlib.Path("runs/CartPole-0/config.json").read_text())["epochs"] == 2
    capsys.readouterr()
    for flags in (
        "--seed 1",
        "--hidden 8",
        "--num-envs 4",
        "--norm-obs",
        "--norm-reward",
        "--env my:Env",
    ):
        assert thrust.main(["--resume", "runs/CartPole-0", *flags.split()]) == 1
        name = flags.split()[0][2:].replace("-", "_")
        error = capsys.readouterr().err
        assert f"runs/CartPole-0 has {name} = " in error and "cannot become" in error


def test_an_environment_without_state_is_resumed_in_new_episodes(in_tmp):
    flags = [*SMALL_FLAGS.split(), "--env", "test_thrust:Stateless"]
    assert thrust.main(flags) == 0
    assert (
        thrust.main(["--resume", "runs/test_thrust-Stateless-0", "--total-steps", "768"]) == 0
    )
    rows = rows_without_clock("runs/test_thrust-Stateless-0")
    assert [int(row["episodes"]) for row in rows] == [128 * (i + 1) for i in range(6)]


def test_the_log_has_a_row_for_every_update_and_the_checkpoint_is_data(undisturbed):
    config, result = undisturbed
    rows = rows_without_clock(result.run)
    assert [int(row["update"]) for row in rows] == list(range(1, config.num_updates + 1))
    assert rows[0]["mean_return"] != "nan" or float(rows[0]["episodes"]) == 0
    assert all(math.isfinite(float(v)) for row in rows[3:] for v in row.values())
    assert json.loads((result.run / "config.json").read_text())["num_envs"] == config.num_envs
    loaded = thrust.load(result.run)
    assert torch.equal(weights_of(loaded), weights_of(result.policy))
    assert len(thrust.load_checkpoint(result.run)[1]["snapshots"]) == 8
    assert sorted(p.name for p in result.run.iterdir()) == [
        "checkpoint.pt", "config.json", "log.csv", "page.html"
    ]  # fmt: skip


def test_no_cost_grows_with_the_log(in_tmp):
    thrust.train(
        small(num_envs=2, num_steps=2, minibatch_size=4, epochs=1, total_steps=4 * 1200)
    )
    told = json.loads(thrust.load_checkpoint("runs/CartPole-0")[1]["told"])
    steps = [steps for steps, _ in told["curve"]]
    assert 125 <= len(steps) <= 250 and set(np.diff(steps)) == {4 * told["stride"]}


def test_training_leaves_the_process_as_it_found_it(in_tmp):
    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        return [
            str(np.random.get_state()), torch.get_rng_state().tolist(), torch.get_num_threads(),
            np.get_printoptions(), np.geterr(), handlers, mp.active_children(),
        ]  # fmt: skip

    torch.set_num_threads(2)
    before = state()
    thrust.train(small(workers=2))
    thrust.main([*SMALL_FLAGS.split(), "--seed", "1"])
    with pytest.raises(RuntimeError, match="NaN or infinity"), np.errstate(all="ignore"):
        thrust.train(small(learning_rate=1e30))
    assert state() == before
    torch.set_num_threads(1)


class Endless(Stateless):
    """An episode that never ends."""

    def step(self, actions):
        obs, reward, terminated, truncated, _ = super().step(actions)
        return obs, np.ones(self.num_envs), truncated, truncated, {}


def test_an_evaluation_that_never_ends_is_cut_off_and_says_so(in_tmp, capsys, monkeypatch):
    envs = Endless(3)
    policy = thrust.ActorCritic(envs.single_observation_space, TWO)
    returns, finished = thrust.evaluate(policy, envs, 0, limit=50)
    assert returns.tolist() == [50, 50, 50] and not finished.any()
    assert thrust.main([*SMALL_FLAGS.split(), "--env", "test_thrust:Endless"]) == 0
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.endswith("10000.0 ± 0.0 over 2 episodes, 2 of them cut off after 10,000 steps")
    rows = rows_without_clock("runs/test_thrust-Endless-0")
    assert [row["mean_return"] for row in rows] == ["nan"] * 3


def test_evaluation_counts_first_episodes_only_and_repeats(undisturbed):
    config, result = undisturbed
    envs, seed = thrust.CartPole(4), thrust.derive_seeds(config.seed, 0)[3]
    returns, finished = thrust.evaluate(result.policy, envs, seed)
    assert same(returns, result.returns) and finished.all()
    envs.reset(seed=seed)
    obs, lengths, running = envs.reset(seed=seed)[0], np.zeros(4), np.ones(4, bool)
    while running.any():
        action = result.policy.to_env(result.policy.act(obs, greedy=True))
        obs, _, terminated, truncated, _ = envs.step(action)
        lengths += running
        running &= ~(terminated | truncated)
    assert lengths.tolist() == returns.tolist()
    with pytest.raises(ValueError, match="must be SAME_STEP"):
        thrust.evaluate(result.policy, NextStep(4), seed)


def test_the_training_pool_is_closed_before_the_evaluation_begins(in_tmp, monkeypatch):
    seen, original = [], thrust.evaluate

    def spy(policy, envs, seed):
        seen.append(len(mp.active_children()))
        return original(policy, envs, seed)

    monkeypatch.setattr(thrust, "evaluate", spy)
    thrust.train(small(workers=3, eval_episodes=1))
    assert seen == [1]


def fill_disk(monkeypatch, after):
    """From the so-many-th call of fsync on, the disk is full."""
    calls, original = itertools.count(), os.fsync

    def fsync(number):
        if next(calls) >= after:
            raise OSError(28, "No space left on device")
        original(number)

    monkeypatch.setattr(os, "fsync", fsync)


def test_on_a_full_disk_training_stops_with_the_systems_sentence_and_a_whole_checkpoint(
    in_tmp, monkeypatch, capsys
):
    fill_disk(monkeypatch, after=9)
    assert thrust.main([*SMALL_FLAGS.split(), "--checkpoint-seconds", "0"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    os.chdir(in_tmp)
    assert not list(in_tmp.rglob("*.tmp"))
    assert 0 < thrust.load_checkpoint("runs/CartPole-0")[1]["learner"]["counts"][1] <= 384
    assert thrust.main(["--resume", "runs/CartPole-0"]) == 0


def test_of_a_thousand_flipped_bytes_none_is_loaded_as_another_value(undisturbed, in_tmp):
    _, result = undisturbed
    content, rng = (result.run / "checkpoint.pt").read_bytes(), np.random.default_rng(0)
    saved, refused = thrust.load_checkpoint(result.run), 0
    for _ in range(300):
        at, forged = rng.integers(len(content)), bytearray(content)
        forged[at] ^= 1 << rng.integers(8)
        pathlib.Path("checkpoint.pt").write_bytes(forged)
        try:
            assert equal(list(thrust.load_checkpoint(".")), list(saved))
        except ValueError as error:
            assert str(error).startswith(
                "checkpoint.pt cannot be loaded as a run's checkpoint: "
            )
            refused += 1
    assert refused > 200


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be loaded as a run's checkpoint: FileNotFoundError"),
        (b"", "cannot be loaded as a run's checkpoint: BadZipFile"),
        (b"text", "cannot be loaded as a run's checkpoint: BadZipFile"),
        ({"config": Evil()}, "cannot be loaded as a run's checkpoint: UnpicklingError"),
        ({"other": 1}, "cannot be loaded as a run's checkpoint: KeyError"),
        (
            {"config": '{"gamma": 7}'},
            "cannot be loaded as a run's checkpoint: ValueError: gamma must",
        ),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence_and_not_run(content, sentence, in_tmp, capsys):
    if isinstance(content, dict):
        torch.save(content, "checkpoint.pt")
    elif content is not None:
        pathlib.Path("checkpoint.pt").write_bytes(content)
    for flag in ("--resume", "--evaluate"):
        assert thrust.main([flag, "."]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not os.path.exists("hacked")


def test_names_of_environments(in_tmp, monkeypatch, capsys):
    """Part 2's, a module's, Gymnasium's, also with Gymnasium's own module: before its id."""
    assert type(thrust.make_env("CartPole", 2)) is thrust.CartPole
    assert thrust.make_env("test_thrust:Stateless", 2).num_envs == 2
    oracle("gymnasium")
    (in_tmp / "my_envs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Mine/Pole-v5', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    assert thrust.make_env("my_envs:Mine/Pole-v5", 2).num_envs == 2
    refused = {"no_module:Env": "No module named 'no_module'", "math:Env": "'Env'"}
    refused["Nonsense-v1"] = "Environment `Nonsense` doesn't exist."
    for name, sentence in refused.items():
        assert thrust.main(["--env", name]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert thrust.main(["--env", "Acrobot-v1"]) == 1
    assert "gymnasium" in capsys.readouterr().err


def test_an_environment_that_reuses_its_observation_loses_no_final_obs(monkeypatch):
    gym = oracle("gymnasium")

    class Reuses(gym.Env):
        observation_space = gym.spaces.Box(-9, 9, (1,))
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.obs = getattr(self, "obs", np.zeros(1, np.float32))
            self.obs[:] = 0
            return self.obs, {}

        def step(self, action):
            self.obs += 1
            return self.obs, 1.0, self.obs[0] == 3, False, {}

    monkeypatch.setitem(
        gym.registry, "Reuses-v0", gym.envs.registration.EnvSpec("Reuses-v0", Reuses)
    )
    envs = thrust.make_env("Reuses-v0", 2)
    learner = thrust.PPO(envs, small(num_envs=2, minibatch_size=8))
    learner._collect()
    assert learner.rollout.next_obs[:6, 0, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert learner.rollout.obs[:6, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]


def torchrun(*flags):
    """Starts training on two ranks in the current folder; their output can be read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launcher, f"--master_port={port}", str(SOURCE), *flags], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


DISTRIBUTED = pytest.mark.skipif(
    not torch.distributed.is_available() or os.name == "nt", reason="no torch.distributed"
)
RANKS = "--num-envs 4 --num-steps 16 --minibatch-size 32 --total-steps 5120 --norm-obs"
RANKS += " --norm-reward --target-kl 0.002 --eval-episodes 4"


@DISTRIBUTED
@pytest.mark.skipif(torch.__version__ < "2", reason="torchrun of torch 1.13 fails by itself")
def test_two_ranks_under_torchrun_log_save_and_go_on_after_a_kill(in_tmp):
    process, log = torchrun(*RANKS.split()), in_tmp / "runs/CartPole-0/log.csv"
    while not log.exists() or log.read_text().count("\n") < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()  # torchrun passes it on
    process.communicate(timeout=60)
    resumed = torchrun("--resume", "runs/CartPole-0")
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert [line.partition(" ")[0] for line in out.splitlines()[-3:]] == [
        "page:",
        "evaluation:",
        "weights:",
    ]
    assert out.count("training CartPole: 40 updates of 128 steps") == 1
    rows = rows_without_clock("runs/CartPole-0")
    assert [int(row["steps"]) for row in rows] == [128 * (i + 1) for i in range(40)]
    assert any(int(row["gradient_steps"]) < 6 for row in rows)  # target_kl ended some, on both


def one_rank(rank, port, folder, kl, queue):
    """Trains as one of two ranks of a process group that the caller began."""
    options = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **options)
    os.chdir(folder)
    if kl and rank == 1:  # this rank alone is far beyond target_kl; the mean of both decides
        original = thrust.ppo_loss

        def far(*arguments):
            loss, stats = original(*arguments)
            return loss, {**stats, "approx_kl": stats["approx_kl"] + 1.0}

        thrust.ppo_loss = far
    with contextlib.redirect_stdout(io.StringIO()):
        result = thrust.train(small(norm_obs=True, norm_reward=True, target_kl=kl or math.inf))
    assert torch.distributed.is_initialized()  # it is the caller's
    moments = result.policy.normalizer.state_dict().values()
    queue.put(
        (rank, weights_of(result.policy).numpy(), [m.numpy() for m in moments], result.run)
    )


@DISTRIBUTED
@pytest.mark.parametrize("kl", [0, 0.6, 0.4])
def test_ranks_of_somebody_elses_group_keep_equal_weights_and_stop_together(kl, in_tmp):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=one_rank, args=(rank, port, in_tmp, kl, queue))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    (_, a, moments, run), (_, b, others, none) = sorted(
        (queue.get(timeout=60) for _ in ranks), key=lambda r: r[0]
    )
    for process in ranks:
        process.join(10)
    assert same(a, b) and all(map(same, moments, others)) and none is None
    assert moments[0] == 2 * 8 * 16 * 3  # the rows of both ranks, in three updates
    rows = rows_without_clock(in_tmp / run)
    assert [int(row["steps"]) for row in rows] == [256, 512, 768]
    # Their mean KL is about 0.5: above 0.4, so both stop after the first gradient step.
    assert {int(row["gradient_steps"]) for row in rows} == {1 if kl == 0.4 else 8}


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """What training with the defaults gives: (result, lines of output)."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        folder = str(tmp_path_factory.mktemp("solved"))
        result = thrust.train(thrust.Config(runs=folder))
    return result, output.getvalue().splitlines()


def test_the_defaults_solve_cartpole(solved):
    result, lines = solved
    assert result.returns.tolist() == [500.0] * 100
    assert lines[0].startswith(
        "training CartPole: 97 updates of 2048 steps; everything is kept"
    )
    assert [line for line in lines if line.startswith("passed 195, the bar of CartPole-v0")]
    assert [line for line in lines if line.startswith("passed 475, the bar of CartPole-v1")]
    assert lines[-3] == f"page: {result.run / 'page.html'}"
    assert lines[-2] == "evaluation: mean return 500.0 ± 0.0 over 100 episodes"
    assert re.fullmatch("weights: [0-9a-f]{64}", lines[-1])


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
    assert "(default: (64, 64))" in text and "(default: 0.006)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--num-envs many", "argument --num-envs: invalid int value: 'many'"),
        ("--num-envs 0", "num_envs must be of type int, from 1 to 1000000; got 0"),
        ("--gamma nan", "gamma must be of type float, from 0 to 1; got nan"),
        ("--seed", "argument --seed: expected one argument"),
        ("--num-env 4", "unrecognized arguments: --num-env 4"),
        ("--resume a --evaluate b", "not allowed with argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, message, in_tmp, capsys):
    with pytest.raises(SystemExit) as done:
        thrust.main(flags.split())
    error = capsys.readouterr().err
    assert done.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--evaluate nowhere",
            "thrust: nowhere/checkpoint.pt cannot be loaded as a run's check",
        ),
        ("--env test_thrust:NextStep", "must be SAME_STEP, not NextStep"),
        ("--env test_thrust:Raises", "thrust: KeyError: 'door' (test_thrust.py, line "),
        ("--env test_thrust:Raises --workers 2", "raised while stepping: KeyError: 'door'"),
        ("--env test_thrust:Stubborn --workers 2 --timeout 0.5", "still stepping after 0.5 s"),
        ("--runs a_file", "a_file"),
        ("--device nonsense", "nonsense"),
    ],
)
def test_other_failures_are_one_line_and_exit_code_1(flags, message, in_tmp, capsys):
    (in_tmp / "a_file").write_text("")
    assert thrust.main(flags.split()) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("thrust: ")


class Raises(thrust.CartPole):
    def step(self, actions):
        raise KeyError("door")


def test_flags_reach_the_run_and_a_run_can_be_evaluated_with_others(in_tmp, capsys):
    flags = f"{SMALL_FLAGS} --seed 3 --hidden 8 4 --no-anneal --gamma 0.9 --runs here/there"
    assert thrust.main(flags.split()) == 0
    config = thrust.load_checkpoint("here/there/CartPole-3")[0]
    assert (config.hidden, config.anneal, config.gamma) == ((8, 4), False, 0.9)
    capsys.readouterr()
    assert thrust.main(["--evaluate", "here/there/CartPole-3", "--eval-episodes", "7"]) == 0
    assert "over 7 episodes" in capsys.readouterr().out


def test_without_a_standard_output_it_trains_all_the_same(in_tmp):
    program = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import thrust\n"
    program += f"sys.stdout = None; sys.exit(thrust.main({SMALL_FLAGS.split()!r}))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert thrust.load_checkpoint("runs/CartPole-0")


class Stubborn(thrust.CartPole):
    """Swallows whatever is raised while it steps."""

    def step(self, actions):
        while True:
            try:
                time.sleep(0.05)
            except BaseException:  # a careless environment
                print("swallowed", flush=True)


@POSIX
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_a_run_with_its_code_and_nothing_is_lost(name, code, workers, in_tmp):
    flags = "--total-steps", 10**8, "--checkpoint-seconds", "0.05", "--workers", workers
    process = subprocess.Popen(
        command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    log = in_tmp / "runs/CartPole-0/log.csv"
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, name))  # as a terminal does
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err == b"" or (name == "SIGHUP" and b"resource_tracker" in err)  # Python's own dies
    assert b"stopped; to go on: python thrust.py --resume runs/CartPole-0" in out
    assert thrust.load_checkpoint("runs/CartPole-0")[1]["learner"]["counts"][1] > 0
    assert not list(in_tmp.rglob("*.tmp"))


@POSIX
def test_a_second_signal_ends_what_swallowed_the_first(in_tmp):
    process = subprocess.Popen(
        command("--env", "test_thrust:Stubborn"), stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent)},
    )  # fmt: skip
    assert b"training" in process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"swallowed\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


@POSIX
def test_a_signal_that_was_ignored_stays_ignored(in_tmp):
    """nohup, for example, starts programs with SIGHUP ignored."""
    flags = SMALL_FLAGS.split()
    program = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    program += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command(*flags)[1:]], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


# ==============================================================================================
# 9. Page
# ==============================================================================================

HOME, LEFT, RIGHT = "\ue011", "\ue012", "\ue014"  # keys, as selenium writes them


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

    def open(self, page, width=1280, scheme="light", motion="reduce"):
        """Opens a page anew. With motion="reduce", the pole waits."""
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in media.items()]
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

    def ways(self, id, key):
        click = self.driver.find_element("id", id).click
        return click, lambda: self.press(key), lambda: self.press(" ", at="#" + id)

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
    rng = np.random.default_rng(0)
    for scale, steps, error in (1, 1, 1e-12), (30, 1, 1e-12), (0.02, 50, 1e-9):
        env = thrust.CartPole(1000)
        env.X_LIMIT = env.ANGLE_LIMIT = np.inf  # plays on wherever the pole is
        env.reset(seed=0)
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
        assert browser.js("return policies.map((p) => p.steps)") == list(weights)
        for (right, value), then in zip(thoughts.transpose(0, 2, 1), weights.values()):
            policy.load_state_dict(then)
            logprob, _, expected = policy.evaluate(states, torch.ones(300, dtype=torch.int64))
            assert np.abs(right - logprob.detach().exp().numpy()).max() < 1e-5
            np.testing.assert_allclose(value, expected.detach(), rtol=1e-3, atol=1e-5)


def test_in_the_browser_the_untrained_policy_falls_and_the_last_one_stands(solved, browser):
    browser.open(solved[0].run / "page.html")
    starts = np.random.default_rng(3).uniform(-0.05, 0.05, (100, 4)).tolist()
    script = """$("policy").value = arguments[0]; return arguments[1].map((state) => {
        begin();
        live.state = state;
        for (draw(); live.steps < 500 && !fallen(live.state);) advance();
        return live.steps; })"""
    untrained, last = (np.array(browser.js(script, policy, starts)) for policy in (0, 7))
    assert untrained.max() < 500 and (last == 500).sum() >= 99


def test_pages_are_small_and_silent_and_show_what_there_is(solved, browser, tmp_path):
    oracle("gymnasium")
    small = {"num_envs": 8, "minibatch_size": 64, "eval_episodes": 4, "runs": str(tmp_path)}
    short = thrust.train(thrust.Config(**small, num_steps=8, total_steps=64)).run
    acrobot = thrust.Config(**small, env="Acrobot-v1", num_steps=64, total_steps=6144)
    script = """return [document.documentElement.scrollWidth, $("live").checkVisibility(),
        getComputedStyle($("chart")).color, document.querySelector("polyline").points.length]"""
    for run, read, bar in (
        (solved[0].run, "500 at 198,656 steps", "475 solves CartPole-v1"),
        (short, "none yet", "195 solves CartPole-v0"),  # no episode has ended
        (thrust.train(acrobot).run, r"-[\d.]+ at 6,144 steps", "-100 solves Acrobot-v1"),
    ):
        page, log = run / "page.html", np.genfromtxt(run / "log.csv", delimiter=",", names=True)
        points = np.isfinite(log["mean_return"]).sum()
        for width, scheme, ink in (1280, "light", "0, 0, 0"), (360, "dark", "255, 255, 255"):
            browser.open(page, width, scheme, motion="no-preference")
            browser.press(RIGHT + LEFT + "r ")
            asked = [e for e in browser.logged("performance") if 'requestWillBeSent"' in e]
            assert len(asked) == 1 and page.as_uri() in asked[0]
            assert browser.logged("browser") == [] and page.stat().st_size < 500_000
            assert re.fullmatch(read, browser.text("at"))
            assert {bar, "environment steps"} < {*browser.text("chart").split("\n")}
            assert browser.js(script) == [width, "CartPole" in bar, f"rgb({ink})", points]


def test_buttons_and_keys_do_what_they_say(solved, browser):
    browser.open(solved[0].run / "page.html")
    for id, key, newtons in (("left", LEFT, -40), ("right", RIGHT, 40)):
        for push in browser.ways(id, key):
            browser.js("begin()")  # or the pole might fall
            push()
            for extra in (newtons, 0):  # in one step, and not in the next
                state, thought = browser.js("return [live.state, live.thought]")
                force = extra + (10 if thought["right"] > 0.5 else -10)
                expected = browser.js("return step(...arguments)", state, force)
                assert browser.js("advance(); return live.state") == expected
    for start_over in browser.ways("again", "r"):
        before = browser.js("advance(); return live.state")
        start_over()
        state, steps = browser.js("return [live.state, live.steps]")
        assert steps == 0 and state != before and 0 < np.abs(state).max() < 0.05
    for toggle in browser.ways("pause", " "):
        toggle()
        browser.wait("live.steps > 5 && $('pause').textContent === 'Pause'")
        toggle()
        steps, right, value = browser.js("return [live.steps, ...Object.values(live.thought)]")
        time.sleep(0.1)
        shown = [browser.text(id) for id in ("pause", "status", "probability", "value")]
        assert shown == ["Play", f"step {steps}", f"{right:.3f}", f"{value:.1f}"]
        browser.press("r")
    script = """return document.body.dispatchEvent(new KeyboardEvent("keydown",
        {key: "ArrowLeft", bubbles: true, cancelable: true, [arguments[0]]: true}))"""
    assert all(browser.js(script, key) for key in ("altKey", "ctrlKey", "metaKey"))  # not ours


def test_the_slider_goes_over_seven_to_nine_moments_spread_over_training(solved, browser):
    browser.open(solved[0].run / "page.html")
    steps = browser.js("return policies.map((p) => p.steps)")
    assert 7 <= len(steps) <= 9 and (steps[0], steps[-1]) == (0, 198_656)
    assert min(np.diff(steps)) > 0 and max(np.diff(steps)) < 198_656 / 6


def test_the_slider_goes_back_to_a_policy_that_falls_and_begins_anew(solved, browser):
    browser.open(solved[0].run / "page.html", motion="no-preference")
    browser.press(LEFT, at="#policy")  # moves the slider only
    assert browser.js("return [$('policy').value, live.arrow]") == ["6", 0]
    browser.press(HOME, at="#policy")
    assert browser.text("age") == "0 steps"
    browser.wait("$('status').textContent.startsWith('fell at step ')")
    browser.wait("!fallen(live.state)")


def test_the_pole_moves_fifty_times_a_second_and_waits_where_motion_is_reduced(solved, browser):
    for motion, button, expected in (("reduce", "Play", 0), ("no-preference", "Pause", 50)):
        browser.open(solved[0].run / "page.html", motion=motion)
        assert browser.text("pause") == button
        rates = []
        while not rates or (len(rates) < 8 and rates[-1] < 0.9 * expected):  # a busy machine?
            before = browser.js("return [live.steps, performance.now() / 1000]")
            time.sleep(0.5)
            after = browser.js("return [live.steps, performance.now() / 1000]")
            rates.append((after[0] - before[0]) / (after[1] - before[1]))
        assert abs(rates[-1] - expected) < 5


def test_pointer_and_tap_read_a_value_off_the_curve(solved, browser):
    browser.open(solved[0].run / "page.html", width=360)
    labels = browser.driver.find_elements("css selector", "#chart text")
    place = {label.text: label.rect for label in labels}
    log = np.genfromtxt(solved[0].run / "log.csv", delimiter=",", names=True)
    mouse, touch = ("Mouse", "mouseMoved"), ("Touch", "touchStart")
    for (device, kind), steps in ((mouse, 0), (mouse, 100_000), (touch, 0)):
        label = place["100K" if steps else "0"]
        at = {"x": label["x"] + label["width"] / 2, "y": place["100K"]["y"] - 50}
        browser.cdp(f"Input.dispatch{device}Event", {"type": kind, **at, "touchPoints": [at]})
        value, count = map(float, browser.text("at").replace(",", "").split()[::2])
        row = min(log, key=lambda row: abs(row["steps"] - steps))
        assert [count, value] == pytest.approx([row["steps"], row["mean_return"]], abs=0.005)


def test_names_cannot_end_the_pages_script(solved, browser, tmp_path):
    saved, page = thrust.load_checkpoint(solved[0].run)[1], tmp_path / "page.html"
    for evil in "</script><script>alert(1)</script>", "<!--<script>", "\"'\\`${P}":
        config = json.dumps({**json.loads(saved["config"]), "env": f"module:{evil}"})
        page.write_text(thrust.make_page({**saved, "config": config}), "utf-8")
        browser.open(page)
        shown = browser.js("return [document.title, $('name').textContent]")
        assert shown == [f"module:{evil}, seed 0"] * 2 and browser.logged("browser") == []


def breaks(num_envs):
    """CartPoles that fail in their hundredth step."""
    env = thrust.CartPole(num_envs)
    steps = [env.step] * 99
    env.step = lambda actions: steps.pop()(actions)
    return env


def test_a_run_that_was_stopped_has_the_page_of_its_last_checkpoint(browser, tmp_path):
    for seconds, steps in ((0.0, 6144), (1e6, 0)):  # between checkpoints
        knobs = {"checkpoint_seconds": seconds, "runs": str(tmp_path / str(steps))}
        with pytest.raises(IndexError):
            thrust.train(thrust.Config(env=f"{__name__}:breaks", **knobs))
        (page,) = tmp_path.glob(f"{steps}/*/page.html")
        browser.open(page)
        assert browser.text("summary") == f"Trained by Thrust for {steps:,} of 200,000 steps."
        assert browser.text("at").endswith(f" at {steps:,} steps" if steps else "none yet")
        assert browser.logged("browser") == []
