"""DNA language models beside transformers and peft: a BERT of the same random weights, in one process on one thread.

The numbers are process CPU seconds. Where steps are compared, the sides take turns step by step. Dropout is 0, so that
both sides compute one function: before anything is timed their hidden states are compared.

=========  =========================================  ==========================================================
case       ours                                       the peer
=========  =========================================  ==========================================================
probe      ``fit`` of a linear probe with the cache   the same probe in transformers' ``Trainer``, the body frozen
buckets    batches of like length                     random batches, padded by ``DataCollatorWithPadding``
adapters   LoRA, DoRA, IA3 on our layers              peft on transformers' ``BertModel``, in a loop of one's own
qlora      LoRA on a base in 4 or 8 bits              our LoRA on the base in float32
=========  =========================================  ==========================================================
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from seqgraft.adapters import IA3, Adapter, FullFineTune, LinearProbe, LoRA, adapt, merge
from seqgraft.data.augment import Augmentation
from seqgraft.data.dataset import Dataset, DatasetInfo, open_dataset, write_dataset
from seqgraft.memory import FrozenBytes, LiveBytes, tensors_of, training_step
from seqgraft.models.base import SequenceModel
from seqgraft.models.weights import ModelConfig, build_model
from seqgraft.objectives import Elementwise
from seqgraft.sample import Sample
from seqgraft.sequence import PAD, encode
from seqgraft.tracks import TrackTable
from seqgraft.train import TrainConfig, fit

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MOTIF = "TATAATGCTATAAT"  # planted in half of the sequences, in copies
_QUERY_VALUE = ("attention.query", "attention.value")
_KEY_VALUE_DOWN = r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)"
_DOWN = r".*layer\.\d+\.output\.dense"


class Case(Protocol):
    """What is compared."""

    def lines(self, folder: Path) -> Iterator[str]:
        """The comparison in words, in an empty folder."""
        ...


@dataclass(frozen=True)
class Bert:
    """Sizes of the network; the defaults are those of BERT base with 6-mers, 89 million parameters."""

    k: int = 6
    channels: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072

    def save(self, folder: Path) -> Any:
        """transformers' model, and its files in the folder."""
        import transformers

        kmers = ["".join("ACGT"[i >> 2 * j & 3] for j in range(self.k)[::-1]) for i in range(4**self.k)]
        config = transformers.BertConfig(
            vocab_size=len(_SPECIAL) + len(kmers),
            hidden_size=self.channels,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        torch.manual_seed(0)
        body = transformers.BertModel(config, add_pooling_layer=False)
        body.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join([*_SPECIAL, *kmers]))
        return body

    def tokens(self, dataset: Dataset, row: int) -> dict[str, Any]:
        """One item of the peer's data: ids, and the label."""
        assert dataset.codes is not None
        assert dataset.lengths is not None
        codes = np.asarray(dataset.codes[row, : dataset.lengths[row]], dtype=np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(codes, self.k)
        ids = len(_SPECIAL) + windows @ 4 ** np.arange(self.k)[::-1]
        return {"input_ids": [2, *ids.tolist(), 3], "labels": float(dataset.targets[row, 0, 0])}


class _Pooled(nn.Module):
    """The mean of the body's states over the tokens of bases, and a linear layer: what one gives to the Trainer."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        of_bases = (input_ids >= len(_SPECIAL)).unsqueeze(-1)
        logits = self.head((states * of_bases).sum(1) / of_bases.sum(1))[:, 0]
        return {"loss": functional.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Probe:
    """A frozen body and a linear layer on the mean of its states; float32 on both sides, both validate every epoch."""

    bert: Bert = Bert()
    sequences: int = 256  # and an eighth as many for validation
    length: int = 131  # bp: 128 tokens
    epochs: int = 2  # of the peer: its epochs are all alike
    our_epochs: int = 12
    batch_size: int = 8
    lr: float = 1e-2

    def lines(self, folder: Path) -> Iterator[str]:
        body = self.bert.save(folder / "bert")
        dataset = labelled(folder / "data", self.sequences, (self.length, self.length))
        model = our_model(folder / "bert", dataset, LinearProbe())
        yield f"  {same_states(model, body, self.bert, dataset)}"
        config = TrainConfig(
            epochs=self.our_epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            schedule="constant",
            patience=0,
            metric="accuracy",
            precision="float32",
            augment=Augmentation(reverse_complement=False),
            cache="float32",
        )
        objective = _Epochs(dataset.tracks)
        (folder / "run").mkdir()
        fit(model, dataset, objective, config, folder / "run")
        ours = np.diff([*objective.began, time.process_time()])
        scores = pd.read_csv(folder / "run" / "log.csv")["valid_score"].tolist()
        theirs, their_scores = self._trainer(body, dataset, folder)
        both = min(len(scores), len(their_scores))
        later, other = statistics.median(ours[1:]), statistics.median(theirs)
        yield f"  an epoch: ours {later:.4f} CPU s, the first {ours[0]:.2f}; Trainer {other:.2f}"
        yield f"  Trainer / ours from the second epoch on {other / later:.0f}x"
        yield (
            f"  accuracy in validation after {both} epochs: ours {scores[both - 1]:.3f}, "
            f"Trainer {their_scores[both - 1]:.3f}"
        )

    def _trainer(self, body: nn.Module, dataset: Dataset, folder: Path) -> tuple[list[float], list[float]]:
        """CPU seconds of each epoch, and the accuracy after it."""
        import transformers

        class Clock(transformers.TrainerCallback):
            def __init__(self) -> None:
                self.marks: list[float] = []

            def on_epoch_begin(self, *_: object, **__: object) -> None:
                self.marks.append(time.process_time())

            on_train_end = on_epoch_begin

        clock, scores = Clock(), []

        def accuracy(found: Any) -> dict[str, float]:
            scores.append(float(((found.predictions > 0) == (found.label_ids > 0.5)).mean()))
            return {"accuracy": scores[-1]}

        torch.manual_seed(1)
        trainer = transformers.Trainer(
            model=_Pooled(body.requires_grad_(False), self.bert.channels),
            args=transformers.TrainingArguments(
                output_dir=str(folder / "peer"),
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=self.batch_size,
                num_train_epochs=self.epochs,
                learning_rate=self.lr,
                lr_scheduler_type="constant",
                eval_strategy="epoch",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=1,
            ),
            train_dataset=[self.bert.tokens(dataset, row) for row in dataset.rows("train")],
            eval_dataset=[self.bert.tokens(dataset, row) for row in dataset.rows("valid")],
            data_collator=collator(folder / "bert"),
            compute_metrics=accuracy,
            callbacks=[clock],
        )
        trainer.train()
        return np.diff(clock.marks).tolist(), scores


class _Epochs(Elementwise):
    """Notes when each epoch begins."""

    def __init__(self, tracks: TrackTable) -> None:
        super().__init__(tracks)
        self.began: list[float] = []
        self._asked = False

    def batches(self, rows: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> list[npt.NDArray[np.int64]]:
        if self._asked:  # fit counts the batches once before it begins
            self.began.append(time.process_time())
        self._asked = True
        return super().batches(rows, size, seed, epoch)


@dataclass(frozen=True)
class Buckets:
    """One epoch of full fine-tuning on sequences of many lengths."""

    bert: Bert = Bert(channels=128, depth=4, heads=4, hidden=512)
    sequences: int = 640
    lengths: tuple[int, int] = (50, 500)
    batch_size: int = 16

    def lines(self, folder: Path) -> Iterator[str]:
        body = self.bert.save(folder / "bert")
        dataset = labelled(folder / "data", self.sequences, self.lengths)
        rows = dataset.rows("train")
        sides: dict[str, Iterator[object]] = {}
        padding: dict[str, float] = {}
        for name, lengths in (("buckets", dataset.lengths), ("shuffled", None)):
            model = our_model(folder / "bert", dataset, FullFineTune())
            if name == "buckets":
                yield f"  {same_states(model, body, self.bert, dataset)}"
            objective = Elementwise(dataset.tracks, lengths=lengths)
            batches = objective.batches(rows, self.batch_size, seed=1, epoch=0)
            padding[name] = _padding(dataset, batches)
            sides[name] = our_steps(model, objective, (dataset.sample(batch) for batch in batches))
        items: Any = [self.bert.tokens(dataset, row) for row in rows]
        shuffled: Iterable[Mapping[str, Tensor]] = torch.utils.data.DataLoader(
            items,
            self.batch_size,
            shuffle=True,
            collate_fn=collator(folder / "bert"),
            generator=torch.Generator().manual_seed(1),
        )
        sides["peer"] = peer_steps(_Pooled(body, self.bert.channels), shuffled)
        seconds = {name: sum(found) for name, found in in_turn(sides).items()}
        for name in ("buckets", "shuffled"):
            yield f"  ours, {name}: {padding[name]:.1%} of the positions padding, {seconds[name]:.2f} CPU s an epoch"
        yield f"  transformers, DataCollatorWithPadding: {seconds['peer']:.2f} CPU s an epoch"
        yield (
            f"  peer / buckets {seconds['peer'] / seconds['buckets']:.2f}x, "
            f"shuffled / buckets {seconds['shuffled'] / seconds['buckets']:.2f}x"
        )


def _padding(dataset: Dataset, batches: Sequence[npt.NDArray[np.int64]]) -> float:
    assert dataset.lengths is not None
    there = sum(int(dataset.lengths[batch].sum()) for batch in batches)
    return 1 - there / sum(len(batch) * int(dataset.lengths[batch].max()) for batch in batches)


@dataclass(frozen=True)
class Adapters:
    """Steps of one size on the same batches, each method on both sides."""

    bert: Bert = Bert()
    length: int = 131
    batch_size: int = 2
    steps: int = 7

    def lines(self, folder: Path) -> Iterator[str]:
        self.bert.save(folder / "bert")
        dataset = labelled(folder / "data", self.batch_size * self.steps, (self.length, self.length))
        for name, (adapter, settings) in _METHODS.items():
            body, model = self.bert.save(folder / "bert"), our_model(folder / "bert", dataset, adapter)
            yield f"  {name}: {same_states(model, body, self.bert, dataset)}"
            batches = dataset.rows("train").reshape(-1, self.batch_size)
            pad = collator(folder / "bert")
            items = [pad([self.bert.tokens(dataset, row) for row in batch]) for batch in batches]
            sides = {
                "ours": our_steps(model, Elementwise(dataset.tracks), (dataset.sample(batch) for batch in batches)),
                "peft": peer_steps(_Pooled(_with_peft(body, settings), self.bert.channels), items),
            }
            ours, theirs = (statistics.median(found[1:]) for found in in_turn(sides).values())
            yield f"  {name}: ours {1e3 * ours:.1f} CPU ms a step, peft {1e3 * theirs:.1f}, ratio {ours / theirs:.3f}"


@dataclass(frozen=True)
class Quantised:
    """LoRA steps on the frozen base in float32, in 4 and in 8 bits; bytes are counted, of all tensors."""

    bert: Bert = Bert()
    length: int = 131
    batch_size: int = 4
    steps: int = 5

    def lines(self, folder: Path) -> Iterator[str]:
        self.bert.save(folder / "bert")
        dataset = labelled(folder / "data", self.batch_size * self.steps, (self.length, self.length))
        batches = dataset.rows("train").reshape(-1, self.batch_size)
        kinds: Sequence[Literal["nf4", "int8"] | None] = (None, "nf4", "int8")
        objective = Elementwise(dataset.tracks)
        models: dict[str, SequenceModel] = {}
        for kind in kinds:
            models[kind or "float32"] = our_model(folder / "bert", dataset, LoRA(where=_QUERY_VALUE, quantize=kind))
        sides = {
            name: our_steps(model, objective, (dataset.sample(batch) for batch in batches))
            for name, model in models.items()
        }
        for name, found in in_turn(sides).items():
            model, frozen = models[name], FrozenBytes.of(models[name])
            with LiveBytes(tensors_of(model)) as live:
                training_step(model, objective, dataset.sample(batches[0]), "float32").backward()  # type: ignore[no-untyped-call]
            merged = merge(model)
            yield (
                f"  {name}: frozen weights {frozen.before / 1e6:.1f} -> {frozen.now / 1e6:.1f} MB, a step beside all "
                f"weights {live.peak / 1e6:.1f} MB, {1e3 * statistics.median(found[1:]):.1f} CPU ms; "
                f"merged differs by {merged:.1e} of the largest output"
            )


_METHODS: Mapping[str, tuple[Adapter, Mapping[str, Any]]] = {
    "LoRA": (
        LoRA(rank=8, where=_QUERY_VALUE),
        {"kind": "LoraConfig", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
    ),
    "DoRA": (
        LoRA(rank=8, where=_QUERY_VALUE, dora=True),
        {"kind": "LoraConfig", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "use_dora": True},
    ),
    "IA3": (IA3(), {"kind": "IA3Config", "target_modules": _KEY_VALUE_DOWN, "feedforward_modules": _DOWN}),
}


def _with_peft(body: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    import peft

    rest = {name: value for name, value in settings.items() if name != "kind"}
    return peft.get_peft_model(body, getattr(peft, settings["kind"])(**rest))  # type: ignore[no-any-return]


# ---- both sides ----


def run(cases: Iterable[Case] | None = None) -> Iterator[str]:
    """Some lines per case."""
    torch.set_num_threads(1)
    for case in CASES.values() if cases is None else cases:
        yield f"{type(case).__name__}: {asdict(case)}"  # type: ignore[call-overload]
        with tempfile.TemporaryDirectory() as name:
            os.environ["SEQGRAFT_CACHE"] = f"{name}/cache"
            yield from case.lines(Path(name))


def our_model(bert: Path, dataset: Dataset, adapter: Adapter) -> SequenceModel:
    """The saved network with a new head and an adapter."""
    torch.manual_seed(1)
    model = build_model(ModelConfig(str(bert)), dataset.tracks, dataset.info)
    adapt(model, adapter)
    return model


@torch.no_grad()
def same_states(model: SequenceModel, body: Any, bert: Bert, dataset: Dataset) -> str:
    """How far the last hidden states of both sides are apart; more than rounding is an error."""
    sample = dataset.sample(dataset.rows("train")[:1])
    model.eval()
    ours = model.trunk.run(model.trunk.encode(sample.codes, sample.lengths), stop="final").x.transpose(1, 2)
    ids = torch.tensor([bert.tokens(dataset, int(dataset.rows("train")[0]))["input_ids"]])
    theirs = body.eval()(input_ids=ids).last_hidden_state
    difference = float((ours[:, : theirs.shape[1]] - theirs).abs().max() / theirs.abs().max())
    assert difference < 1e-4, difference
    return f"hidden states differ by {difference:.1e} of the largest"


def our_steps(model: SequenceModel, objective: Elementwise, samples: Iterable[Sample]) -> Iterator[object]:
    """Training steps as ``fit`` makes them."""
    yield from _steps(model, (partial(training_step, model, objective, sample, "float32") for sample in samples))


def peer_steps(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[object]:
    """The loop that one writes."""

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch)["loss"]
        return found

    yield from _steps(model, (partial(loss, batch) for batch in batches))


def _steps(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> Iterator[object]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for loss in losses:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        yield None


def in_turn(sides: Mapping[str, Iterator[object]]) -> dict[str, list[float]]:
    """CPU seconds of each step of each side; the sides take turns, and every round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    left = list(sides)
    while left:
        for name in list(left):
            began = time.process_time()
            if next(sides[name], left) is left:
                left.remove(name)
            else:
                seconds[name].append(time.process_time() - began)
        left = left[1:] + left[:1]
    return seconds


def collator(bert: Path) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Batches padded to their longest sequence."""
    import transformers

    tokenizer = transformers.BertTokenizer.from_pretrained(bert, do_lower_case=False)
    return transformers.DataCollatorWithPadding(tokenizer)


def labelled(folder: Path, sequences: int, lengths: tuple[int, int]) -> Dataset:
    """Random sequences, a motif planted in half of them, and whether it is; an eighth as many for validation."""
    rng = np.random.default_rng(0)
    rows, motif = sequences + max(4, sequences // 8), encode(_MOTIF)
    size = rng.integers(lengths[0], lengths[1] + 1, rows)
    codes = np.full((rows, lengths[1]), PAD, dtype=np.uint8)
    planted = np.arange(rows) % 2
    for row, length in enumerate(size):
        codes[row, :length] = rng.integers(0, 4, length)
        for start in rng.integers(0, length - len(motif), 1 + length // 40) if planted[row] else ():
            codes[row, start : start + len(motif)] = motif
    with write_dataset(folder, (rows, 1, 1)) as writer:
        writer.targets[:] = planted[:, None, None]
        regions = pd.DataFrame(
            {
                "chrom": "",
                "start": 0,
                "end": 0,
                "strand": ".",
                "name": [f"sequence{i}" for i in range(rows)],
                "fold": ["train" if i < sequences else "valid" for i in range(rows)],
            }
        )
        tracks = TrackTable.build([{"name": "motif", "group": "label", "link": "sigmoid"}])
        info = DatasetInfo("labelled", lengths[1], 1, lengths[1])
        writer.finish(info, regions, tracks, codes=codes, lengths=size)
    return open_dataset(folder)


CASES: Mapping[str, Case] = {"probe": Probe(), "buckets": Buckets(), "adapters": Adapters(), "qlora": Quantised()}
