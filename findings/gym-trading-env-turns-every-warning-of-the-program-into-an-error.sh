#!/usr/bin/env bash
# The first TradingEnv that a program makes turns all its later warnings into exceptions.
# gym-trading-env 0.3.5, Gymnasium 1.4.0, NumPy 2.4.6, pandas 3.1.1; seen on 2026-11-28.
#
# Python shows a warning once and goes on. One expects that making an environment changes nothing
# for the rest of the program. The module behind TradingEnv, which Gymnasium imports at the first
# `make`, puts the filter "error", for all kinds and all modules, in front of all others. From
# then on np.log of 0 raises RuntimeWarning where it gave -inf, a deprecated name anywhere raises
# DeprecationWarning, and `python -W ignore` is overruled, as its filter is the older one.
# The exceptions come up in other packages' code, and depend on what was made first (PettingZoo's
# games, which warn when they are imported, could not be imported any more). A run may stop in
# the middle of its training in a line that has nothing to do with trading, and code that says
# `try ... except Exception` quietly takes its other way.
# What helps: import gym_trading_env.environments inside `with warnings.catch_warnings()`, before
# the first `make`: the filters are put back at the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pandas==3.1.1 gymnasium==1.4.0 gym-trading-env==0.3.5
cat >"$folder/show.py" <<'PY'
import sys
import warnings

import gym_trading_env
import gymnasium
import numpy as np
import pandas as pd


def log_of_zero():
    try:
        return str(np.log(np.zeros(1))[0])
    except Exception as error:
        return type(error).__name__


if sys.argv[1] == "fenced":
    with warnings.catch_warnings():
        import gym_trading_env.environments
price = 100 + np.sin(np.arange(99.0))
columns = dict.fromkeys(["open", "high", "low", "close", "volume", "feature_price"], price)
df = pd.DataFrame(columns, index=pd.date_range("2024-01-01", periods=99, freq="h"))
before, filters = log_of_zero(), list(warnings.filters)
gymnasium.make("TradingEnv", df=df, verbose=0)
after, added = log_of_zero(), [f[:3] for f in warnings.filters if f not in filters]
print(f"np.log of 0 before: {before}, after: {after}; new filters: {added}")
expected = "RuntimeWarning" if sys.argv[1] == "bare" else "-inf"
if before != "-inf" or after != expected:
    raise SystemExit("the behaviour has changed")
PY
echo "one is made, under python -W ignore:"
"$folder/venv/bin/python" -W ignore "$folder/show.py" bare
echo "the same, inside catch_warnings:"
"$folder/venv/bin/python" -W ignore "$folder/show.py" fenced
