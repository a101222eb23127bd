"""What trunks have seen: published splits, their files and download, other sources of regions, and touching."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import seqgraft.data.seen as module
from builders import tiny_coverage, tiny_pretrained
from seqgraft.data.folds import Folds
from seqgraft.data.labelled import LabelledFile, LabelledSource, prepare_labelled
from seqgraft.data.peaks import PeakSource, prepare_peaks
from seqgraft.data.seen import (
    DOWNLOAD,
    ROLES,
    TRUNK_FOLDS,
    TrunkFolds,
    exposure,
    read_trunk_folds,
    seen_by,
    trunk_folds,
)
from seqgraft.errors import ConfigError, DataError, RunError
from seqgraft.genome import Genome, Interval

LISTED = "chr1\t200\t240\tfold0\nchr1\t400\t440\tfold3\nchr2\t10\t50\tfold4\n"
#: What the toy trunk saw of that: 100 bp about the centre of each, from the first base on.
SEEN = [("chr1", 170, 270, "train"), ("chr1", 370, 470, "test"), ("chr2", 0, 80, "valid")]
TOY = TrunkFolds("toy1", {"fold0": "train", "fold3": "test", "fold4": "valid"}, 100, "", "", "", "")


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published trunk "toy", its list as a file, and a cache that starts empty."""
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(TRUNK_FOLDS, "toy", replace(TOY, url="https://example.org/toy.bed.gz"))
    path = tmp_path / "toy.bed"
    path.write_text(LISTED)
    return path


@pytest.fixture
def genome(tmp_path: Path) -> Genome:
    (tmp_path / "genome.fa").write_text(f">chr1\n{'ACGT' * 150}\n>chr2\n{'TTGA' * 50}\n>chrM\nACGT\n")
    return Genome.open(tmp_path / "genome.fa")


def rows(table: pd.DataFrame) -> list[tuple[str, int, int, str]]:
    return list(table[["chrom", "start", "end", "fold"]].itertuples(index=False, name=None))


def test_published_splits_are_whole() -> None:
    for key in ("borzoi", "borzoi_mouse", "enformer"):
        facts = TRUNK_FOLDS[key]
        assert set(facts.names.values()) == set(ROLES)
        assert facts.url.startswith("https://")
        assert facts.citation
        assert facts.assembly in ("hg38", "mm10")
    assert [name for name, role in TRUNK_FOLDS["borzoi"].names.items() if role != "train"] == ["fold3", "fold4"]
    assert (TRUNK_FOLDS["borzoi"].window - 196_608) // 2 == 163_840


# Files


@pytest.mark.parametrize("compressed", [False, True])
def test_windows_reach_beyond_what_is_listed(toy: Path, compressed: bool) -> None:
    if compressed:
        toy.write_bytes(gzip.compress(toy.read_bytes()))
    assert rows(trunk_folds("toy", toy)) == SEEN


def test_intervals_longer_than_the_window_stay(toy: Path) -> None:
    toy.write_text("chr1\t0\t500\tfold0\n")
    assert rows(trunk_folds("toy", toy)) == [("chr1", 0, 500, "train")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["toy.bed", "no intervals"]),
        (b"chr1\t5\t9\n", ["toy.bed", "column 4 of 1 rows, first of interval 1", "'.'", "fold0"]),
        (
            (LISTED + "chr1\t5\t9\tfold9\nchr1\t6\t9\tfold9\nchr1\t7\t9\tdev\n").encode(),
            ["column 4 of 2 rows, first of interval 4", "'fold9'", "interval 6", "'dev'", "train, valid, test, fold0"],
        ),
        (b"chr1\t5\tten\tfold0\n", ["toy.bed line 1", "not a BED row", "ten"]),
        (b"chr1\t9\t5\tfold0\n", ["toy.bed line 1", "9-5"]),
        (gzip.compress(LISTED.encode() * 50, mtime=0)[:-20], ["toy.bed", "truncated", "download it again"]),
        (b"\x89PNG\xff\xfe", ["toy.bed", "not text"]),
    ],
    ids=["empty", "no fold", "other folds", "no number", "backwards", "truncated", "binary"],
)
def test_bad_files(toy: Path, content: bytes, words: list[str]) -> None:
    toy.write_bytes(content)
    with pytest.raises(DataError) as caught:
        trunk_folds("toy", toy)
    for word in words:
        assert word in str(caught.value)


def test_a_published_file_without_its_trunk(toy: Path) -> None:
    with pytest.raises(DataError, match=r"'fold0'.*for a published file name its trunk \(borzoi"):
        read_trunk_folds(toy)


def test_no_such_split() -> None:
    with pytest.raises(DataError, match=r"'basset'.*Choose one of borzoi, borzoi_mouse, enformer"):
        trunk_folds("basset")


# The cache and the download


def test_without_a_file_the_address_is_named(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        trunk_folds("toy")
    place = tmp_path / "cache" / "folds" / "toy.bed.gz"
    for word in ("https://example.org/toy.bed.gz", str(place), "folds.bed", "model.trained_on", "download"):
        assert word in str(caught.value)
    place.parent.mkdir(parents=True)
    place.write_bytes(gzip.compress(LISTED.encode()))
    assert rows(trunk_folds("toy")) == SEEN


class Server:
    """Serves one answer and counts how often it was asked."""

    def __init__(self) -> None:
        self.content, self.announced, self.status, self.asked = b"", 0, 200, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(outer.status)
                self.send_header("Content-Length", str(outer.announced or len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/toy.bed"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.content = LISTED.encode()
    digest = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setitem(TRUNK_FOLDS, "toy", replace(TOY, url=server.url, sha256=digest))
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_download_once_and_only_when_asked(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the published regions are not here"):
        trunk_folds("toy")
    assert server.asked == 0
    assert rows(trunk_folds("toy", DOWNLOAD)) == SEEN
    assert rows(trunk_folds("toy", DOWNLOAD)) == rows(trunk_folds("toy")) == SEEN
    assert server.asked == 1
    assert [path.name for path in (tmp_path / "cache" / "folds").iterdir()] == ["toy.bed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, "cannot be downloaded .*404"),
        ({"announced": 10_000}, "not whole"),
        ({"content": b"chr1\t0\t9\tfold0\n"}, "not the file that was published"),
        ({"content": b"chr1" * 100}, "larger than a list of regions"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 300)
    vars(server).update(change)
    with pytest.raises(DataError, match=f"{server.url}: .*{message}.*Fetch it in another way and put it at .*toy.bed"):
        trunk_folds("toy", DOWNLOAD)
    assert not list(tmp_path.glob("cache/folds/*"))


def test_a_page_instead_of_the_file_is_not_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no hash is known, the file has to be a list of folds at least."""
    monkeypatch.setitem(TRUNK_FOLDS, "toy", replace(TOY, url=server.url))
    server.content = b"<html>Sign in</html>"
    with pytest.raises(DataError, match="not a BED row"):
        trunk_folds("toy", DOWNLOAD)
    assert not list(tmp_path.glob("cache/folds/*"))


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(RunError, match=r"the cache cannot be written.*SEQGRAFT_CACHE"):
        trunk_folds("toy", DOWNLOAD)


# By name, folder or file


def test_the_ways_to_name_a_trunk(toy: Path, tmp_path: Path) -> None:
    assert rows(seen_by("toy", toy).regions) == SEEN
    plain = tmp_path / "plain.bed"
    plain.write_text("chr1\t5\t9\ttest\n")
    assert rows(seen_by(str(plain)).regions) == [("chr1", 5, 9, "test")]
    bundled = seen_by("yeast-mini")
    assert set(bundled.regions["fold"]) == {"train"}
    assert bundled.genome


def model_folder(path: Path, **entries: object) -> Path:
    path.mkdir()
    (path / "model.json").write_text(json.dumps({"folds": None, "genome": None, **entries}))
    return path


def test_a_folder_that_names_its_split(toy: Path, tmp_path: Path) -> None:
    converted = model_folder(tmp_path / "converted", folds="toy")
    with pytest.raises(DataError, match="the published regions are not here"):
        seen_by(str(converted))
    assert rows(seen_by(str(converted), toy).regions) == SEEN
    (converted / "trained_on.bed").write_text(LISTED)  # the published list, put into the folder
    assert rows(seen_by(str(converted)).regions) == SEEN


def test_a_model_fitted_further_saw_both(toy: Path, tmp_path: Path) -> None:
    """Its own list has windows already; the genome's hash proves nothing about the published one."""
    fitted = model_folder(tmp_path / "fitted", folds="toy", genome="0" * 64)
    (fitted / "trained_on.bed").write_text("chr2\t100\t150\ttrain\n")
    found = seen_by(str(fitted), toy)
    assert sorted(rows(found.regions)) == sorted([("chr2", 100, 150, "train"), *SEEN])
    assert found.assembly == "toy1"
    assert found.genome is None


def test_names_that_lead_nowhere(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folds.trunk: there is no such trunk: 'bassett'.*borzoi.*yeast-mini"):
        seen_by("bassett")
    with pytest.raises(DataError, match=r"there is no such trunk.*BED file \(without bed\)"):
        seen_by(str(toy), toy)
    with pytest.raises(DataError, match=r"does not say which regions.*model.trained_on"):
        seen_by(str(model_folder(tmp_path / "silent")))
    with pytest.raises(DataError, match=r"does not say which regions.*'mine'"):
        seen_by(str(model_folder(tmp_path / "own-key", folds="mine")))
    broken = model_folder(tmp_path / "broken")
    (broken / "model.json").write_text("[]")
    with pytest.raises(DataError, match="broken: the file does not describe a model"):
        seen_by(str(broken))


# Genomes


def test_the_genome_gives_the_names(toy: Path, genome: Genome) -> None:
    toy.write_text(LISTED.replace("chr1", "1"))
    with pytest.raises(DataError, match=r"toy.bed: .*no chromosome: '1'.*pass rename: \{'1': 'chr1'\}"):
        seen_by("toy", toy).on(genome, {})
    assert rows(seen_by("toy", toy).on(genome, {"1": "chr1"})) == SEEN


def test_a_list_of_another_assembly(toy: Path, genome: Genome) -> None:
    toy.write_text(LISTED + "chr1\t580\t620\tfold0\n")
    with pytest.raises(DataError, match=r"beyond chr1 of the genome \(600 bp\): 'chr1:620'. The regions are of toy1"):
        seen_by("toy", toy).on(genome, {})
    toy.write_text(LISTED + "chr1\t560\t600\tfold0\n")  # the window may reach further than the listed bases
    assert rows(seen_by("toy", toy).on(genome, {}))[-1] == ("chr1", 530, 630, "train")
    toy.write_text("chrom1\t0\t40\tfold0\n")
    with pytest.raises(DataError, match=r"no chromosome: 'chrom1'.*names that match the FASTA \(chr1"):
        seen_by("toy", toy).on(genome, {})


def test_a_model_of_this_package_is_known_by_its_genome(tmp_path: Path, genome: Genome) -> None:
    data = tiny_coverage(tmp_path / "data")
    found = seen_by(str(tiny_pretrained(tmp_path / "model", trained_on=data)))
    assert data.genome is not None
    assert len(found.on(data.genome, {})) == 16
    assert found.is_of_another_genome(genome)
    with pytest.raises(DataError, match=r"trained_on.bed: the trunk was trained on another genome"):
        found.on(genome, {})
    with pytest.raises(DataError, match=r"trained_on.bed: the model brings its own regions.*Leave the setting out"):
        seen_by(str(tmp_path / "model"), tmp_path / "toy.bed")


# Sources


def test_labelled_intervals_and_peaks_take_the_split(toy: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "g.fa").write_text(f">1\n{''.join(rng.choice(list('ACGT'), 6000))}\n")
    toy.write_text("chr1\t0\t2000\tfold0\nchr1\t2000\t4000\tfold4\nchr1\t4000\t6000\tfold3\n")
    folds, rename = Folds(by="trunk", trunk="toy", bed=toy), {"chr1": "1"}
    starts = range(5, 5900, 190)
    places = "".join(f"chr1,{start},{start + 60},{start // 190 % 2}\n" for start in starts)
    (tmp_path / "labels.csv").write_text(f"chrom,start,end,label\n{places}")
    (tmp_path / "peaks.bed").write_text("".join(f"chr1\t{start}\t{start + 60}\n" for start in starts))
    files = (LabelledFile(tmp_path / "labels.csv"),)
    labels = prepare_labelled(
        LabelledSource(files, genome=tmp_path / "g.fa", folds=folds, rename=rename), tmp_path / "labels"
    )
    settings: dict[str, Any] = {"duplicates": "drop", "max_skipped": 0.9, "rename": rename}
    peaks = prepare_peaks(PeakSource(tmp_path / "peaks.bed", tmp_path / "g.fa", 60, folds, **settings), tmp_path / "p")
    for data in (labels, peaks):
        start, end = data.regions["start"], data.regions["end"]
        for fold, left in (("train", 0), ("valid", 2000), ("test", 4000)):
            inside = (start >= left) & (end <= left + 2000)
            assert inside.sum() > 5
            assert (data.regions["fold"][inside] == fold).all()
        across = (start // 2000) != ((end - 1) // 2000)
        assert set(data.regions["fold"][across]) == {"unused"}
        assert data.info.notes["trunk_folds"]["unused_in_several_folds"] == across.sum() > 0
        assert data.info.settings["folds"]["bed"] == str(toy)
    with pytest.raises(ConfigError, match="folds by trunk cannot be split to group duplicates"):
        LabelledSource(files, genome=tmp_path / "g.fa", folds=folds, duplicates="group")


# Touching


def test_exposure_equals_brute_force() -> None:
    rng = np.random.default_rng(0)

    def draw(count: int, length: int) -> pd.DataFrame:
        start = rng.integers(0, 5000, count)
        chrom = rng.choice(["chr1", "chr2"], count)
        return pd.DataFrame({"chrom": chrom, "start": start, "end": start + rng.integers(1, length, count)})

    windows, seen = draw(300, 60), draw(60, 90).assign(fold=rng.choice(ROLES, 60))
    intervals = [(Interval(c, s, e), fold) for c, s, e, fold in rows(seen)]
    expected = dict.fromkeys([*ROLES, "nothing"], 0)
    for chrom, start, end in windows.itertuples(index=False, name=None):
        touched = {fold for interval, fold in intervals if interval.overlaps(Interval(chrom, start, end))}
        expected[next((role for role in ROLES if role in touched), "nothing")] += 1
    assert exposure(windows, seen) == expected
    assert min(expected.values()) > 0
    assert exposure(windows, seen[:0]) == {"train": 0, "valid": 0, "test": 0, "nothing": 300}
