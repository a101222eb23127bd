"""Variants scored by gReLU's ``predict_variant_effects``, on the weights of our Borzoi.

gReLU reads the window around each variant from a FASTA file, predicts all bins of both alleles, and compares them.
Here it returns the two predictions uncompared. Its central masks have widths of the window, as ours with ``positions``
the positions of the window. It sets float32 matrix products to "medium" in the whole process; what was set before is
set again after each call. Its Lightning logs to the working directory, which is a temporary one here.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks._peers import _import, _name
from seqgraft.models.base import Head, Trunk

INSTALL = "pip install gReLU, in an environment of its own"
_BASES = "ACGT"


class Grelu:
    """Borzoi in gReLU on the weights of ours, which are shared.

    Args:
        length: of the window, in bp.
        crop: bins dropped at each end.

    Raises:
        SystemExit: the package is not installed.
    """

    def __init__(self, trunk: Trunk, head: Head, length: int, crop: int) -> None:
        lightning = _import("grelu.lightning", INSTALL)
        self._score = _import("grelu.variant", INSTALL).predict_variant_effects
        self.length, tracks = length, head.out.weight.shape[0]
        self.model: Any = lightning.LightningModel(
            model_params={
                "model_type": "BorzoiModel",
                "n_tasks": tracks,
                "crop_len": crop,
                "final_pool_func": None,
            },
            train_params={"task": "regression", "loss": "mse", "batch_size": 1, "num_workers": 0},
        ).eval()
        weights = {f"embedding.{_name('grelu', ours)}": tensor for ours, tensor in trunk.state_dict().items()}
        place = "head.channel_transform.conv.layer"
        weights |= {f"{place}.{name}": tensor for name, tensor in head.out.state_dict().items()}
        self.model.model.load_state_dict(weights, assign=True)

    def __call__(self, codes: Tensor, alternates: Sequence[int]) -> Tensor:
        """Predictions ``(alternates, 2, tracks, bins)`` with the window ``codes`` and with other bases in its middle.

        Args:
            codes: ``(length,)``; what is replaced is the base ``(length - 1) // 2``.
            alternates: codes of the bases to put there, a variant each.
        """
        middle = (self.length - 1) // 2
        bases = "".join(_BASES[code] for code in codes.tolist())
        before = torch.get_float32_matmul_precision()
        with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
            fasta = Path(folder) / "genome.fa"
            fasta.write_text(f">chr1\n{bases}\n")
            fasta.with_name("genome.fa.sizes").write_text(f"chr1\t{self.length}\n")
            variants = pd.DataFrame(
                [("chr1", middle + 1, bases[middle], _BASES[alternate]) for alternate in alternates],
                columns=["chrom", "pos", "ref", "alt"],
            )
            try:
                values = self._score(
                    variants,
                    self.model,
                    seq_len=self.length,
                    batch_size=1,
                    num_workers=0,
                    genome=str(fasta),
                    compare_func=None,
                    return_ad=False,
                )
            finally:
                torch.set_float32_matmul_precision(before)
        return torch.from_numpy(values)
