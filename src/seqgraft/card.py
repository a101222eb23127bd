"""Model cards: what a model is, who made it, what it has seen, and what fine-tuning it takes.

Numbers are counted from shapes alone, so that the card of a published model needs neither its weights nor minutes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqgraft.adapters import IA3, Adapter, FullFineTune, Houlsby, LinearProbe, LoRA
from seqgraft.adapters.base import freeze, modules_at
from seqgraft.data.seen import TRUNK_FOLDS
from seqgraft.errors import ConfigError, ModelError
from seqgraft.memory import bytes_without_computing
from seqgraft.models import hub_borzoi, hub_enformer
from seqgraft.models.base import Head, SequenceModel, Trunk, trainable_state
from seqgraft.models.borzoi import FLASHZOI
from seqgraft.models.folders import TRUNKS, Pretrained, bundled_models, find_model
from seqgraft.models.hub import is_hub_id, licence_of
from seqgraft.models.hub_language import LANGUAGE_MODELS, PublishedLanguage, window_of
from seqgraft.objectives import Elementwise
from seqgraft.predict import Precision
from seqgraft.progress import progress
from seqgraft.sample import Sample
from seqgraft.tracks import TrackTable

__all__ = [
    "PUBLISHED",
    "AdapterCost",
    "ModelFacts",
    "adapter_costs",
    "facts_of",
    "list_models",
    "model_card",
    "write_card",
]

#: The adapters in the table of a card, each with its own defaults.
_SHOWN: tuple[Adapter, ...] = (
    LinearProbe(),
    LoRA(),
    LoRA(dora=True),
    LoRA(where=("conv",)),
    IA3(),
    Houlsby(),
    FullFineTune(),
)
_PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
_COUNTED = "<!-- below: counted by seqgraft -->"


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is built.

    Attributes:
        settings: of the architecture, where they are not its defaults.
        window, bins, bin_size: of its training, in bp, bins and bp.
        tracks: of its heads, in words.
        folds: which regions it was trained on, in words.
        text: what its makers say; Markdown.
    """

    name: str
    architecture: str
    window: int
    bins: int
    bin_size: int
    licence: str
    citation: str
    folds: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tracks: str = ""
    text: str = ""

    def trunk(self) -> Trunk:
        """The trunk without weights, on the device that is the default."""
        crop = (self.window // self.bin_size - self.bins) // 2
        return TRUNKS[self.architecture].build(dict(self.settings), bin_size=self.bin_size, crop=crop)


def _in_words(key: str | None) -> str:
    """What a key of ``TRUNK_FOLDS`` means."""
    if key is None or key not in TRUNK_FOLDS:
        return "not stated"
    return f"key {key!r}: {TRUNK_FOLDS[key].note} ({TRUNK_FOLDS[key].assembly})"


def _borzoi(name: str, settings: Mapping[str, Any], citation: str, folds: str, tracks: str) -> ModelFacts:
    return ModelFacts(
        name=name,
        architecture="borzoi",
        settings=settings,
        window=524_288,
        bins=6_144,
        bin_size=32,
        licence=licence_of(name),
        citation=citation,
        folds=_in_words(folds),
        tracks=tracks,
    )


def _language(name: str, weights: PublishedLanguage) -> ModelFacts:
    settings = dict(weights.settings or {})
    window = window_of(TRUNKS["language"].defaults() | settings) // 16 * 16
    return ModelFacts(
        name=name,
        architecture="language",
        settings=settings,
        window=window,
        bins=window // 16,
        bin_size=16,
        licence=licence_of(name),
        citation=weights.citation,
        folds=_in_words(None),
        tracks="none; a head for masked tokens",
    )


def _published() -> dict[str, ModelFacts]:
    human, mouse = "7,611 of human: RNA-seq, CAGE, DNase, ATAC, ChIP", "2,608 of mouse: the same assays"
    found = []
    for i in range(4):
        name = f"johahi/borzoi-replicate-{i}"
        found.append(_borzoi(name, {}, hub_borzoi.CITATION, "borzoi", human))
        found.append(_borzoi(f"{name}-mouse", {}, hub_borzoi.CITATION, "borzoi_mouse", mouse))
    for i in range(4):
        both = f"{human}; {mouse}"
        citation = f"{hub_borzoi.FLASHZOI_CITATION}; {hub_borzoi.CITATION}"
        found.append(_borzoi(f"johahi/flashzoi-replicate-{i}", FLASHZOI, citation, "borzoi", both))
    enformer = ModelFacts(
        name=hub_enformer.PUBLISHED,
        architecture="enformer",
        window=196_608,
        bins=896,
        bin_size=128,
        licence=licence_of(hub_enformer.PUBLISHED),
        citation=hub_enformer.CITATION,
        folds=_in_words("enformer"),
        tracks="5,313 of human, 1,643 of mouse: DNase, ATAC, ChIP, CAGE",
    )
    language = [_language(name, weights) for name, weights in LANGUAGE_MODELS.items() if weights.settings is not None]
    return {facts.name: facts for facts in [*found, enformer, *language]}


#: Hub id -> the published weights that can be asked for by name. Licences are those that their repositories state.
PUBLISHED: Mapping[str, ModelFacts] = _published()


def facts_of(name: str) -> ModelFacts:
    """What is known of a bundled or published model, a model folder or an architecture; nothing is downloaded.

    Raises:
        ConfigError: there is no such model, or an architecture, which has no window before it is trained.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if is_hub_id(name) and not (Path(name) / "model.json").exists():
        remedy = f"Named can be {', '.join(PUBLISHED)}; of others, the folder that 'seqgraft convert' writes"
        raise ConfigError("there is no such folder, and nothing is known of a hub id of this name", name, remedy=remedy)
    found = find_model(name)
    if found is None:
        remedy = f"Name a model: {', '.join([*bundled_models(), *PUBLISHED])}, or a model folder"
        raise ConfigError("an architecture has no card before it is trained", name, remedy=remedy)
    return _facts_of_folder(found)


def _facts_of_folder(found: Pretrained) -> ModelFacts:
    content = found.content
    if found.folds:
        folds = _in_words(found.folds)
    else:
        folds = "its trained_on.bed" if found.trained_on else "not stated"
    card = found.folder / "card.md"
    text = card.read_text(encoding="utf-8").partition(_COUNTED)[0].strip() if card.exists() else ""
    tracks = found.tracks
    return ModelFacts(
        name=found.name,
        architecture=str(content["architecture"]),
        window=int(content["window"]),
        bins=int(content["bins"]),
        bin_size=int(content["bin_size"]),
        licence=str(content.get("licence") or ""),
        citation=str(content.get("citation") or ""),
        folds=folds,
        settings=content["settings"],
        tracks=f"{len(tracks):,} in {len(tracks.groups)} group{'s' * (len(tracks.groups) != 1)}",
        text=text,
    )


# ---- what an adapter takes ----


@dataclass(frozen=True)
class AdapterCost:
    """What one adapter takes on one model, with a head of one track.

    Attributes:
        trains: numbers that train, the head left out.
        file: bytes of the saved adapter, head included.
        fixed: bytes of weights, gradients and optimiser.
        per_region: bytes of activations and their gradients of one region, by precision; None where shapes do not
            say it.
    """

    label: str
    trains: int
    file: int
    fixed: int
    per_region: Mapping[Precision, int | None]


def adapter_costs(facts: ModelFacts, adapters: Sequence[Adapter]) -> list[AdapterCost]:
    """Counts each adapter at the model's window; those that its trunk has no site for are left out."""
    costs = []
    for adapter in progress(adapters, "count", total=len(adapters)):
        model = _adapted(facts, adapter)
        if model is None:
            continue
        state = trainable_state(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        stored = [*model.parameters(), *model.buffers()]
        samples = [_regions(facts, size) for size in (1, 2)]
        objective = Elementwise(model.tracks)
        costs.append(
            AdapterCost(
                label=adapter.label,
                trains=sum(p.numel() for p in trained) - sum(p.numel() for p in model.heads.parameters()),
                file=_bytes(list(state.values())),
                fixed=_bytes(stored) + 3 * _bytes(trained),
                per_region={p: bytes_without_computing(model, objective, samples, p) for p in _PRECISIONS},
            )
        )
    return costs


def _adapted(facts: ModelFacts, adapter: Adapter) -> SequenceModel | None:
    """The adapted model with a head of one track, without data; None if the trunk lacks the adapter's sites."""
    tracks = TrackTable.build([{"name": "track"}])
    with torch.device("meta"):
        trunk = facts.trunk()
        model = SequenceModel(trunk, {"new_track": Head(tracks, trunk.spec.channels)}, tracks)
        freeze(trunk)
        try:
            adapter.modules(trunk)
        except ModelError:
            return None
        adapter.apply(model)
    model.train()
    return model


def _regions(facts: ModelFacts, size: int) -> Sample:
    codes, lengths = torch.zeros(size, facts.window, dtype=torch.uint8), torch.full((size,), facts.window)
    targets = torch.zeros(size, 1, facts.bins)
    return Sample(codes, lengths, torch.arange(size), targets, torch.ones_like(targets, dtype=torch.bool))


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- in words ----


def list_models() -> str:
    """The models that come with the package, the published ones that can be named, and the architectures."""
    lines = ["Bundled:"]
    for name, model in bundled_models().items():
        content = model.content
        tracks = f"bins of {content['bin_size']} bp, {len(content['tracks'])} tracks"
        task = "masked tokens" if content["settings"].get("lm_head") else tracks
        lines.append(
            f"  {name}: {content['architecture']}, {content.get('parameters', 0):,} parameters, "
            f"{task}, trained with windows of {content['window']} bp, licence {content.get('licence') or 'not stated'}"
        )
    lines.append("Published, on the Hugging Face hub:")
    for name, facts in PUBLISHED.items():
        size = "any size" if TRUNKS[facts.architecture].any_bin_size else f"{facts.bin_size} bp"
        lines.append(
            f"  {name}: {facts.architecture}, bins of {size}, windows of {facts.window} bp, licence {facts.licence}"
        )
    for name in [name for name, weights in LANGUAGE_MODELS.items() if weights.settings is None]:
        lines.append(f"  {name}: language, licence {licence_of(name)}; the rest is in its files: convert it")
    lines.append(f"Architectures with random weights: {', '.join(TRUNKS)}.")
    lines.append("'seqgraft models NAME' prints what is known of one, and what fine-tuning it takes.")
    return "\n".join(lines)


def model_card(facts: ModelFacts) -> str:
    """The card, in Markdown: what the makers say, then what is counted."""
    with torch.device("meta"):
        trunk = facts.trunk()
    defaults = trunk.defaults()
    differing = {name: value for name, value in facts.settings.items() if value != defaults.get(name)}
    settings = ", ".join(f"{name} {value}" for name, value in differing.items())
    sites = trunk.spec.sites
    rows = {
        "architecture": f"`{facts.architecture}`" + (f", {settings}" if settings else ""),
        "parameters": f"{sum(p.numel() for p in trunk.parameters()):,} in the trunk",
        "input": f"{facts.window:,} bp",
        "output": f"{facts.bins:,} bins of {facts.bin_size} bp ({facts.bins * facts.bin_size:,} bp in the middle), "
        f"{trunk.spec.channels:,} features each",
        "tracks": facts.tracks,
        "licence": facts.licence or "not stated",
        "citation": facts.citation or "not stated",
        "trained on": facts.folds,
        "sites": ", ".join(f"{site} ({len(names)})" for site, names in sites.items() if names and "." not in site),
    }
    lines = [facts.text or f"# {facts.name}", "", _COUNTED, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value]
    lines += ["", *_costs_table(facts, trunk)]
    return "\n".join(lines) + "\n"


def _costs_table(facts: ModelFacts, trunk: Trunk) -> list[str]:
    lines = [
        f"What one training step takes, with windows of {facts.window:,} bp and a head of one track "
        f"({trunk.spec.channels + 1:,} numbers more for each further one):",
        "",
        "| adapter | numbers that train | file | weights and optimiser | one region, float32 | one region, bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for cost in adapter_costs(facts, _SHOWN):
        counts = [cost.per_region[precision] for precision in _PRECISIONS]
        per = ["unknown" if count is None else _size(count) for count in counts]
        cells = (cost.label, f"{cost.trains:,}", _size(cost.file), _size(cost.fixed), *per)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Counted from shapes, not measured: what lives at the worst moment of a step, without an allocator's reserve "
        "and the workspaces of kernels, for the operations that torch runs on CPU: a card's kernels for attention may "
        "take less. `train.checkpointing` takes less for a fifth more time.",
    ]
    if linear := _linear_weights(trunk):
        lines.append(
            f"QLoRA holds the {linear:,} weights of linear layers in 4 bits instead of 32 ({_size(linear * 7 // 2)} "
            "less) and has the activations of LoRA; its packed weights are not counted here."
        )
    return lines


def _linear_weights(trunk: Trunk) -> int:
    """How many weights of linear layers quantisation reaches: those at any site."""
    names = modules_at(trunk, [site for site, there in trunk.spec.sites.items() if there])
    modules = [trunk.get_submodule(name) for name in names]
    return sum(module.weight.numel() for module in modules if type(module) is nn.Linear)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GB"


def write_card(folder: Path | str) -> Path:
    """Adds to the ``card.md`` of a model folder what is counted, below what its makers wrote; returns its path.

    Raises:
        ConfigError: no model folder.
    """
    path = Path(folder) / "card.md"
    text = model_card(facts_of(str(folder)))
    building = path.with_name(".card.md.part")
    building.write_text(text, encoding="utf-8")
    os.replace(building, path)
    return path
