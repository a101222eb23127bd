"""Base codes: DNA as bytes.

======  =====================================================================
code    meaning
======  =====================================================================
0-3     A, C, G, T
4       N: a base that is not known (one-hot: zeros)
5       PAD: no base at all, only to fill a batch (one-hot: zeros, never valid)
6-11    AC, AG, AT, CG, CT, GT: an unphased heterozygous site (one-hot: 0.5/0.5)
======  =====================================================================

An eighth of the memory of a one-hot float32 array, or less, and one reverse complement for all models.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from seqgraft.errors import DataError

__all__ = [
    "COMPLEMENT",
    "ONE_HOT",
    "PAD",
    "Codes",
    "N",
    "apply_variants",
    "count_unknown",
    "decode",
    "encode",
    "one_hot",
    "reverse_complement",
]

Codes = npt.NDArray[np.uint8]

N, PAD = 4, 5
_LETTERS = b"ACGTN.MRWSYK"  # IUPAC letters of the heterozygous codes; PAD is shown as a dot
_HETEROZYGOUS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))

#: Complement of each code; AC <-> GT, AG <-> CT, AT and CG are their own.
COMPLEMENT: Codes = np.array([3, 2, 1, 0, 4, 5, 11, 10, 8, 9, 7, 6], dtype=np.uint8)

#: One-hot row of each code, ``(12, 4)`` in the order A C G T.
ONE_HOT: npt.NDArray[np.float32] = np.zeros((12, 4), dtype=np.float32)
ONE_HOT[range(4), range(4)] = 1.0
for _code, _bases in enumerate(_HETEROZYGOUS, start=6):
    ONE_HOT[_code, list(_bases)] = 0.5

_INVALID = 255
_ENCODE: Codes = np.full(256, _INVALID, dtype=np.uint8)
for _letter in "NRYSWKMBDHVUnryswkmbdhvu":  # every ambiguous letter is an unknown base; U is handled below
    _ENCODE[ord(_letter)] = N
for _code, _letter in enumerate("ACGT"):
    _ENCODE[ord(_letter)] = _ENCODE[ord(_letter.lower())] = _code
_ENCODE[ord("U")] = _ENCODE[ord("u")] = 3
_DECODE: Codes = np.frombuffer(_LETTERS, dtype=np.uint8)


def encode(text: str | bytes) -> Codes:
    """Base codes ``(length,)`` of a sequence; case is ignored, U is T, IUPAC letters become N.

    Raises:
        DataError: a character that is not a base, with its 1-based position.
    """
    letters = np.frombuffer(text.encode("latin-1", "replace") if isinstance(text, str) else text, dtype=np.uint8)
    codes = _ENCODE[letters]
    invalid = np.flatnonzero(codes == _INVALID)
    if invalid.size:
        at = int(invalid[0])
        raise DataError(
            "the sequence has a character that is not a base",
            chr(letters[at]),
            where=f"position {at + 1}",
            remedy="Use A, C, G, T, N or IUPAC letters, without gaps",
        )
    return codes


def apply_variants(codes: Codes, edits: Iterable[tuple[int, Codes, Codes]]) -> Codes:
    """The haplotype of a stretch of sequence: base codes with every edit ``(offset, ref, alt)`` made.

    Offsets count from the first base of ``codes``, 0-based, and mean the reference: edits may come in any order and may
    change the length, and the result is as long as they make it. To fill a window of fixed length, give some
    bases more than it has and cut the result at the end that may move.

    Raises:
        DataError: an edit reaches beyond the sequence, ``ref`` is not what stands there, or two edits overlap.
    """
    pieces, reach = [], 0
    for offset, ref, alt in sorted(edits, key=lambda edit: edit[0]):
        if not 0 <= offset <= offset + len(ref) <= len(codes):
            raise DataError("the edit reaches beyond the sequence", offset, remedy=f"It has {len(codes)} bases")
        if offset < reach:
            raise DataError("two edits overlap", offset, remedy="Give edits of one haplotype, each base once")
        if not np.array_equal(codes[offset : offset + len(ref)], ref):
            found = decode(codes[offset : offset + len(ref)])
            remedy = f"The sequence has {found} there"
            raise DataError("the edit's reference allele is another", decode(ref), where=offset, remedy=remedy)
        pieces += [codes[reach:offset], alt]
        reach = offset + len(ref)
    return np.concatenate([*pieces, codes[reach:]])


def count_unknown(codes: Codes) -> int:
    """How many bases are N (PAD is not a base)."""
    return int(np.count_nonzero(codes == N))


def decode(codes: Codes) -> str:
    """The letters of ``(length,)`` base codes; PAD is shown as ``.``, heterozygous sites as IUPAC letters."""
    return _DECODE[codes].tobytes().decode("ascii")


def reverse_complement(codes: Codes, lengths: npt.NDArray[np.int64] | None = None) -> Codes:
    """Reverse complement along the last axis; with ``lengths`` ``(batch,)`` the padding stays at the right."""
    flipped = COMPLEMENT[codes[..., ::-1]]
    if lengths is None:
        return flipped
    width = codes.shape[-1]
    source = (np.arange(width)[None, :] + (width - np.asarray(lengths))[:, None]) % width
    return np.take_along_axis(flipped, source, axis=-1)


def one_hot(codes: Codes) -> npt.NDArray[np.float32]:
    """One-hot ``(..., 4, length)`` of base codes ``(..., length)``."""
    return np.ascontiguousarray(np.moveaxis(ONE_HOT[codes], -1, -2))
