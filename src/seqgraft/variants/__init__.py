"""Variant effects: what a fitted model says of the alleles of a VCF."""

from __future__ import annotations

from seqgraft.variants.alleles import AlleleCheck, check_vcf
from seqgraft.variants.over import OVERS, Over
from seqgraft.variants.place import Layout
from seqgraft.variants.score import Scores, VariantConfig, VariantScorer
from seqgraft.variants.scorers import SCORERS, Scorer
from seqgraft.variants.screen import ScreenConfig

__all__ = [
    "OVERS",
    "SCORERS",
    "AlleleCheck",
    "Layout",
    "Over",
    "Scorer",
    "Scores",
    "ScreenConfig",
    "VariantConfig",
    "VariantScorer",
    "check_vcf",
]
