"""Tokens of DNA language models against the published recipes, as they are described: on strings, in loops."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.models.tokens import Blocks, BytePairs, Overlapping, Tokeniser, Tokens, refuse_unknown, to_bins
from seqgraft.models.vocabulary import Vocabulary, characters, dnabert, nucleotide_transformer
from seqgraft.sequence import PAD, encode

Piece = tuple[str, int, int]  # a token and the bases that it stands for

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SPECIES = ["candida_glabrata", "saccharomyces_cerevisiae", "schizosaccharomyces_pombe"]


def kmers(order: str, k: int) -> list[str]:
    return ["".join(letters) for letters in product(order, repeat=k)]


def random_sequences(count: int = 100, seed: int = 0) -> list[str]:
    """Of 0 to 150 bases: without N, with single ones, with runs of them, and nothing but N."""
    rng = np.random.default_rng(seed)
    texts = ["", "A", "ACGTA", "ACGTAC", "NNNNNNN", "ACGTACN", "NACGTAC", "ACGNTACGTACG", "ACGTACGTACGTN"]
    while len(texts) < count:
        letters = rng.choice(list("ACGTN"), int(rng.integers(1, 150)), p=[*[(1 - q) / 4 for q in 4 * [0.04]], 0.04])
        if rng.random() < 0.3:
            at = int(rng.integers(len(letters)))
            letters[at : at + int(rng.integers(1, 20))] = "N"
        if rng.random() < 0.3:
            letters[letters == "N"] = "A"
        texts.append("".join(letters))
    return texts


SEQUENCES = random_sequences()


def batch_of(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    codes = np.full((len(texts), max(len(text) for text in texts) + 3), PAD, dtype=np.uint8)
    for row, text in enumerate(texts):
        codes[row, : len(text)] = encode(text)
    return torch.from_numpy(codes), torch.tensor([len(text) for text in texts])


def pieces_overlapping(text: str, k: int) -> list[Piece]:
    return [(text[i : i + k], i, i + k) for i in range(len(text) - k + 1)]


def pieces_blocks(text: str, k: int) -> list[Piece]:
    """Split at N; blocks of k, and what is left of each part base by base; N between the parts."""
    pieces: list[Piece] = []
    at = 0
    for number, part in enumerate(text.split("N")):
        if number:
            pieces.append(("N", at, at + 1))
            at += 1
        while len(part) >= k:
            pieces.append((part[:k], at, at + k))
            part, at = part[k:], at + k
        for base in part:
            pieces.append((base, at, at + 1))
            at += 1
    return pieces


def pieces_byte_pairs(text: str, merges: list[tuple[str, str]]) -> list[Piece]:
    """Every merge in its turn, from left to right, until none applies (Sennrich et al. 2016)."""
    words = list(text)
    for left, right in merges:
        i = 0
        while i < len(words) - 1:
            if (words[i], words[i + 1]) == (left, right):
                words[i : i + 2] = [left + right]
            i += 1
    stops = np.cumsum([len(word) for word in words]).tolist()
    return [(word, stop - len(word), stop) for word, stop in zip(words, stops, strict=True)]


def check(
    tokeniser: Tokeniser,
    recipe: Callable[[str], list[Piece]],
    ids: dict[str, int],
    *,
    before: Sequence[str],
    after: Sequence[str],
    unknown: str,
    padding: str,
    left: bool = False,
) -> None:
    """Ids, mask, spans and counts of all sequences, in batches of ten, are those of the recipe."""
    for first in range(0, len(SEQUENCES), 10):
        texts = SEQUENCES[first : first + 10]
        codes, lengths = batch_of(texts)
        tokens = tokeniser.encode(codes, lengths)
        assert tokens.ids.dtype == tokens.start.dtype == tokens.stop.dtype == torch.int64
        assert tokens.mask.dtype == torch.bool
        assert tokens.length == codes.shape[1]
        width = max(len(recipe(text)) for text in texts) + len(before) + len(after)
        assert tokens.ids.shape == tokens.mask.shape == tokens.start.shape == tokens.stop.shape == (len(texts), width)
        for row, text in enumerate(texts):
            body = recipe(text)
            words = [*((word, 0, 0) for word in before), *body, *((word, 0, 0) for word in after)]
            empty = [(padding, 0, 0)] * (width - len(words))
            wanted = [*empty, *words] if left else [*words, *empty]
            assert tokens.ids[row].tolist() == [ids.get(word, ids[unknown]) for word, _, _ in wanted], text
            assert tokens.start[row].tolist() == [start for _, start, _ in wanted]
            assert tokens.stop[row].tolist() == [stop for _, _, stop in wanted]
            assert tokens.mask[row].tolist() == [(i >= len(empty)) if left else (i < len(words)) for i in range(width)]
            assert tokens.unknown[row] == sum(word not in ids for word, _, _ in body)
            covered = {i for _, start, stop in body for i in range(start, stop)}
            assert tokens.truncated[row] == len(text) - len(covered)


@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_dnabert(k: int) -> None:
    ids = {token: i for i, token in enumerate([*BERT, *kmers("ATCG", k)])}
    assert (ids["A" * k], ids["A" * (k - 1) + "T"], ids["G" * k]) == (5, 6, 4**k + 4)  # as in its vocab.txt
    made = Overlapping(replace(dnabert(k), limit=None), k, truncate=True)
    check(
        made,
        lambda text: pieces_overlapping(text, k),
        ids,
        before=["[CLS]"],
        after=["[SEP]"],
        unknown="[UNK]",
        padding="[PAD]",
    )


@pytest.fixture
def species_folder(tmp_path: Path) -> Path:
    """A k-mer vocabulary with species, in an order of its own, as SpeciesLM has it."""
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT, *kmers("ACGT", 6)]) + "\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: 4101 + i for i, name in enumerate(SPECIES)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30, "do_lower_case": False}))
    names = {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}, "unk_token": "[UNK]", "pad_token": "[PAD]"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    return tmp_path


def test_species_token_and_kmers(species_folder: Path) -> None:
    ids = {token: i for i, token in enumerate([*BERT, *kmers("ACGT", 6), *SPECIES])}
    made = Overlapping.read(species_folder, species="candida_glabrata", truncate=True)
    assert (made.k, made.vocabulary.limit) == (6, None)
    check(
        made,
        lambda text: pieces_overlapping(text, 6),
        ids,
        before=["[CLS]", "candida_glabrata"],
        after=["[SEP]"],
        unknown="[UNK]",
        padding="[PAD]",
    )


def test_species_in_tokenizer_json(species_folder: Path) -> None:
    """The same vocabulary as one file gives the same tokeniser."""
    wanted = Overlapping.read(species_folder, species="candida_glabrata")
    ids = {token: i for i, token in enumerate([*BERT, *kmers("ACGT", 6)])}
    added = [{"id": 4101 + i, "content": name, "special": False} for i, name in enumerate(SPECIES)]
    content = {"added_tokens": added, "model": {"type": "WordPiece", "vocab": ids}}
    (species_folder / "tokenizer.json").write_text(json.dumps(content))
    for name in ("vocab.txt", "added_tokens.json"):
        (species_folder / name).unlink()
    assert Overlapping.read(species_folder, species="candida_glabrata") == wanted


def test_unknown_species_lists_those_that_are_known(species_folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'candida_glabratta'\. Known: candida_glabrata, sacch.*, schizosacch.*pombe"
    ):
        Overlapping.read(species_folder, species="candida_glabratta")
    with pytest.raises(ConfigError, match=r"needs the token of a species \(model\.species\)\. Known: candida_glabrata"):
        Overlapping.read(species_folder)
    (species_folder / "added_tokens.json").unlink()
    assert Overlapping.read(species_folder).vocabulary.before == (2,)
    with pytest.raises(ConfigError, match=r"no token for the species: 'homo_sapiens'\. It has none at all"):
        Overlapping.read(species_folder, species="homo_sapiens")


def test_many_species_are_listed_closest_first(species_folder: Path) -> None:
    many = {f"genus_{i:03d}": 4101 + i for i in range(500)} | {"candida_glabrata": 5000}
    (species_folder / "added_tokens.json").write_text(json.dumps(many))
    with pytest.raises(ConfigError, match=r"Known: candida_glabrata, .*, and 481 more"):
        Overlapping.read(species_folder, species="candida_glabatra")


NT = ["<unk>", "<pad>", "<mask>", "<cls>"]


@pytest.fixture
def nt_folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join([*NT, *kmers("ATCG", 6), *"ATCGN"]))
    config = {"eos_token": None, "model_max_length": 1000, "tokenizer_class": "EsmTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("version", [1, 2])
def test_nucleotide_transformer(version: int) -> None:
    special = NT if version == 1 else [*NT, "<eos>", "<bos>"]
    ids = {token: i for i, token in enumerate([*special, *kmers("ATCG", 6), *"ATCGN"])}
    made = Blocks(nucleotide_transformer(version))
    assert len(made.vocabulary.ids) == {1: 4105, 2: 4107}[version]
    check(
        made,
        lambda text: pieces_blocks(text, 6),
        ids,
        before=["<cls>"],
        after=[],
        unknown="<unk>",
        padding="<pad>",
    )


def test_nucleotide_transformer_from_files(nt_folder: Path) -> None:
    made = Blocks.read(nt_folder)
    assert made == Blocks(nucleotide_transformer())
    assert made.encode(*batch_of(["A" * 5994])).ids.shape == (1, 1000)  # the longest that it takes
    with pytest.raises(DataError, match="The model takes 1000 tokens, 1 of them special"):
        made.encode(*batch_of(["A" * 6000]))
    (nt_folder / "vocab.txt").write_text("\n".join([*NT, "<eos>", *kmers("ATCG", 6), *"ATCGN"]))
    assert Blocks.read(nt_folder).vocabulary.after == ()  # the files set it to null
    (nt_folder / "tokenizer_config.json").write_text("{}")
    assert Blocks.read(nt_folder).vocabulary.after == (4,)


def test_which_file_names_the_special_tokens(nt_folder: Path) -> None:
    """special_tokens_map.json, unless tokenizer_config.json lists its added tokens: then that one."""
    (nt_folder / "special_tokens_map.json").write_text(json.dumps({"cls_token": "<mask>"}))
    config = {"cls_token": "<cls>", "padding_side": "left"}
    for added, wanted in (({}, 2), ({"added_tokens_decoder": {"3": {"content": "<cls>"}}}, 3)):
        (nt_folder / "tokenizer_config.json").write_text(json.dumps(config | added))
        words = Blocks.read(nt_folder, limit=77).vocabulary
        assert (words.before, words.left, words.limit) == ((wanted,), True, 77)


def test_as_the_tokenizers_of_transformers(nt_folder: Path) -> None:
    from transformers import EsmTokenizer

    theirs = EsmTokenizer(str(nt_folder / "vocab.txt"), eos_token=None)
    for text in SEQUENCES[1:]:
        tokens = Blocks.read(nt_folder).encode(*batch_of([text]))
        assert tokens.ids[0].tolist() == theirs(text)["input_ids"], text


def test_characters() -> None:
    """HyenaDNA and Caduceus: A is 7, N is 11, a separator at the end, padding on the left."""
    special = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
    ids = {token: i for i, token in enumerate([*special, *"ACGTN"])}
    assert (ids["A"], ids["N"]) == (7, 11)
    check(
        Overlapping(characters(), 1),
        lambda text: pieces_overlapping(text, 1),
        ids,
        before=[],
        after=["[SEP]"],
        unknown="[UNK]",
        padding="[PAD]",
        left=True,
    )


def test_lower_case_vocabulary() -> None:
    words = Vocabulary.of(["[PAD]", "[MASK]", "[UNK]", "a", "c", "g", "t"])
    tokens = Overlapping(words, words.k).encode(*batch_of(["ACGTN"]))
    assert tokens.ids.tolist() == [[3, 4, 5, 6, 2]]
    assert tokens.unknown.tolist() == [1]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte pairs built as DNABERT-2's are: split at white space, a class token and a separator around."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    made = Tokenizer(BPE(unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    corpus = [text.replace("N", "") for text in random_sequences(300, seed=1)]
    made.train_from_iterator(corpus, BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.enable_truncation(8)  # files have such settings of a training run, which must not count
    made.enable_padding(length=12, pad_id=3, pad_token="[PAD]")
    folder = tmp_path_factory.mktemp("bpe")
    made.save(str(folder / "tokenizer.json"))
    names = {role: f"[{role[:3].upper()}]" for role in ("unk_token", "cls_token", "sep_token", "pad_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_byte_pairs(bpe_folder: Path) -> None:
    model = json.loads((bpe_folder / "tokenizer.json").read_text())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    assert len(merges) > 90
    made = BytePairs.read(bpe_folder)
    assert (made.vocabulary.before, made.vocabulary.after) == ((1,), (2,))
    check(
        made,
        lambda text: pieces_byte_pairs(text, merges),
        model["vocab"],
        before=["[CLS]"],
        after=["[SEP]"],
        unknown="[UNK]",
        padding="[PAD]",
    )


def test_bases_are_cut_only_when_told(bpe_folder: Path) -> None:
    text = "ACGTACGTACGTACGTACGT"
    for made, bases in (
        (Overlapping(replace(dnabert(3), limit=7), 3), 7),  # five 3-mers
        (Blocks(replace(nucleotide_transformer(), limit=3)), 12),
        (Overlapping(characters(limit=5), 1), 4),
    ):
        with pytest.raises(DataError, match=f"1 of 2 sequences .*, at most: {20 - bases}"):
            made.encode(*batch_of([text, text[:bases]]))
        tokens = replace(made, truncate=True).encode(*batch_of([text, text[:bases]]))
        assert tokens.truncated.tolist() == [20 - bases, 0]
        assert tokens.ids[0].tolist() == tokens.ids[1].tolist()  # special tokens stay
    read = BytePairs.read(bpe_folder, limit=5)
    with pytest.raises(DataError, match="takes 5 tokens, 2 of them special"):
        read.encode(*batch_of([text]))
    tokens = replace(read, truncate=True).encode(*batch_of([text]))
    assert tokens.ids[0, [0, -1]].tolist() == [1, 2]
    assert tokens.truncated.tolist() == [20 - int(tokens.stop.max())]
    with pytest.raises(DataError, match="1 of 1 sequences have bases that no token stands for, at most: 5"):
        Overlapping(dnabert(6), 6).encode(*batch_of(["ACGTA"]))


def test_bases_that_a_vocabulary_drops_are_counted(bpe_folder: Path, tmp_path: Path) -> None:
    """Byte pairs without an unknown token leave an N out and say nothing."""
    content = json.loads((bpe_folder / "tokenizer.json").read_text())
    content["model"]["unk_token"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    made = BytePairs.read(tmp_path, truncate=True)
    assert made.encode(*batch_of(["ACGNNTA", "ACGTA"])).truncated.tolist() == [2, 0]


def test_lengths_alone_say_what_is_sequence(bpe_folder: Path) -> None:
    codes, lengths = batch_of(["ACGTACGTACGTACGTA"])
    made: list[Tokeniser] = [Overlapping(dnabert(3), 3), Blocks(nucleotide_transformer()), BytePairs.read(bpe_folder)]
    for one in made:
        wanted = one.encode(codes[:, :11], torch.tensor([11])).ids
        assert torch.equal(one.encode(codes, lengths - 6).ids, wanted)


def test_other_codes_are_unknown_bases() -> None:
    codes, lengths = batch_of(["ACNACGTAC"])
    wanted = Blocks(nucleotide_transformer()).encode(codes, lengths)
    codes[0, 2] = 7
    assert torch.equal(Blocks(nucleotide_transformer()).encode(codes, lengths).ids, wanted.ids)


def test_unknown_tokens_are_refused() -> None:
    tokens = Overlapping(dnabert(6), 6).encode(*batch_of(["ACGTACGTACGNACGTACGT"]))
    assert tokens.unknown.tolist() == [6]
    refuse_unknown(tokens, 0.5)
    with pytest.raises(DataError, match=r"6 of 15 tokens are unknown to the model: 0\.4"):
        refuse_unknown(tokens, 0.1)


def test_files_that_do_not_fit(tmp_path: Path, nt_folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="There is no vocabulary"):
        Overlapping.read(empty)
    with pytest.raises(ModelError, match="The description of the tokens is missing"):
        BytePairs.read(nt_folder)
    (empty / "vocab.txt").write_text("\n".join([*BERT, *kmers("ACGT", 3)[:-2]]))
    with pytest.raises(ModelError, match=r"lacks k-mers of 3 bases: \['TTG', 'TTT'\]. 2 of 64 are missing"):
        Overlapping.read(empty)
    (empty / "vocab.txt").write_text("\n".join(kmers("ACGT", 3)))
    with pytest.raises(ModelError, match="lacks the unknown or the padding token"):
        Overlapping.read(empty)
    (empty / "vocab.txt").write_text("\n".join(BERT))
    with pytest.raises(ModelError, match="lacks k-mers"):
        Overlapping.read(empty)
    (nt_folder / "added_tokens.json").write_text(json.dumps({"AAAAAA": 7}))
    with pytest.raises(ModelError, match=r"two ids: \['AAAAAA'\]"):
        Blocks.read(nt_folder)
    (nt_folder / "added_tokens.json").write_text('{"AAAAAA": ')
    with pytest.raises(ModelError, match="not valid JSON"):
        Blocks.read(nt_folder)
    (nt_folder / "added_tokens.json").write_text("[]")
    with pytest.raises(ModelError, match="holds no table"):
        Blocks.read(nt_folder)
    (nt_folder / "tokenizer.json").write_text('{"model": {"vocab": [["A", 0.5]]}}')
    with pytest.raises(ModelError, match="needs a vocabulary of tokens with their ids"):
        BytePairs.read(nt_folder)


def slow_bins(hidden: torch.Tensor, tokens: Tokens, bin_size: int) -> torch.Tensor:
    """Each base the mean of the tokens that cover it, each bin the mean of its bases."""
    batch, width, channels = hidden.shape
    bins = -(-tokens.length // bin_size)
    out = torch.zeros(batch, channels, bins, dtype=hidden.dtype)
    for row in range(batch):
        bases = {}
        for base in range(tokens.length):
            over = [t for t in range(width) if tokens.start[row, t] <= base < tokens.stop[row, t]]
            if over:
                bases[base] = hidden[row, over].mean(0)
        for i in range(bins):
            of = [bases[base] for base in range(i * bin_size, (i + 1) * bin_size) if base in bases]
            if of:
                out[row, :, i] = torch.stack(of).mean(0)
    return out


@pytest.mark.parametrize("bin_size", [1, 4, 16, 500])
def test_bins_are_means_of_bases(bin_size: int, bpe_folder: Path) -> None:
    texts = ["ACGTNACGTACGTACGTACCCGTNNAC", "", "ACG", "GATTACAGATTACACATTACGTAG" * 2]
    generator = torch.Generator().manual_seed(0)
    for made in (
        Overlapping(dnabert(6), 6, truncate=True),
        Overlapping(characters(limit=20), 1, truncate=True),
        Blocks(nucleotide_transformer()),
        BytePairs.read(bpe_folder),
    ):
        tokens = made.encode(*batch_of(texts))
        hidden = torch.randn(*tokens.ids.shape, 3, generator=generator, dtype=torch.float64)
        bins = to_bins(hidden, tokens, bin_size)
        torch.testing.assert_close(bins, slow_bins(hidden, tokens, bin_size))
        assert bins.shape == (4, 3, -(-tokens.length // bin_size))
        assert not bins[1].any()
        ones = to_bins(torch.ones_like(hidden, dtype=torch.bfloat16), tokens, bin_size)
        assert ones.dtype == torch.bfloat16
        assert set(ones.unique().tolist()) <= {0.0, 1.0}


def test_bins_in_bfloat16_are_summed_in_float32() -> None:
    tokens = Overlapping(characters(), 1).encode(*batch_of(["ACGT" * 500]))
    hidden = torch.rand(*tokens.ids.shape, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = hidden[:, :2000].double().mean(1)[:, :, None].bfloat16()
    assert torch.equal(to_bins(hidden, tokens, 4000), wanted)


def test_bins_have_gradients() -> None:
    tokens = Overlapping(dnabert(3), 3).encode(*batch_of(["ACGTACGT", "ACGTA"]))
    hidden = torch.randn(*tokens.ids.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: to_bins(x, tokens, 4), hidden)


def test_no_sequences_at_all() -> None:
    tokens = Blocks(nucleotide_transformer()).encode(
        torch.zeros(2, 0, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    )
    assert tokens.ids.tolist() == [[3], [3]]
    assert to_bins(torch.ones(2, 1, 5), tokens, 4).shape == (2, 5, 0)
