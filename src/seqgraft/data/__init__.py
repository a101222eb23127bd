"""Sources of data; each ends in one prepared dataset.

To add one, write a frozen dataclass with its settings and a function ``prepare_...(source, folder) -> Dataset``, and
list both in ``SOURCES``; the contract tests run on every entry.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqgraft.data.coverage import CoverageSource, prepare_coverage
from seqgraft.data.dataset import Dataset, check_new_folder, open_dataset
from seqgraft.data.fragments import FragmentSource, prepare_fragments
from seqgraft.data.h5ad import H5adSource, prepare_h5ad
from seqgraft.data.labelled import LabelledSource, prepare_labelled
from seqgraft.data.peaks import PeakSource, prepare_peaks
from seqgraft.data.personal import PersonalSource, prepare_personal
from seqgraft.data.windows import WindowSource, prepare_windows

__all__ = ["SOURCES", "Dataset", "open_dataset", "prepare_source"]

#: Kind, as written in a ``prepare`` file -> settings and function.
SOURCES: dict[str, tuple[type, Callable[[Any, Path], Dataset]]] = {
    "coverage": (CoverageSource, prepare_coverage),
    "fragments": (FragmentSource, prepare_fragments),
    "h5ad": (H5adSource, prepare_h5ad),
    "labelled": (LabelledSource, prepare_labelled),
    "peaks": (PeakSource, prepare_peaks),
    "personal": (PersonalSource, prepare_personal),
    "windows": (WindowSource, prepare_windows),
}


def prepare_source(source: object, folder: Path) -> Dataset:
    """Prepares a dataset from the settings of any source, into a new folder.

    Raises:
        RunError: the folder exists or cannot be made; found before anything is read.
        SeqgraftError: whatever is wrong with the source.
    """
    check_new_folder(Path(folder))
    functions = dict(SOURCES.values())
    return functions[type(source)](source, folder)
