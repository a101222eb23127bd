"""seqgraft: graft new data onto pretrained genomic sequence models."""

from __future__ import annotations

__version__ = "0.1.0"
