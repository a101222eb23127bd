"""Writes the held-out regions that differ most between the conditions: up.bed and down.bed."""

from pathlib import Path

import numpy as np
import pandas as pd

from seqgraft.data import open_dataset

SIZE, COUNT = 512, 30  # bp of a region; regions of each direction

dataset = open_dataset(Path("data/sim"))
rows = np.concatenate([dataset.rows("valid"), dataset.rows("test")])
names, bins = dataset.tracks.names, SIZE // dataset.info.bin_size
raw = dataset.raw_targets(rows)[:, [names.index("atac_activated"), names.index("atac_naive")]]
sums = raw.reshape(len(rows), 2, -1, bins).sum(-1)  # (regions, tracks, pieces)
change = np.log2(sums[:, 0] + 1) - np.log2(sums[:, 1] + 1)
table = pd.DataFrame(
    {
        "chrom": np.repeat(dataset.regions["chrom"].to_numpy()[rows], change.shape[1]),
        "start": (dataset.regions["start"].to_numpy()[rows, None] + SIZE * np.arange(change.shape[1])).ravel(),
        "change": change.ravel(),
    }
).sort_values("change", ignore_index=True)
table.insert(2, "end", table["start"] + SIZE)
for name, part in (("down", table.head(COUNT)), ("up", table.tail(COUNT))):
    part.drop(columns="change").to_csv(f"{name}.bed", sep="\t", header=False, index=False)
    reach = f"{part['change'].min():.1f} to {part['change'].max():.1f}"
    print(f"{name}.bed: {COUNT} regions of {len(table)}, log2 fold change {reach}")
