"""Attributions equal the definition, the original's and brute force; what is written can be read; tools can be used."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

from builders import (
    BIN_SIZE,
    BINS,
    FLASHZOI,
    SETTINGS,
    WINDOW,
    settled_borzoi,
    settled_trunk,
    tiny_coverage,
    tiny_enformer,
    tiny_labels,
    track_table,
)
from seqgraft.__main__ import main
from seqgraft.attribute import AttributeConfig, Attributions, Target, attribute
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset, DatasetInfo
from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.experiment import parse_experiment
from seqgraft.genome import Interval
from seqgraft.logos import attribution_figure, strongest_stretch
from seqgraft.models.base import Head, SequenceModel, Trunk
from seqgraft.models.baskerville import load_baskerville
from seqgraft.models.wrap import ModuleSpec, wrap
from seqgraft.plain import Elementwise, plain_module
from seqgraft.regions import regions_for_prediction
from seqgraft.run import fit_run, open_run
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable, unsquash
from test_readme import ROOT, blocks

GUIDE = ROOT / "docs" / "guides" / "attribute.md"
TRACKS = track_table(("rna+", "rna-", "atac"), scale=0.25, squash="sqrt")
INFO = DatasetInfo("coverage", WINDOW, BINS, BIN_SIZE)
CONTRAST = Target(("rna*",), ("atac",), pseudocount=0.5)


def model_of(trunk: Trunk, tracks: TrackTable = TRACKS, pool: Any = "none") -> SequenceModel:
    heads = {
        g: Head(tracks.select([tracks.names[i] for i in index]), trunk.spec.channels, pool)
        for g, index in tracks.groups.items()
    }
    for head in heads.values():
        nn.init.normal_(head.out.weight, std=0.5)  # so that predictions depend on the sequence
    return SequenceModel(trunk, heads, tracks).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_coverage(tmp_path_factory.mktemp("data") / "coverage", regions=6)


def regions(data: Dataset, tmp_path: Path, text: str) -> Dataset:
    (tmp_path / "regions.bed").write_text(text)
    return regions_for_prediction(tmp_path / "regions.bed", data.info, TRACKS, data.genome)


def number(
    model: SequenceModel, codes: npt.NDArray[np.uint8], config: AttributeConfig, dataset: Dataset, row: int
) -> float:
    """The contrast of one window in plain torch, in float64, of the views' mean."""
    assert config.ensemble.shift == 0
    found = []
    for view in config.ensemble.views():
        seen = (3 - codes[::-1]).copy() if view.reverse else codes
        seen = np.where(codes[::-1] == 4, 4, seen).astype(np.uint8) if view.reverse else seen
        none = torch.zeros(1, 0)
        with torch.no_grad():
            values = model.predict(Sample(torch.from_numpy(seen)[None], torch.tensor([len(seen)]), none, none, none))
        raw = unsquash(values.double(), model.tracks, BIN_SIZE)[0]
        raw = raw.flip(-1)[torch.as_tensor(model.tracks.permutation)] if view.reverse else raw
        region = dataset.regions.iloc[row]
        first = int(region["bed_start"] - region["start"]) // BIN_SIZE
        last = -(-int(region["bed_end"] - region["start"]) // BIN_SIZE)
        sums = torch.log(raw[:, first:last].sum(-1) + 0.5 + 1e-6)
        found.append(float(sums[:2].mean() - sums[2]))
    return float(np.mean(found))


@pytest.mark.parametrize("both", [False, True])
def test_mutagenesis_is_brute_force(data: Dataset, tmp_path: Path, both: bool) -> None:
    model = model_of(settled_trunk(blocks=2))
    dataset = regions(data, tmp_path, "chr1\t120\t160\nchr1\t400\t433\n")
    assert dataset.genome is not None
    config = AttributeConfig(CONTRAST, "ism", width=20, batch_size=7, ensemble=Augmentation(both, 0))
    found = attribute(model, dataset, config)
    assert found.names == ("rna+, rna- - atac",)
    first = (WINDOW - 20) // 2
    codes, _ = dataset.sequences([0, 1])
    for row in range(2):
        before = number(model, codes[row], config, dataset, row)
        assert found.values[row, 0] == pytest.approx(before, abs=1e-5)
        changes = np.zeros((4, 20))
        for position in range(20):
            for base in range(4):
                changed = codes[row].copy()
                changed[first + position] = base
                changes[base, position] = number(model, changed, config, dataset, row) - before
        assert np.abs(changes).max() > 1e-4
        assert np.allclose(found.hypothetical[row, 0], changes - changes.mean(0), atol=2e-6)
        there = np.take_along_axis(found.hypothetical[row, 0], codes[row][None, first : first + 20].astype(int), 0)[0]
        assert np.array_equal(found.attributions[row, 0], there)
    places = found.regions
    assert (places["end"] - places["start"] == 20).all()
    assert places["start"].tolist() == [130, 406]
    assert "stem" in found.in_words


def test_shifts_are_turned_back(data: Dataset, tmp_path: Path) -> None:
    """Views that are shifted give the mean of the gradients of windows that lie so far apart."""
    model = model_of(settled_borzoi())
    together = attribute(
        model, regions(data, tmp_path, "chr1\t500\t540\n"), AttributeConfig(CONTRAST, ensemble=Augmentation(False, 1))
    )
    assert together.hypothetical.shape == (1, 1, 4, WINDOW)
    assert np.abs(together.hypothetical.mean(2)).max() < 1e-7
    apart = []
    for shift in (-1, 0, 1):
        alone = attribute(
            model, regions(data, tmp_path, f"chr1\t{500 + shift}\t{540 + shift}\n"), AttributeConfig(CONTRAST)
        )
        apart.append(alone.hypothetical[..., 4 - shift : WINDOW - 4 - shift])
    assert np.allclose(together.hypothetical[..., 4:-4], np.mean(apart, 0), atol=1e-6)
    assert not np.allclose(together.hypothetical[..., 4:-4], apart[1], atol=1e-4)


@pytest.mark.parametrize("method", ["gradient", "ism"])
def test_shifts_of_a_label_on_the_minus_strand(
    data: Dataset, tmp_path: Path, method: Literal["gradient", "ism"]
) -> None:
    """A shift goes to the right on the genome, which is to the left on that strand."""
    tracks = track_table(("strength",), link="identity")
    model = model_of(settled_trunk(crop=0), tracks, "mean")
    info = DatasetInfo("labelled", WINDOW, 1, WINDOW)

    def found(start: int, shift: int) -> Attributions:
        (tmp_path / "m.bed").write_text(f"chr1\t{start}\t{start + 40}\tx\t0\t-\n")
        dataset = regions_for_prediction(tmp_path / "m.bed", info, tracks, data.genome)
        return attribute(model, dataset, AttributeConfig(method=method, width=12, ensemble=Augmentation(True, shift)))

    together, apart = found(500, 1), {shift: found(500 + shift, 0) for shift in (-1, 0, 1)}
    mean = np.mean([apart[s].hypothetical[..., 1 + s : 11 + s] for s in apart], axis=0)
    assert np.abs(mean).max() > 1e-3
    assert np.allclose(together.hypothetical[..., 1:11], mean, atol=2e-6)
    assert together.values == pytest.approx(np.mean([part.values for part in apart.values()]), abs=1e-6)
    assert data.genome is not None
    place = together.regions.iloc[0]
    forward = data.genome.codes(Interval("chr1", int(place["start"]), int(place["end"])))
    assert np.array_equal(together.codes[0], 3 - forward[::-1])


def test_gradients_of_both_strands_are_averaged(data: Dataset, tmp_path: Path) -> None:
    """The gradient of the region, and that of its reverse complement turned back."""
    model = model_of(settled_trunk())
    dataset = regions(data, tmp_path, "chr1\t500\t540\n")
    codes, _ = dataset.sequences([0])
    gradients = []
    for turned in (False, True):
        seen = torch.from_numpy((3 - codes[:, ::-1]).copy() if turned else codes)
        state = model.trunk.encode(seen)
        x = state.x.requires_grad_()
        values = model.link(model.read(model.trunk.run(replace(state, x=x)), None))  # type: ignore[arg-type]
        raw = unsquash(values.double(), TRACKS, BIN_SIZE)[0]
        raw = raw.flip(-1)[[1, 0, 2]] if turned else raw
        region = dataset.regions.iloc[0]
        bins = slice(int(500 - region["start"]) // BIN_SIZE, -(-int(540 - region["start"]) // BIN_SIZE))
        sums = torch.log(raw[:, bins].sum(-1) + 0.5 + 1e-6)
        gradient = torch.autograd.grad((sums[0] + sums[1]) / 2 - sums[2], x)[0][0]
        gradients.append(gradient.flip(0, 1) if turned else gradient)
    mean = ((gradients[0] + gradients[1]) / 2).numpy()
    found = attribute(model, dataset, AttributeConfig(CONTRAST, ensemble=Augmentation(True, 0)))
    assert np.allclose(found.hypothetical[0, 0], mean - mean.mean(0), atol=1e-6)
    assert np.abs(mean).max() > 1e-3


def test_gradients_are_the_originals(shared: Path, tmp_path: Path) -> None:
    """Of a trained network: of the sum of the squashed mean track, and of the logarithm after undoing the squash."""
    folder = shared / "reference" / "parity" / "trained_0.6M"
    expected = np.load(folder / "reference_gradients.npz")
    model = load_baskerville(folder / "model.h5", folder / "params.json").model()
    codes = np.load(folder / "reference_io.npz", allow_pickle=False)["seq_index"][:1]
    (tmp_path / "one.fa").write_text(">a\n" + "".join("ACGTN"[code] for code in codes[0]) + "\n")
    names = [model.tracks.names[i] for i in np.arange(len(model.tracks))[expected["target_slice"]]]
    settings = {
        "grad_nountransform": ("none", 1.0, float("nan"), Target(tuple(names), statistic="sum")),
        "grad_log_transform05_clip64_scale03": ("sqrt", 0.3, 64.0, Target(tuple(names))),
    }
    for key, (squash, scale, soft, target) in settings.items():
        model.tracks = model.tracks.replace(
            squash=squash, scale=scale, soft_clip=soft, clip=float("nan"), statistic="sum"
        )
        info = DatasetInfo("coverage", 131072, 2048, 32)
        dataset = regions_for_prediction(tmp_path / "one.fa", info, model.tracks)
        bins = np.zeros(2048)
        bins[expected["pos_slice"]] = 1
        span = np.flatnonzero(bins)
        assert np.array_equal(span, np.arange(span[0], span[-1] + 1))
        place = {"bed_start": [int(span[0]) * 32], "bed_end": [int(span[-1] + 1) * 32]}
        dataset = replace(dataset, regions=dataset.regions.assign(start=0, end=65536, **place))
        found = attribute(model, dataset, AttributeConfig(target))
        wanted = expected[key]
        error = np.abs(found.hypothetical[0, 0].T * (codes[0] < 4)[:, None] - wanted * (codes[0] < 4)[:, None]).max()
        assert error <= 1e-5 * np.abs(wanted).max(), (key, error)


def test_unknown_bases_have_no_attribution(tmp_path: Path) -> None:
    data = tiny_labels(tmp_path / "labels", "identity", rows=12)
    tracks = data.tracks
    model = model_of(settled_trunk(crop=0), tracks, "mean")
    (tmp_path / "new.fa").write_text(">a\n" + "ACGTNNACGA" * 8 + "\n>b\n" + "GATTACA" * 12 + "\n")
    dataset = regions_for_prediction(tmp_path / "new.fa", data.info, tracks)
    found: dict[str, Attributions] = {}
    methods: tuple[Literal["gradient", "ism"], ...] = ("gradient", "ism")
    for method in methods:
        config = AttributeConfig(Target(each=True), method, ensemble=Augmentation(True, 0))
        found[method] = attribute(model, dataset, config)
        assert found[method].names == tuple(tracks.names)
        assert found[method].hypothetical.shape == (2, 2, 4, data.info.window)
        unknown = found[method].codes >= 4
        assert unknown[0, 4:6].all()
        assert (found[method].codes[0, 80:] == 5).all()
        assert not found[method].hypothetical.transpose(0, 3, 1, 2)[unknown].any()
        assert found[method].attributions[0, :, :4].any()
    assert np.allclose(found["ism"].values, found["gradient"].values, atol=1e-5)


def test_a_class_is_explained_before_or_after_the_link(tmp_path: Path) -> None:
    data = tiny_labels(tmp_path / "labels", "sigmoid", rows=12)
    model = model_of(settled_trunk(crop=0), data.tracks, "max")
    assert data.codes is not None
    assert data.lengths is not None
    row = replace(data, regions=data.regions.iloc[:1], codes=data.codes[:1], lengths=data.lengths[:1])
    targets = {"sum": Target(("gc",)), "logits": Target(("gc",), statistic="logits")}
    parts = {statistic: attribute(model, row, AttributeConfig(target)) for statistic, target in targets.items()}
    p = parts["sum"].values[0, 0]
    assert p == pytest.approx(1 / (1 + np.exp(-parts["logits"].values[0, 0])), abs=1e-6)
    assert np.allclose(parts["sum"].hypothetical, p * (1 - p) * parts["logits"].hypothetical, atol=1e-6)


def test_genes_read_their_exons_and_their_strand(data: Dataset, tmp_path: Path) -> None:
    exons = [("g1", "+", 400, 440), ("g1", "+", 460, 470), ("g2", "-", 560, 590), ("far", "+", 1000, 1100)]
    frame = pd.DataFrame([("chr1", s, e, strand, g, g.upper()) for g, strand, s, e in exons],
                         columns=["chrom", "start", "end", "strand", "gene_id", "gene_name"])  # fmt: skip
    model = model_of(settled_trunk())
    dataset = regions(data, tmp_path, "chr1\t430\t440\tg1\nchr1\t530\t540\tG2\n")
    config = AttributeConfig(Target(("rna*",), statistic="log"))
    found = attribute(model, dataset, config, frame)
    assert found.names == ("rna+ | rna-",)
    sample = dataset.sample([0, 1])
    raw = unsquash(model.predict(sample).detach().double(), TRACKS, BIN_SIZE).numpy()
    for row, track, spans in ((0, 0, [(400, 440), (460, 470)]), (1, 1, [(560, 590)])):
        start = int(dataset.regions["start"].iloc[row])
        edges = start + np.arange(BINS) * BIN_SIZE
        share = (
            sum(np.clip(np.minimum(e, edges + BIN_SIZE) - np.maximum(s, edges), 0, None) for s, e in spans) / BIN_SIZE
        )
        assert found.values[row, 0] == pytest.approx(np.log((raw[row, track] * share).sum() + 1e-6), abs=1e-5)
    for name, message in (("nobody", "is no gene"), ("far", "outside the region's bins")):
        with pytest.raises(DataError, match=message):
            attribute(model, regions(data, tmp_path, f"chr1\t430\t440\t{name}\n"), config, frame)
    long = frame.assign(end=frame["end"] + 2000 * (frame["gene_id"] == "g2"))
    with pytest.raises(DataError, match="less than 95%"):
        attribute(model, regions(data, tmp_path, "chr1\t560\t570\tg2\n"), config, long)
    with pytest.raises(ConfigError, match="no track is of the strand -"):
        attribute(model, dataset, AttributeConfig(Target(("rna+",))), frame)


def test_what_cannot_be_asked_is_refused(data: Dataset, tmp_path: Path) -> None:
    model = model_of(settled_trunk())
    dataset = regions(data, tmp_path, "chr1\t500\t540\n")
    for config, message in (
        (AttributeConfig(Target(("rna+", "dna"))), "no track has the name: 'dna'"),
        (AttributeConfig(width=WINDOW + 1), f"the windows are of {WINDOW} bp"),
    ):
        with pytest.raises(ConfigError, match=message):
            attribute(model, dataset, config)
    for wrong, message in (
        (lambda: Target(each=True, minus=("atac",)), "a contrast is one number"),
        (lambda: Target(pseudocount=-1), "must be 0 or more"),
        (lambda: Target(tracks=()), "names no track"),
        (lambda: AttributeConfig(Target(statistic="logits"), "ism"), "before the link"),
        (lambda: AttributeConfig(batch_size=0), "1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()
    sequences = tiny_labels(tmp_path / "labels", "identity", rows=12)
    labels = model_of(settled_trunk(crop=0), sequences.tracks, "mean")
    with pytest.raises(ConfigError, match="may be negative"):
        attribute(labels, sequences, AttributeConfig(Target(statistic="log")))
    with pytest.raises(ConfigError, match="cannot be shifted"):
        attribute(labels, sequences, AttributeConfig(ensemble=Augmentation(False, 1)))
    with torch.no_grad():
        next(iter(labels.heads.values())).out.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(ModelError, match="not finite"):
        attribute(labels, sequences, AttributeConfig())


# ---- plain modules ----

MODULES: dict[str, Callable[[], Trunk]] = {
    "convnet": settled_trunk,
    "borzoi": settled_borzoi,
    "flashzoi": lambda: settled_borzoi(**FLASHZOI),
    "enformer": tiny_enformer,
}


def one_hot(window: int, count: int = 2) -> torch.Tensor:
    codes = torch.randint(0, 4, (count, window), generator=torch.Generator().manual_seed(1))
    return nn.functional.one_hot(codes, 4).transpose(1, 2).float()


@pytest.mark.parametrize("name", MODULES)
def test_a_plain_module_gives_the_number(name: str) -> None:
    model = model_of(MODULES[name]())
    before = {key: p.requires_grad for key, p in model.named_parameters()}
    plain = plain_module(model, INFO, CONTRAST, bins=range(3, 7))
    x = one_hot(WINDOW)
    none = torch.zeros(2, 0)
    values = model.predict(Sample(x.argmax(1).to(torch.uint8), torch.tensor([WINDOW] * 2), none, none, none))
    sums = torch.log(unsquash(values, TRACKS, BIN_SIZE)[..., 3:7].sum(-1) + 0.5 + 1e-6)
    wanted = sums[:, :2].mean(1) - sums[:, 2]
    with torch.no_grad():
        assert torch.allclose(plain(x)[:, 0], wanted, atol=1e-5)
    x.requires_grad_()  # now every activation is a call of a module
    assert torch.allclose(plain(x)[:, 0], wanted, atol=1e-5)
    assert torch.autograd.grad(plain(x).sum(), x)[0].abs().max() > 0
    assert plain.names == ("rna+, rna- - atac",)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == before
    assert not any(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_every_activation_is_a_module(name: str) -> None:
    """What DeepLIFT multiplies instead of derivatives adds up only if no activation escapes: here all become linear."""
    plain = plain_module(model_of(MODULES[name]()), INFO, CONTRAST, product=_Halves)
    kinds = {type(module) for module in plain.modules()}
    assert {nn.Softmax, Elementwise, _Halves} <= kinds
    assert (nn.Sigmoid if name == "enformer" else nn.GELU) in kinds
    for key, module in plain.activations.items():
        plain.activations[key] = _Linear(module)
    plain.log, plain.unsquash = Elementwise(lambda v: 0.7 * v), Elementwise(lambda v: 0.3 * v)
    for module in list(plain.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, child_name, _Linear(child))
    a, b = one_hot(WINDOW).requires_grad_().chunk(2)
    middle = plain((a + b) / 2)
    assert torch.allclose(middle, (plain(a) + plain(b)) / 2, rtol=1e-4, atol=1e-6)


class _Linear(nn.Module):
    """Linear in place of an activation; of the shape that it gives."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.pool = int(str(original.kernel_size)) if isinstance(original, nn.MaxPool1d) else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool1d(x, self.pool) if self.pool else 0.6 * x


class _Halves(nn.Module):
    """Linear in place of a product, and as large."""

    def __init__(self, equation: str | None = None) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if self.equation:
            return (left + right) / 2
        return (left @ torch.ones_like(right) + torch.ones_like(left) @ right) / 100


@pytest.mark.parametrize("name", MODULES)
def test_deep_lift_adds_up(name: str) -> None:
    """With tangermeme, whose attributions must sum to the difference to the reference."""
    tangermeme = pytest.importorskip("tangermeme.deep_lift_shap", reason="tangermeme is not installed")
    plain = plain_module(model_of(MODULES[name]()), INFO, CONTRAST, product=tangermeme.BilinearOp)
    x, reference = one_hot(WINDOW).chunk(2)
    found = tangermeme.deep_lift_shap(
        plain, x, references=reference[None], additional_nonlinear_ops={Elementwise: tangermeme._nonlinear},
        raw_outputs=True, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        difference = float(plain(x) - plain(reference))
    delta = float((found[0] * (x - reference)).sum()) - difference
    print(f"{name}: convergence delta {delta:.1e} of {difference:.3f}")
    assert abs(delta) < 1e-5 + 1e-3 * abs(difference)


class Causal(nn.Module):
    """Attention with a mask that is an argument, which the modules of a plain module do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(4, 8, 16, stride=16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = 5 * self.embed(x).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2)


def test_a_plain_module_says_what_it_cannot(tmp_path: Path) -> None:
    model = model_of(settled_trunk())
    plain = plain_module(model, INFO)
    assert plain.train() is plain
    assert not plain.training
    with pytest.raises(ConfigError, match="no track has the name"):
        plain_module(model, INFO, Target(("no",)))
    labels = tiny_labels(tmp_path / "labels", "identity", rows=12)
    pooled = plain_module(model_of(settled_trunk(crop=0), labels.tracks, "max"), replace(labels.info, window=128))
    with pytest.raises(ModelError, match="something new"):
        pooled(one_hot(256).requires_grad_())
    with pytest.raises(ModelError, match="as modules, do not give what it computes"):
        plain_module(model_of(wrap(Causal(), ModuleSpec("causal", channels=8, bin_size=16))), INFO)
    tracks = labels.tracks
    heads = {"label": Head(tracks, 16, "mean", covariates=2)}
    with pytest.raises(ModelError, match="covariates"):
        plain_module(SequenceModel(settled_trunk(crop=0), heads, tracks), labels.info)


# ---- runs, files and figures ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of coverage, and one of labels of sequences."""
    root = tmp_path_factory.mktemp("runs")
    tiny_coverage(root / "data" / "coverage", regions=12)
    tiny_labels(root / "data" / "labels", rows=18)
    for name in ("coverage", "labels"):
        content: dict[str, Any] = {"data": str(root / "data" / name), "train": {"epochs": 1, "batch_size": 4}}
        content |= {
            "model": {"name": "convnet", "settings": SETTINGS},
            "adapter": {"kind": "full", "statistics": "batch"},
        }
        fit_run(parse_experiment(content), root / name)
    return root


def seqgraft(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["seqgraft", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command_writes_attributions_and_figures(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bed, out, plots = tmp_path / "r.bed", tmp_path / "a.npz", tmp_path / "plots"
    bed.write_text("chr1\t4\t44\tfirst/one\nchr1\t500\t540\n")
    settings = [
        "--set",
        "target.tracks=['rna*']",
        "--set",
        "target.minus=[atac]",
        "--set",
        "method=ism",
        "--set",
        "width=24",
    ]
    assert seqgraft(monkeypatch, "attribute", runs / "coverage", bed, out, "--plots", plots, *settings) == 0
    said = capsys.readouterr().out
    assert "2 regions, explaining rna+, rna- - atac." in said
    assert "With bases beyond the end of a contig, where the model saw N: 1 window." in said
    assert "Computed for each alternate: stem" in said
    made = Attributions.load(out)
    assert made.hypothetical.shape == (2, 1, 4, 24)
    assert made.regions["chrom"].tolist() == ["chr1", "chr1"]
    assert made.regions["start"].tolist() == [12, 508]
    assert made.method == "ism"
    assert np.load(out)["attributions"].shape == (2, 1, 24)
    assert sorted(path.name for path in plots.iterdir()) == ["0000_first_one.png", "0001.png"]
    assert (plots / "0001.png").read_bytes().startswith(b"\x89PNG")
    genome = open_run(runs / "coverage").dataset.genome
    assert genome is not None
    assert np.array_equal(made.codes[1], genome.codes(Interval("chr1", 508, 532)))
    with pytest.raises(DataError, match="cannot be read"):
        Attributions.load(bed)


def test_labels_are_explained(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.fa").write_text(">a b\n" + "ACGTT" * 20 + "\n>b\n" + "GGATTACA" * 15 + "\n")
    command = ["attribute", runs / "labels", tmp_path / "s.fa", tmp_path / "s.npz", "--plots", tmp_path / "p"]
    assert seqgraft(monkeypatch, *command, "--figures", "svg", "--set", "target.each=true") == 0
    made = Attributions.load(tmp_path / "s.npz")
    assert made.names == ("gc", "purine")
    assert made.values.shape == (2, 2)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        f"{n:04d}_{'ab'[n]}_{k}.svg" for n in (0, 1) for k in (0, 1)
    ]
    assert "</svg>" in (tmp_path / "p" / "0000_a_0.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["r.bed", "a.txt"], 2, "End its name in .npz"),
        (["r.bed", "a.npz", "--set", "target.tracks=[dna]"], 2, "no track has the name: 'dna'. The tracks are rna+"),
        (["r.bed", "a.npz", "--set", "target.track=[atac]"], 2, "Did you mean 'tracks'?"),
        (["r.bed", "a.npz", "--figures", "pdf"], 2, "Choose .png or .svg"),
        (["out.bed", "a.npz"], 3, "reaches beyond its chromosome"),
        (["r.bed", "a.npz", "--set", "genes=g.gtf"], 3, "is no gene of the GTF"),
        (["r.bed", "r.npz"], 5, "exists already"),
        (["r.bed", "a.npz", "--plots", "."], 5, "exists already"),
    ],
)
def test_wrong_commands_are_refused(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.bed").write_text("chr1\t500\t540\tx\n")
    Path("out.bed").write_text("chr1\t500\t99999\n")
    Path("r.npz").write_text("")
    Path("g.gtf").write_text('chr1\t.\texon\t501\t540\t.\t+\t.\tgene_id "g"; transcript_id "t";\n')
    assert seqgraft(monkeypatch, "attribute", runs / "coverage", *arguments) == code
    assert message in capsys.readouterr().err
    assert not Path("a.npz").exists()


def texts_of(figure: Figure) -> list[Text]:
    """Every text that is drawn: not the tick labels beyond an axis' limits, or those that are switched off."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title, *axes.texts]  # type: ignore[attr-defined]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [
                tick.label1
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_visible()
            ]
            found += [
                tick.label2
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label2.get_visible()
            ]
    return [text for text in found if text.get_text().strip()]


@pytest.mark.parametrize(
    ("width", "start", "method"), [(5000, 104_512_330, "gradient"), (40, 0, "ism"), (81, 999, "ism"), (7, 3, "ism")]
)
def test_nothing_in_a_figure_overlaps(width: int, start: int, method: str) -> None:
    rng = np.random.default_rng(0)
    hypothetical, codes = rng.normal(size=(4, width)), rng.integers(0, 5, width).astype(np.uint8)
    hypothetical -= hypothetical.mean(0)
    hypothetical[:, codes == 4] = 0
    number = (
        "rna_activated_plus, rna_activated_minus - rna_naive_plus, rna_naive_minus and more of them, so that it is long"
    )
    figure = attribution_figure(
        hypothetical,
        codes,
        chrom="chr12" if start > 99 else "",
        start=start,
        number=number,
        method=method,
        name="ENSG00000123456.7",
    )
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    assert len(boxes) > 12
    for i, (text, box) in enumerate(boxes):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, text
        assert not [other for other, its in boxes[:i] if its.overlaps(box)], text
    there = np.where(codes < 4, hypothetical[np.minimum(codes, 3), np.arange(width)], 0)
    shown, stop = strongest_stretch(there, 80)
    first, last = (shown + at for at in strongest_stretch(there[shown:stop], 12))  # a place whose letters are shown
    best = max(np.abs(there[at : at + 12]).sum() for at in range(shown, max(shown + 1, stop - 11)))
    assert np.abs(there[first:last]).sum() == pytest.approx(best)
    place = f"chr12:{start + first + 1:,}-{start + last:,}" if start > 99 else f"positions {first + 1} to {last}"
    share = np.abs(there[first:last]).sum() / np.abs(there).sum()
    assert (
        figure.texts[0].get_text().replace("\n", " ")
        == f"ENSG00000123456.7: {share:.0%} of all attribution is at {place}"
    )


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one folder that starts empty."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    found = [block for block in blocks(GUIDE.read_text()) if block.language]
    assert {block.marker.partition(":")[0] for block in found} == {"run", "not run"}
    for block in found:
        if block.marker != "run":
            compile(block.code, GUIDE.name, "exec")
        elif block.language == "python":
            exec(compile(block.code, GUIDE.name, "exec"), names)
        else:
            for line in block.code.splitlines():
                assert seqgraft(monkeypatch, *shlex.split(line)[1:]) == 0
    assert (tmp_path / "figures").is_dir()
    assert (names["again"].attributions == names["made"].attributions).all()
