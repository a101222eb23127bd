"""``python -m benchmarks [NAME ...]``: all of them if none is named."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

NAMES = sorted(found.name for found in pkgutil.iter_modules(benchmarks.__path__) if not found.name.startswith("_"))

for name in sys.argv[1:] or NAMES:
    if name not in NAMES:
        sys.exit(f"There is no benchmark {name!r}; there are {', '.join(NAMES)}.")
    print(f"## {name}", flush=True)
    for line in importlib.import_module(f"benchmarks.{name}").run():
        print(line, flush=True)
