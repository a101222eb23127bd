"""Local recomputation gives what full passes give, with less work; where it cannot be used, it says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from builders import settled_borzoi, settled_trunk, tiny_enformer, track_table
from seqgraft.adapters import IA3, Adapter, Houlsby, LoRA, adapt
from seqgraft.errors import ModelError
from seqgraft.local import Recompute
from seqgraft.models.base import Head, SequenceModel, Span, Stage, State, Step, Trunk
from seqgraft.models.baskerville import load_baskerville
from seqgraft.models.wrap import ModuleSpec, wrap
from seqgraft.sample import Sample
from seqgraft.sequence import PAD, N
from seqgraft.tracks import TrackTable

WINDOW = 2048
TOLERANCE = 1e-5  # of the largest value


def model_of(trunk: Trunk, pool: str = "none") -> SequenceModel:
    """A trunk whose BatchNorm has the statistics of random sequences, with two heads of different links."""
    torch.manual_seed(1)
    norms = [module for module in trunk.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    trunk.train()
    with torch.no_grad():
        trunk(torch.randint(0, 4, (8, WINDOW), dtype=torch.uint8))
    table = TrackTable.build(
        {"name": name, "group": group, "link": link}
        for name, group, link in [
            ("a", "signal", "softplus"),
            ("class", "other", "identity"),
            ("b", "signal", "softplus"),
        ]
    )
    heads = {
        group: Head(table.select([table.names[i] for i in index]), trunk.spec.channels, pool)  # type: ignore[arg-type]
        for group, index in table.groups.items()
    }
    return SequenceModel(trunk, heads, table).eval()


def with_adapter(trunk: Trunk, adapter: Adapter) -> SequenceModel:
    """An adapter that has left its start, where it does nothing."""
    model = model_of(trunk)
    before = {id(parameter) for parameter in model.parameters()}
    adapt(model, adapter)
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            if parameter.requires_grad and id(parameter) not in before:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


MODELS: dict[str, Callable[[], SequenceModel]] = {
    "convnet": lambda: model_of(settled_trunk(1, depth=4, crop=10)),
    "convnet without a transformer": lambda: model_of(settled_trunk(2, depth=3, blocks=0, crop=10)),
    "borzoi": lambda: model_of(settled_borzoi(1, crop=10, blocks=2)),
    "borzoi without a transformer": lambda: model_of(settled_borzoi(2, bin_size=8, crop=10, blocks=0)),
    "flashzoi": lambda: model_of(
        settled_borzoi(3, attention="rotary", key_heads=1, key_size=8, rotary_size=4, crop=10, blocks=2)
    ),
    "enformer": lambda: model_of(tiny_enformer(3, crop=10, depth=2)),
    "lora": lambda: with_adapter(settled_borzoi(4), LoRA(rank=2)),
    "locon": lambda: with_adapter(settled_borzoi(5), LoRA(rank=2, where=("conv", "attention"))),
    "ia3": lambda: with_adapter(settled_borzoi(6), IA3(where=("attention", "feedforward", "conv"))),
    "houlsby": lambda: with_adapter(tiny_enformer(7), Houlsby(4)),
    "squeeze-excite": lambda: with_adapter(settled_borzoi(8), Houlsby(4, squeeze_excite=4, last=2)),
    "squeeze-excite everywhere": lambda: with_adapter(settled_borzoi(9), Houlsby(4, squeeze_excite=4)),
    "a head that pools": lambda: model_of(settled_trunk(10, crop=0), pool="mean"),
    "a head that pools, no transformer": lambda: model_of(settled_trunk(11, crop=0, blocks=0), pool="max"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> SequenceModel:
    return MODELS[request.param]()


def random_codes(length: int = WINDOW, seed: int = 0) -> Tensor:
    return torch.randint(0, 4, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def places(length: int, rng: np.random.Generator, around: int = 32) -> Iterator[int]:
    """The ends of the window, the bases around multiples of the stride, then anywhere."""
    yield from (0, 1, length - 2, length - 1)
    for middle in range(around, length, max(around, length // 12 // around * around)):
        yield from (middle - 1, middle, middle + 1)
    while True:
        yield int(rng.integers(length))


def alternates(codes: Tensor, count: int, seed: int = 0) -> Tensor:
    """Substitutions of 1 to 6 bases, insertions and deletions of up to 40, and an N, ``(count, length)``."""
    rng = np.random.default_rng(seed)
    window, length = codes.numpy(), len(codes)
    made = []
    for i, at in zip(range(count), places(length, rng), strict=False):
        size = int(rng.integers(1, 7)) if i % 4 == 1 else 1
        kind = ("substitution", "substitution", "insertion", "deletion")[i % 4] if i >= 12 else "substitution"
        new = rng.integers(0, 4, int(rng.integers(1, 41)), dtype=np.uint8)
        left, right = window[:at], window[at:]
        if kind == "substitution":
            other = (right[:size] + rng.integers(1, 4)) % 4
            whole = [left, other if i != 20 else np.full_like(other, N), right[size:]]
        elif kind == "insertion":
            whole = [left, new, right]
        else:
            whole = [left, right[len(new) :], new]
        made.append(np.concatenate(whole)[:length])
    return torch.from_numpy(np.stack(made))


def full(model: SequenceModel, codes: Tensor, at_once: int = 50) -> Tensor:
    parts = []
    with torch.inference_mode():
        for chunk in codes.split(at_once):
            nothing = torch.zeros(len(chunk), 0, 0)
            lengths = torch.full((len(chunk),), codes.shape[1])
            parts.append(model.predict(Sample(chunk, lengths, lengths, nothing, nothing)))
    return torch.cat(parts)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def spans(count: int, bins: int, width: int, seed: int = 0) -> list[Span]:
    """Both ends, and anywhere; some of them twice."""
    starts = [0, bins - width, *np.random.default_rng(seed).integers(0, bins - width + 1, count - 2).tolist()]
    starts[3:6] = [starts[2]] * len(starts[3:6])
    return [(start, start + width) for start in starts]


# ---- exactness ----


def test_local_is_full(model: SequenceModel) -> None:
    codes = random_codes()
    edited = alternates(codes, 200)
    recompute = Recompute(model)
    assert "everything" not in recompute.in_words
    reference = recompute.reference(codes)
    wanted, known = full(model, edited), full(model, codes[None])[0]
    assert difference(recompute.predict_reference(reference), known) <= TOLERANCE
    found = torch.cat([recompute.predict(reference, chunk) for chunk in edited.split(40)])
    assert difference(found, wanted) <= TOLERANCE
    assert difference(known.expand_as(wanted), wanted) > 1e-2, "edits that change nothing test nothing"
    if known.shape[-1] > 1:
        asked = spans(len(edited), known.shape[-1], width=5)
        narrow = torch.stack([row[:, slice(*span)] for row, span in zip(wanted, asked, strict=True)])
        assert difference(recompute.predict(reference, edited, asked), narrow) <= TOLERANCE
        for span in asked[:4]:
            assert difference(recompute.predict_reference(reference, span), known[:, slice(*span)]) <= TOLERANCE


@pytest.mark.parametrize("name", ["borzoi", "convnet without a transformer", "enformer"])
def test_batched_is_single(name: str) -> None:
    model = MODELS[name]()
    codes = random_codes()
    edited, recompute = alternates(codes, 30, seed=3), Recompute(model)
    reference = recompute.reference(codes)
    asked = spans(30, recompute.predict_reference(reference).shape[-1], width=4)
    batched = recompute.predict(reference, edited, asked)
    single = [recompute.predict(reference, row[None], [span]) for row, span in zip(edited, asked, strict=True)]
    assert difference(batched, torch.cat(single)) <= TOLERANCE


@pytest.fixture(scope="module")
def trained(shared: Path) -> SequenceModel:
    files = shared / "reference" / "parity" / "trained_0.6M"
    return load_baskerville(files / "model.h5", files / "params.json", files / "targets.txt").model()


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_the_trained_network(count: int, trained: SequenceModel, shared: Path) -> None:
    with np.load(shared / "reference" / "parity" / "trained_0.6M" / "tiny_hg38_test.npz") as arrays:
        codes = torch.from_numpy(np.ascontiguousarray(arrays["seq_index"][0]).astype(np.uint8))
    edited, recompute = alternates(codes, count), Recompute(trained)
    reference = recompute.reference(codes)
    wanted = full(trained, edited, 8)
    found = torch.cat([recompute.predict(reference, chunk) for chunk in edited.split(8)])
    assert difference(found, wanted) <= TOLERANCE
    assert difference(recompute.predict_reference(reference).expand_as(wanted), wanted) > 1e-3
    asked = spans(len(edited), wanted.shape[-1], width=16)
    narrow = torch.stack([row[:, slice(*span)] for row, span in zip(wanted, asked, strict=True)])
    assert difference(recompute.predict(reference, edited, asked), narrow) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["convnet", "borzoi", "flashzoi", "enformer", "squeeze-excite"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_global_stage_at_some_positions(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a few queries at a time, whose number does not divide theirs."""
    trunk = MODELS[name]().trunk
    codes = torch.stack([random_codes(seed=1), random_codes(seed=2)])
    state = trunk.encode(codes, torch.tensor([WINDOW, WINDOW - 700]) if padded else None)
    seen = 0
    for stage in trunk.stages.values():
        assert isinstance(stage, Stage)
        whole = stage(state)
        if not stage.local:
            length = whole.x.shape[-1]
            monkeypatch.setattr("seqgraft.models.enformer._CHUNK", 5)
            monkeypatch.setattr("seqgraft.models.borzoi._CHUNK", 5)
            for span in [(0, 1), (0, length), (length // 3, length // 2), (length - 1, length)]:
                part = stage.at(state, span)
                assert difference(part.x, whole.x[..., slice(*span)]) <= TOLERANCE
                assert (part.valid is None) == (whole.valid is None)
                if part.valid is not None and whole.valid is not None:
                    assert torch.equal(part.valid, whole.valid[:, slice(*span)])
                seen += 1
            monkeypatch.undo()
        state = whole
    assert seen


# ---- a halo one base short is found ----


def every_base(codes: Tensor, start: int, count: int) -> Tensor:
    """A substitution at each of ``count`` neighbouring bases."""
    edited = codes.repeat(count, 1)
    edited[range(count), range(start, start + count)] = (codes[start : start + count] + 1) % 4
    return edited


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("which", ["touched", "needed"])
def test_a_halo_one_base_short_is_found(which: str, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reach of the prefix is 1 modulo its stride of 32 bp, so that no rounding of crops hides the missing base."""
    model = model_of(settled_borzoi(1, stem_kernel=11, blocks=1, crop=0, bin_size=32))
    codes, recompute = random_codes(), Recompute(model)
    halo = recompute._prefix[0].needed({"x": (0, 1)})["x"]
    assert halo == (-5, 7)
    edited = every_base(codes, 1000, 64)
    wanted = full(model, edited)
    reference = recompute.reference(codes)
    assert difference(recompute.predict(reference, edited), wanted) <= TOLERANCE
    whole = getattr(Step, which)

    def short(step: Step, span: Span) -> Span:
        start, stop = whole(step, span)
        if step.kind == "conv" and step.size == 11:
            return (start + 1, stop) if end == 0 else (start, stop - 1)
        return start, stop

    monkeypatch.setattr(Step, which, short)
    assert difference(recompute.predict(reference, edited), wanted) > TOLERANCE


# ---- what is computed ----


def positions(model: SequenceModel, run: Callable[[], object]) -> dict[str, list[tuple[int, int]]]:
    """Batch and positions that enter each stage and head."""
    seen: dict[str, list[tuple[int, int]]] = {}
    parts = {**dict(model.trunk.stages.items()), **dict(model.heads.items())}

    def note(name: str, state: State) -> None:
        seen.setdefault(name, []).append((len(state.x), state.x.shape[-1]))

    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: note(n, a[0])) for n, m in parts.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def test_alternates_run_on_patches_and_on_what_bins_need() -> None:
    model = MODELS["borzoi"]()
    codes, recompute = random_codes(), Recompute(model)
    assert recompute.in_words == (
        "stem to tower_3 on patches around edits; transformer_0 to transformer_1 whole; "
        "upsample_0 to final and the heads on what the bins asked for need"
    )
    seen = positions(model, lambda: recompute.reference(codes))
    assert seen.keys() == {"stem", "tower_0", "tower_1", "tower_2", "tower_3"}
    reference = recompute.reference(codes)
    edited = every_base(codes, 1010, 6)
    asked = [(40, 44)] * 3 + [(60, 64)] * 3
    seen = positions(model, lambda: recompute.predict(reference, edited, asked))
    assert sum(batch for batch, _ in seen["stem"]) == 6
    assert max(width for _, width in seen["stem"]) < 350
    assert len(seen["stem"]) <= 2
    assert seen["transformer_0"] == [(6, 64)]
    assert "transformer_1" not in seen, "only the positions that bins need pass the last one, by `at`"
    assert [batch for batch, _ in seen["upsample_0"]] == [3, 3]
    assert max(width for _, width in seen["upsample_0"]) <= 4
    assert max(width for _, width in seen["final"]) <= 8
    assert [entry for name in model.heads for entry in seen[name]] == [(3, 4)] * 4
    seen = positions(model, lambda: [recompute.predict_reference(reference, span) for span in asked])
    assert seen["transformer_0"] == [(1, 64)], "once for all"


def test_without_a_global_stage_only_bins_within_reach_are_computed() -> None:
    model = MODELS["convnet without a transformer"]()
    codes, recompute = random_codes(), Recompute(model)
    reference = recompute.reference(codes)
    recompute.predict_reference(reference)
    edited = every_base(codes, 1010, 4)
    seen = positions(model, lambda: recompute.predict(reference, edited))
    assert "bins that edits reach" in recompute.in_words
    assert max(width for name in model.heads for _, width in seen[name]) < 20
    assert not positions(model, lambda: recompute.predict(reference, edited, [(0, 5)] * 4)).keys() & model.heads.keys()


def test_the_reference_keeps_what_is_read() -> None:
    recompute = Recompute(MODELS["borzoi"]())
    reference = recompute.reference(random_codes())
    assert reference.state is not None
    assert reference.state.skips.keys() == {"tower_3"}
    assert reference.after is None
    recompute.predict_reference(reference, (0, 1))
    assert reference.after is not None
    assert not reference.after.skips


def test_the_model_keeps_its_mode() -> None:
    model = MODELS["borzoi"]().train()
    recompute = Recompute(model)
    recompute.predict_reference(recompute.reference(random_codes()))
    assert model.training


# ---- where it does not apply ----


def test_squeeze_excitation_ends_the_patches() -> None:
    assert Recompute(MODELS["squeeze-excite"]()).in_words.startswith(
        "stem to tower_2 on patches around edits; tower_3 to final whole (squeeze-excitation in tower_3 reads the whole"
    )
    assert Recompute(MODELS["squeeze-excite everywhere"]()).in_words.startswith("stem to final whole (squeeze-excit")


def test_it_can_be_switched_off() -> None:
    model = MODELS["enformer"]()
    codes, recompute = random_codes(), Recompute(model, local=False)
    assert recompute.in_words == "everything, because it was asked for"
    edited = alternates(codes, 5)
    reference, asked = recompute.reference(codes), spans(5, 108, width=3)  # of 128 bins without 20
    wanted = full(model, edited)
    assert torch.equal(recompute.predict(reference, edited), wanted)
    assert torch.equal(recompute.predict_reference(reference, (3, 5)), full(model, codes[None])[0][:, 3:5])
    narrow = torch.stack([row[:, slice(*span)] for row, span in zip(wanted, asked, strict=True)])
    assert torch.equal(recompute.predict(reference, edited, asked), narrow)


@pytest.mark.parametrize("length", [WINDOW - 20, WINDOW])
def test_windows_with_padding_are_computed_whole(length: int) -> None:
    model = MODELS["borzoi"]()
    codes, recompute = random_codes(), Recompute(model)
    codes = codes[:length]
    if length == WINDOW:
        codes[-20:] = PAD
    edited = every_base(codes, 700, 3)
    reference = recompute.reference(codes)
    assert reference.state is None
    nothing = torch.zeros(3, 0, 0)
    lengths = torch.full((3,), WINDOW - 20)
    with torch.inference_mode():
        wanted = model.predict(Sample(edited, lengths, lengths, nothing, nothing))
    assert torch.equal(recompute.predict(reference, edited), wanted)


class _Placed(nn.Module):
    """Adds an embedding of the absolute position: each output depends on one input, and on where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4 * WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[:, : x.shape[-1]]


class _Mean(nn.Module):
    """Global."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        (None, "conv to pool on patches around edits; mean whole; out to crop and the heads on what the bins asked"),
        ("conv", "everything, because conv does not do the same at every position"),
        ("out", "everything, because out does not do the same at every position"),
    ],
)
def test_a_wrapped_module_that_knows_positions_is_computed_whole(placed: str | None, words: str) -> None:
    torch.manual_seed(0)
    chain: dict[str, nn.Module] = {
        "conv": nn.Conv1d(4, 4, 9, padding=4),
        "pool": nn.MaxPool1d(8),
        "mean": _Mean(),
        "out": nn.Conv1d(4, 4, 3, padding=1),
    }
    if placed:
        chain[placed] = nn.Sequential(chain[placed], _Placed())
    trunk = wrap(chain, ModuleSpec("mine", channels=4, bin_size=8))
    table = track_table(["a"])
    model = SequenceModel(trunk, {"a": Head(table, 4)}, table).eval()
    codes, recompute = random_codes(), Recompute(model)
    assert recompute.in_words.startswith(words)
    edited = alternates(codes, 20)
    asked = spans(20, WINDOW // 8, width=3)
    reference, wanted = recompute.reference(codes), full(model, edited)
    assert difference(recompute.predict(reference, edited), wanted) <= TOLERANCE
    narrow = torch.stack([row[:, slice(*span)] for row, span in zip(wanted, asked, strict=True)])
    assert difference(recompute.predict(reference, edited, asked), narrow) <= TOLERANCE


def test_what_cannot_be_predicted() -> None:
    model = MODELS["borzoi"]()
    recompute = Recompute(model)
    reference = recompute.reference(random_codes())
    bins = recompute.predict_reference(reference).shape[-1]
    two = random_codes().repeat(2, 1)
    with pytest.raises(ModelError, match="2048 bp"):
        recompute.predict(reference, two[:, :-32])
    with pytest.raises(ModelError, match="2048 bp"):
        recompute.predict(reference, two[:0])
    with pytest.raises(ModelError, match="equally wide"):
        recompute.predict(reference, two, [(0, 2), (0, 3)])
    with pytest.raises(ModelError, match="as many"):
        recompute.predict(reference, two, [(0, 2)])
    for wrong in [(-1, 2), (bins - 1, bins + 1), (3, 3)]:
        with pytest.raises(ModelError, match=f"the {bins} that the model gives"):
            recompute.predict(reference, two, [wrong, wrong])
        with pytest.raises(ModelError, match=f"the {bins} that the model gives"):
            recompute.predict_reference(reference, wrong)
