"""Tiny datasets and a tiny pretrained model, each made in well under a second. The signal follows from the sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch
from torch import nn

from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.genome import Genome
from seqgraft.models.automodel import AutoTrunk
from seqgraft.models.base import Head, SequenceModel, Trunk
from seqgraft.models.borzoi import Borzoi
from seqgraft.models.convnet import ConvNet
from seqgraft.models.enformer import Enformer
from seqgraft.models.folders import save_model
from seqgraft.models.language import Language
from seqgraft.sequence import PAD, decode
from seqgraft.tracks import TrackTable

#: What fits the tiny datasets: a trunk of about 9,000 parameters with a stride of 32 bp.
SETTINGS = {"channels": 16, "depth": 3, "blocks": 1}
BORZOI: dict[str, Any] = {
    "stem": 8,
    "stem_kernel": 7,
    "tower": [8, 8, 12, 16],
    "blocks": 1,
    "heads": 2,
    "key_size": 8,
    "position_features": 8,
    "positions": 64,
    "final": 24,
}
#: The same with the attention of Flashzoi, of which a part of each head is rotated.
FLASHZOI: dict[str, Any] = BORZOI | {"attention": "rotary", "key_heads": 1, "rotary_size": 6}
#: Small DNA language models of two families: overlapping 3-mers, and 4-mers side by side.
LANGUAGE: dict[str, Any] = {"k": 3, "channels": 16, "depth": 2, "heads": 2, "hidden": 32, "positions": 600}
BLOCKS: dict[str, Any] = LANGUAGE | {"family": "esm", "tokens": "blocks", "k": 4, "after": 0, "embedding_norm": False}
#: The configuration of a small model of transformers' own.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 1,
}


def byte_pairs() -> str:
    """The text of a ``tokenizer.json`` with all pairs of bases and a few longer tokens, as DNABERT-2's is made."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    merges = [*([a, b] for a in "ACGT" for b in "ACGT"), ["AC", "G"], ["TA", "TA"], ["GG", "C"], ["TATA", "A"]]
    names = [*special, *"ACGT", *("".join(pair) for pair in merges)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    around = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    around.append({"SpecialToken": {"id": "[SEP]", "type_id": 0}})
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **flags} for i, name in enumerate(special)],
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": around,
            "pair": [*around, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {n: {"id": n, "ids": [names.index(n)], "tokens": [n]} for n in ("[CLS]", "[SEP]")},
        },
        "model": {
            "type": "BPE",
            "unk_token": "[UNK]",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges,
        },
    }
    return json.dumps(content, separators=(",", ":"))


#: The two families whose positions are computed: byte pairs with ALiBi, and blocks with rotations.
MOSAIC: dict[str, Any] = LANGUAGE | {"family": "mosaic", "tokens": "byte_pairs", "tokenizer": byte_pairs()}
ROTARY: dict[str, Any] = BLOCKS | {"family": "esm_rotary"}
WINDOW, BINS, BIN_SIZE = 256, 12, 16
FOLDS = ("train", "train", "train", "valid", "test", "train")


def track_table(names: Sequence[str], link: str = "softplus", **columns: object) -> TrackTable:
    """Tracks whose group is their name without its strand."""
    return TrackTable.build([{"name": name, "group": name.rstrip("+-"), "link": link, **columns} for name in names])


def tiny_coverage(
    folder: Path,
    regions: int = 24,
    tracks: Sequence[str] = ("rna+", "rna-", "atac"),
    *,
    link: str = "softplus",
    groups: Sequence[str] | None = None,
    links: Sequence[str] | None = None,
    folds: Sequence[str] = FOLDS,
    missing: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Coverage with a genome: regions tile one chromosome of ``folder``/../NAME.fa, folds in turn.

    A ``+`` track counts A per bin and a ``-`` track T, any other one G and C, so that turning a region round swaps the
    strands; a little noise is added. ``missing`` is the share of bins that are masked.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    target = BINS * BIN_SIZE
    margin = (WINDOW - target) // 2
    codes = rng.integers(0, 4, 2 * margin + regions * target, dtype=np.uint8)
    fasta = folder.with_suffix(".fa")
    fasta.parent.mkdir(parents=True, exist_ok=True)
    fasta.write_text(f">chr1\n{decode(codes)}\n")
    genome = Genome.open(fasta)
    starts = margin + target * np.arange(regions)
    wanted = {"+": (0,), "-": (3,)}
    with write_dataset(folder, (regions, len(tracks), BINS)) as writer:
        for track, name in enumerate(tracks):
            counted = np.isin(codes, wanted.get(name[-1], (1, 2))).astype(np.float32)
            bins = counted[margin : margin + regions * target].reshape(regions, BINS, BIN_SIZE).sum(-1)
            writer.targets[:, track] = np.maximum(0, bins + rng.normal(0, 0.1, bins.shape))
        table = TrackTable.build(
            {
                "name": name,
                "group": groups[i] if groups else name.rstrip("+-"),
                "link": links[i] if links else link,
                "scale": 0.25,
            }
            for i, name in enumerate(tracks)
        )
        known = rng.random((regions, len(tracks), BINS)) >= missing
        writer.finish(
            DatasetInfo("coverage", WINDOW, BINS, BIN_SIZE, {"path": str(fasta.resolve()), "hash": genome.hash}),
            pd.DataFrame(
                {
                    "chrom": "chr1",
                    "start": starts,
                    "end": starts + target,
                    "strand": ".",
                    "name": [f"region{i}" for i in range(regions)],
                    "fold": [folds[i % len(folds)] for i in range(regions)],
                }
            ),
            table,
            mask=known if missing else None,
        )
    return open_dataset(folder)


def tiny_labels(
    folder: Path,
    link: str = "sigmoid",
    *,
    rows: int = 36,
    lengths: tuple[int, int] = (70, 140),
    missing: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """Labelled sequences without a genome, of different lengths: whether (how far) G and C, or A and G, prevail.

    ``link`` sigmoid or identity: two label columns; softmax: three classes by the share of G and C.
    """
    rng = np.random.default_rng(seed)
    size = rng.integers(lengths[0], lengths[1] + 1, rows)
    size[:2] = lengths
    codes = np.full((rows, lengths[1]), PAD, dtype=np.uint8)
    shares = np.empty((rows, 2))
    for row, length in enumerate(size):
        lean = rng.dirichlet([2, 2, 2, 2])
        codes[row, :length] = rng.choice(4, length, p=lean)
        shares[row] = [np.isin(codes[row, :length], wanted).mean() for wanted in ((1, 2), (0, 2))]
    names = ["gc", "purine"] if link != "softmax" else ["low", "middle", "high"]
    if link == "sigmoid":
        labels = (shares > np.median(shares, axis=0)).astype(np.float32)
    elif link == "softmax":
        labels = np.eye(3, dtype=np.float32)[np.searchsorted(np.quantile(shares[:, 0], [1 / 3, 2 / 3]), shares[:, 0])]
    else:
        labels = (8 * (shares - 0.5)).astype(np.float32)
    labels[rng.random(labels.shape) < missing] = np.nan
    with write_dataset(Path(folder), (rows, len(names), 1)) as writer:
        writer.targets[:] = labels[:, :, None]
        writer.finish(
            DatasetInfo("labelled", lengths[1], 1, lengths[1]),
            pd.DataFrame(
                {
                    "chrom": "",
                    "start": 0,
                    "end": 0,
                    "strand": ".",
                    "name": [f"sequence{i}" for i in range(rows)],
                    "fold": [FOLDS[i % len(FOLDS)] for i in range(rows)],
                }
            ),
            TrackTable.build([{"name": name, "group": "label", "link": link} for name in names]),
            codes=codes,
            lengths=size,
        )
    return open_dataset(folder)


def write_h5ad(
    path: Path,
    counts: Any,
    features: Sequence[str],
    types: Sequence[str],
    *,
    layout: str = "csr",
    legacy: bool = False,
    layer: str | None = None,
    var: dict[str, Sequence[Any]] | None = None,
) -> Path:
    """An AnnData file of ``counts`` (cells, features) with a column ``type``, "" where a cell has none."""
    counts = np.asarray(counts)
    names = sorted(set(types) - {""})
    codes = np.array([names.index(name) if name else -1 for name in types], dtype=np.int8)
    with h5py.File(path, "w") as file:
        obs, columns = file.create_group("obs"), file.create_group("var")
        for frame, index in ((obs, [f"cell{i}-1" for i in range(len(counts))]), (columns, list(features))):
            frame.attrs["_index"] = "_index"
            frame["_index"] = np.array(index, dtype=object)
        for name, values in (var or {}).items():
            columns[name] = np.array(values, dtype=object) if isinstance(values[0], str) else np.array(values)
        if legacy:
            obs["type"] = codes
            obs.create_group("__categories")["type"] = np.array(names, dtype=object)
        else:
            column = obs.create_group("type")
            column["codes"], column["categories"] = codes, np.array(names, dtype=object)
        where = "X" if layer is None else f"layers/{layer}"
        if layout == "dense":
            file[where] = counts
        else:
            group = file.create_group(where)
            group.attrs["h5sparse_format" if legacy else "encoding-type"] = layout if legacy else f"{layout}_matrix"
            group.attrs["h5sparse_shape" if legacy else "shape"] = counts.shape
            rows = counts if layout == "csr" else counts.T
            group["data"], group["indices"] = rows[np.nonzero(rows)], np.nonzero(rows)[1].astype(np.int32)
            group["indptr"] = np.concatenate([[0], np.cumsum((rows != 0).sum(axis=1))])
    return path


def settled_trunk(seed: int = 0, *, bin_size: int = BIN_SIZE, crop: int = 2, **settings: int) -> ConvNet:
    """A small trunk whose BatchNorm statistics are not those of an untrained one."""
    torch.manual_seed(seed)
    trunk = ConvNet(**(SETTINGS | settings), bin_size=bin_size, crop=crop)
    settle(trunk)
    return trunk


def settle(trunk: Trunk) -> None:
    """Draws the statistics and weights of BatchNorm."""
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def settled_borzoi(seed: int = 0, *, bin_size: int = BIN_SIZE, crop: int = 2, **settings: Any) -> Borzoi:
    """A small trunk of the Borzoi family, with a stride of 32 bp."""
    torch.manual_seed(seed)
    trunk = Borzoi.build(BORZOI | settings, bin_size=bin_size, crop=crop)
    settle(trunk)
    return trunk


def tiny_pretrained(
    folder: Path,
    tracks: Sequence[str] = ("old+", "old-", "mark"),
    *,
    trained_on: Dataset | None = None,
    seed: int = 0,
    **settings: int,
) -> Path:
    """A model folder that ``ModelConfig.name`` takes, with heads for ``tracks`` and random weights.

    ``trained_on``: a dataset, of which the regions of the fold "train" are recorded as seen.
    """
    trunk = settled_trunk(seed, **settings)
    table = track_table(tracks)
    heads = {
        group: Head(table.select([tracks[i] for i in index]), trunk.spec.channels)
        for group, index in table.groups.items()
    }
    info = trained_on.info if trained_on else DatasetInfo("coverage", WINDOW, BINS, BIN_SIZE)
    seen = trained_on.regions[trained_on.regions["fold"] == "train"] if trained_on else None
    save_model(
        SequenceModel(trunk, heads, table),
        Path(folder),
        name="tiny",
        info=info,
        licence="CC0",
        citation="",
        trained_on=seen,
        card="# tiny\n",
        parameters=sum(p.numel() for p in trunk.parameters()),
    )
    return Path(folder)


def tiny_enformer(seed: int = 0, *, bin_size: int = BIN_SIZE, crop: int = 2, **settings: Any) -> Enformer:
    """A small Enformer whose BatchNorm statistics are not those of an untrained one."""
    torch.manual_seed(seed)
    sizes = {"channels": 24, "depth": 1, "heads": 2, "key_size": 8, "divisible_by": 2, "positions": 16}
    trunk = Enformer(**(sizes | settings), bin_size=bin_size, crop=crop)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return trunk


def tiny_language(seed: int = 0, *, bin_size: int = BIN_SIZE, crop: int = 2, **settings: Any) -> Language:
    """A small language model, with vectors of tokens that differ as those of a trained one do."""
    torch.manual_seed(seed)
    trunk = Language(**(LANGUAGE | settings), bin_size=bin_size, crop=crop)
    for module in trunk.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    return trunk


def tiny_llama(seed: int = 0, *, bin_size: int = BIN_SIZE, crop: int = 2) -> AutoTrunk:
    """A small model of transformers' own, of single bases, with weights that differ as those of a trained one do."""
    torch.manual_seed(seed)
    trunk = AutoTrunk(LLAMA, bin_size=bin_size, crop=crop)
    for module in trunk.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return trunk
