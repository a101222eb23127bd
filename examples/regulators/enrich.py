"""Which motifs lie where the attribution is: python enrich.py up.npz +

Windows around the highest (+) or lowest (-) attributions of each region are compared with as many of its windows that
have least attribution, so that both come from the same regions. Motifs are those of the simulation, decoys included.
"""

import sys
from math import comb

import numpy as np
import pandas as pd

from seqgraft.attribute import Attributions
from seqgraft.oracle import grammar, scan

WIDTH, EACH = 25, 3  # bp of a window; windows of each kind in a region


def windows(scores: np.ndarray) -> list[int]:
    """Centres of the best windows that do not overlap."""
    scores, found = scores.copy(), []
    for _ in range(EACH):
        at = int(scores.argmax())
        found.append(at)
        scores[max(0, at - WIDTH) : at + WIDTH + 1] = -np.inf
    return found


def tail(hits: int, drawn: int, marked: int, total: int) -> float:
    """The chance of so many hits or more, by Fisher's exact test."""
    ways = (comb(marked, k) * comb(total - marked, drawn - k) for k in range(hits, min(marked, drawn) + 1))
    return sum(ways) / comb(total, drawn)


made, sign = Attributions.load(sys.argv[1]), {"+": 1, "-": -1}[sys.argv[2]]
half, sites = WIDTH // 2, {"high": [], "low": []}
for codes, attributions in zip(made.codes, made.attributions[:, 0], strict=True):
    signed, size = (np.convolve(values, np.ones(11), "same") for values in (sign * attributions, np.abs(attributions)))
    signed[:half] = signed[-half:] = -np.inf
    size[:half] = size[-half:] = np.inf
    for kind, scores in (("high", signed), ("low", -size)):
        sites[kind] += [codes[at - half : at + half + 1] for at in windows(scores)]

motifs = grammar().motifs
rows = []
for motif in motifs:
    high, low = (len(np.unique(scan(np.stack(sites[kind]), [motif]).row)) for kind in ("high", "low"))
    count = len(sites["high"])
    rows.append((motif.name, motif.role, motif.pattern, high, low, tail(high, count, high + low, 2 * count)))
table = pd.DataFrame(rows, columns=["motif", "role", "pattern", "high", "low", "p"]).sort_values("p", ignore_index=True)
which = "highest" if sign > 0 else "lowest"
print(f"{made.names[0]}: {count} windows of {WIDTH} bp with the {which} attribution, {count} with the least")
print(table.head(8).to_string(index=False, formatters={"p": "{:.1e}".format}))
table.to_csv(sys.argv[1].removesuffix(".npz") + ".motifs.csv", index=False)
