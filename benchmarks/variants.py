"""Variant effects: one pass for the alternate that starts from the reference, beside the peers' two full passes.

The same networks on the same random weights (with BatchNorm statistics of random sequences, so that signals survive),
in borzoi-pytorch and enformer-pytorch, or in gReLU, and here. Numbers are CPU seconds of the process on one thread, the
cases in turn and every other round backwards, and wall seconds in brackets; the medians of the rounds. Ratios are of
CPU seconds. What is printed as exact is compared before it counts.

The peers' way is a pass of the window with each allele, twice the time of one; gReLU's is what its
``predict_variant_effects`` takes for a variant, of two. Ours is counted three times: the alternate alone beside that
pair, with its share of a reference that 20 variants have in common, and with a reference of its own. Bins: the central
2,048 bp, or all. At full length, and beside gReLU::

    python -m benchmarks variants:borzoi-full variants:enformer-full variants:grelu-borzoi
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._grelu import Grelu
from benchmarks._peers import SETTINGS, peer_of
from seqgraft.local import Recompute
from seqgraft.models.base import Head, SequenceModel, Span, Trunk, one_hot
from seqgraft.models.borzoi import Borzoi
from seqgraft.models.enformer import Enformer
from seqgraft.tracks import TrackTable

SCORED = 2048  # bp around the variant
SHARING = 20  # variants of one window
MUTAGENESIS = 200  # bp, three alternates each
SAMPLE = 2  # alternates of mutagenesis that are timed, in one batch
DELETED = 7  # bp
CALIBRATED = 4096  # bp of the two sequences that set the statistics of BatchNorm


@dataclass(frozen=True)
class _Network:
    """A network, and what is cropped at each end of its published window."""

    trunk: type[Trunk]
    bin_size: int
    tracks: int
    cropped: float


_NETWORKS = {
    "borzoi": _Network(Borzoi, 32, 7611, 163_840 / 524_288),
    "enformer": _Network(Enformer, 128, 5313, 40_960 / 196_608),
}


@dataclass(frozen=True)
class Case:
    """A window length in bp; ``brief`` leaves out what is not one SNV; ``grelu``: the other side is gReLU."""

    network: str
    length: int
    rounds: int = 3
    brief: bool = False
    grelu: bool = False


CASES = {
    "borzoi": Case("borzoi", 65_536),
    "enformer": Case("enformer", 32_768),
    "borzoi-full": Case("borzoi", 524_288, rounds=1, brief=True),
    "enformer-full": Case("enformer", 196_608, rounds=1, brief=True),
    "borzoi-toy": Case("borzoi", 8192, rounds=1),
    "enformer-toy": Case("enformer", 4096, rounds=1),
    "grelu-borzoi": Case("borzoi", 65_536, brief=True, grelu=True),
    "grelu-toy": Case("borzoi", 8192, rounds=1, brief=True, grelu=True),
}


def run(cases: Sequence[Case] = (CASES["borzoi"], CASES["enformer"])) -> Iterator[str]:
    """Some lines per case; the full windows (5 to 8 GB, minutes) and the toys are asked for by name."""
    torch.set_num_threads(1)
    for case in cases:
        yield from _compare(case)


def _compare(case: Case) -> Iterator[str]:
    name, length, rounds, brief = case.network, case.length, case.rounds, case.brief
    network = _NETWORKS[name]
    crop = round(network.cropped * length / network.bin_size)
    bins = length // network.bin_size - 2 * crop
    half = max(1, SCORED // network.bin_size // 2)
    scored: Span = bins // 2 - half, bins // 2 + half
    model, peer = _pair(case, network, crop, bins)
    recompute = Recompute(model)
    codes = torch.randint(0, 4, (length,), dtype=torch.uint8)
    snv, indel, several = _edited(codes)
    # What the other side does, how much of it one SNV takes, and the name of that.
    theirs, share, beside = (
        ("gReLU's variants", 1 / SAMPLE, "gReLU") if case.grelu else ("peer's pass", 2, "two of the peer's passes")
    )
    yield f"{name}, {length:,} bp, {network.tracks:,} tracks, {2 * half} of {bins} bins scored, {rounds} rounds"
    yield f"  {recompute.in_words}"

    values: dict[str, Any] = {"start": recompute.reference(codes)}
    cases: dict[str, Callable[[], Any]] = {
        theirs: lambda: peer(codes, snv),
        "prefix": lambda: recompute.reference(codes),
        "reference": lambda: recompute.predict_reference(replace(values["start"], after=None), scored),
        "alternate": lambda: recompute.predict(values["start"], snv, [scored]),
        "all bins": lambda: recompute.predict(values["start"], snv),
        "indel": lambda: recompute.predict(values["start"], indel, [scored]),
        "mutagenesis": lambda: recompute.predict(values["start"], several, [scored] * len(several)),
    }
    if brief:
        kept = [theirs, "prefix", "reference", "alternate", *(["all bins"] if case.grelu else [])]
        cases = {what: cases[what] for what in kept}
    else:
        plain = Recompute(model, local=False)
        window = plain.reference(codes)
        cases["all again"] = lambda: plain.predict(window, snv)
    seconds: dict[str, list[tuple[float, float]]] = {what: [] for what in cases}
    for turn in range(rounds):
        for what in list(cases) if turn % 2 == 0 else reversed(cases):
            cpu, wall = time.process_time(), time.perf_counter()
            with torch.inference_mode():
                values[what] = cases[what]()
            seconds[what].append((time.process_time() - cpu, time.perf_counter() - wall))
    yield from _exact(values, theirs, scored)
    took, waited = (
        {what: statistics.median(pair[clock] for pair in measured) for what, measured in seconds.items()}
        for clock in (0, 1)
    )
    yield "  CPU s (wall s): " + ", ".join(f"{what} {value:.2f} ({waited[what]:.2f})" for what, value in took.items())
    pair, reference = share * took[theirs], took["prefix"] + took["reference"]
    shared = reference / SHARING
    for what in [what for what in ("alternate", "all bins", "indel") if what in took]:
        yield (
            f"  {beside} / {what:9s} {pair / took[what]:6.2f}x, "
            f"with a share of a reference of {SHARING} {pair / (took[what] + shared):6.2f}x, "
            f"with a reference of its own {pair / (took[what] + reference):6.2f}x"
        )
    several_took = took.get("mutagenesis", SAMPLE * took["alternate"])
    count = 3 * MUTAGENESIS
    yield (
        f"  {MUTAGENESIS} bp of mutagenesis, {count} alternates, at {several_took / SAMPLE:.2f} s for each of "
        f"{1 if brief else SAMPLE}: {(count + 1) * pair / 2 / (reference + count * several_took / SAMPLE):6.2f}x"
    )


def _exact(values: Mapping[str, Tensor], theirs: str, scored: Span) -> Iterator[str]:
    """Differences, of the largest value: ours from the peer's, and from ours without patches; what the SNV changes."""

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    there = slice(*scored)
    alternate = values["alternate"]
    peers = apart(alternate, values[theirs][..., there])
    yield f"  alternate: ours - peer {peers:.0e}, alternate - reference {apart(alternate[0], values['reference']):.0e}"
    if "all again" in values:
        whole = values["all again"]
        local = max(apart(alternate, whole[..., there]), apart(values["all bins"], whole))
        yield f"  local - everything again {local:.0e}"
        if not local <= 1e-5:
            raise SystemExit("Local recomputation is not exact; its times mean nothing.")
    if not peers <= 1e-3:
        raise SystemExit("The two packages run different networks; their times are not comparable.")


def _edited(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A substitution in the middle of the window, a deletion there, and substitutions of neighbouring bases."""
    at = (len(codes) - 1) // 2  # where gReLU has it
    several = codes.repeat(SAMPLE, 1)
    places = at + torch.arange(SAMPLE) * (MUTAGENESIS // SAMPLE)
    several[torch.arange(SAMPLE), places] = (codes[places] + 1) % 4
    filled = torch.randint(0, 4, (DELETED,), dtype=torch.uint8)
    return several[:1], torch.cat([codes[:at], codes[at + DELETED :], filled])[None], several


def _pair(
    case: Case, network: _Network, crop: int, bins: int
) -> tuple[SequenceModel, Callable[[Tensor, Tensor], Tensor]]:
    """Ours, and what predicts a window's SNV in the peer, with the same weights, crop and head."""
    torch.manual_seed(0)
    name = case.network
    settings = {**SETTINGS[name], **({"positions": case.length // 128} if case.grelu else {})}
    trunk = network.trunk.build(settings, bin_size=network.bin_size, crop=crop)
    uncropped = nn.Sequential(*(stage for stage_name, stage in trunk.stages.items() if stage_name != "crop"))
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        uncropped.train()(trunk.encode(torch.randint(0, 4, (2, CALIBRATED), dtype=torch.uint8)))
    table = TrackTable.build({"name": f"track{i}", "group": "head", "link": "identity"} for i in range(network.tracks))
    model = SequenceModel(trunk, {"head": Head(table, trunk.spec.channels)}, table).eval()
    if case.grelu:
        scorer = Grelu(trunk, model.heads["head"], case.length, crop)  # type: ignore[arg-type]
        return model, lambda codes, snv: scorer(codes, _substitutes(codes, snv))[:1, 1]
    peer = peer_of(name, trunk, network.tracks)
    assert peer.head is not None
    peer.head.load_state_dict(model.heads["head"].out.state_dict(), assign=True)  # type: ignore[union-attr]
    place: Any = peer.net
    (place.crop if name == "borzoi" else place.crop_final).target_length = bins
    return model, lambda _, snv: peer(one_hot(snv))


def _substitutes(codes: Tensor, snv: Tensor) -> list[int]:
    """``SAMPLE`` alternates of the SNV's base, its own first."""
    own, reference = (int(each[(len(codes) - 1) // 2]) for each in (snv[0], codes))
    return [own, *(base for base in range(4) if base not in (own, reference))][:SAMPLE]
