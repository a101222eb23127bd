"""`python simulate.py` writes labelled.csv, new.fa, and in sim/ a genome whose promoters are in peaks.bed."""

from __future__ import annotations

from pathlib import Path

from seqgraft.data.simulate import Simulation, simulate, simulate_labelled

simulation = Simulation(seed=3, chromosomes=4, chromosome_length=65_536, variants=0)
table = simulate_labelled(simulation, "labelled.csv", n=400, length=256)
Path("new.fa").write_text("".join(f">{row.name}\n{row.sequence}\n" for row in table.head(5).itertuples(index=False)))
genes = simulate(simulation, "sim").genes()
starts = genes["tss"].to_numpy()
genes.assign(start=starts - 100, end=starts + 100)[["chrom", "start", "end", "gene_id"]].to_csv(
    "peaks.bed", sep="\t", header=False, index=False
)
