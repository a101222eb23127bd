"""``python -m benchmarks [NAME[:CASE] ...]``: all of them if none is named."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

NAMES = sorted(found.name for found in pkgutil.iter_modules(benchmarks.__path__) if not found.name.startswith("_"))

for wanted in sys.argv[1:] or NAMES:
    name, _, case = wanted.partition(":")
    if name not in NAMES:
        sys.exit(f"There is no benchmark {name!r}; there are {', '.join(NAMES)}.")
    print(f"## {wanted}", flush=True)
    module = importlib.import_module(f"benchmarks.{name}")
    for line in module.run(cases=[module.CASES[case]]) if case else module.run():
        print(line, flush=True)
