"""GenVarLoader in an interpreter of its own: run as a script with a job in JSON as its argument, it prints JSON.

It imports nothing of seqgraft, so its environment needs genvarloader alone. Windows begin at their first base there
(left-anchored), and indexes are written beside the VCF, which is therefore a copy.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

INSTALL = "pip install genvarloader==0.43.1 in an environment of its own, and name its Python in GENVARLOADER_PYTHON"


def main(job: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds to write a dataset of the regions and to read all haplotypes of each region, and their digests."""
    import genvarloader as gvl  # type: ignore[import-not-found]
    import numpy as np
    import polars as pl  # type: ignore[import-not-found]

    length, regions, folder = job["length"], job["regions"], Path(job["folder"])
    bed = pl.DataFrame(
        {
            "chrom": [chrom for chrom, _ in regions],
            "chromStart": [start for _, start in regions],
            "chromEnd": [start + length for _, start in regions],
        }
    )
    began = time.process_time()
    gvl.write(folder / "gvl", bed, variants=job["vcf"], overwrite=True)
    written = time.process_time() - began
    data = gvl.Dataset.open(folder / "gvl", job["fasta"]).with_len(length).with_seqs("haplotypes")
    donors = data.n_samples
    data[0, list(range(donors))]  # compiles
    seconds = {}
    for batch in job["batches"]:
        rounds = []
        for _ in range(job["rounds"]):
            began, served = time.process_time(), 0
            for region in range(len(regions)):
                for first in range(0, donors, batch):
                    found = data[region, list(range(first, min(first + batch, donors)))]
                    served += found.shape[0] * found.shape[1]
            rounds.append((time.process_time() - began) / served)
        seconds[batch] = sorted(rounds)[len(rounds) // 2]
    digests = {}
    for region in range(len(regions)):
        for donor in range(0, donors, max(1, donors // 8)):
            both = np.asarray(data[region, [donor]]).reshape(-1, length)
            digests[f"{region} {data.samples[donor]}"] = [hashlib.sha256(each.tobytes()).hexdigest() for each in both]
    return {"version": gvl.__version__, "write": written, "each": seconds, "digests": digests}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
