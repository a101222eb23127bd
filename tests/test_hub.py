"""Borzoi and Flashzoi of the Hugging Face layout: what borzoi-pytorch answers, every tensor accounted for, hub ids.

``data/borzoi_parity.npz`` holds the answers of borzoi-pytorch 0.5.1, and the script beside it made them.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from seqgraft.cli import app
from seqgraft.errors import ConfigError, DataError, ModelError
from seqgraft.experiment import parse_experiment
from seqgraft.models import folders, weights
from seqgraft.models.base import SequenceModel, State, apply_link, one_hot
from seqgraft.models.borzoi import FLASHZOI, Borzoi, bucket_rows, mask_widths
from seqgraft.models.folders import convert_published, find_model
from seqgraft.models.hub import licence_of, load_published
from seqgraft.models.hub_borzoi import load_borzoi
from seqgraft.models.huggingface import Loaded
from seqgraft.models.stages import rotary_frequencies
from seqgraft.models.weights import build_model, build_pretrained
from seqgraft.tracks import TrackTable

DATA = Path(__file__).parent / "data"
_spec = importlib.util.spec_from_file_location("make_borzoi_parity", DATA / "make_borzoi_parity.py")
assert _spec is not None
assert _spec.loader is not None
RECIPE = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(RECIPE)
PARITY = np.load(DATA / "borzoi_parity.npz", allow_pickle=False)
POSITIONS = 128  # of the short cases
COMMIT = "0123456789" * 4


def tensors_of(case: str) -> dict[str, Tensor]:
    shapes = json.loads(str(PARITY[f"{case}/shapes"]))
    return {name: torch.from_numpy(RECIPE.weights(name, tuple(shape))) for name, shape in shapes.items()}


def hub_folder(folder: Path, case: str, *, binary: bool = False, **changes: object) -> Path:
    """A folder as the hub has it, with the weights of a parity case."""
    folder.mkdir(parents=True)
    config = json.loads(str(PARITY[f"{case}/config"])) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if binary:
        torch.save(tensors_of(case), folder / "pytorch_model.bin")
    else:
        save_file(tensors_of(case), folder / "model.safetensors")
    return folder


def loaded(tmp_path: Path, case: str) -> tuple[Loaded, Tensor]:
    """The model of a parity case, and its sequences. The peer scales positions to 4,096 in every window."""
    _, window, _ = RECIPE.CASES[case]
    found = load_borzoi(hub_folder(tmp_path / case, case), positions=window // 128)
    if found.trunk.settings["attention"] == "relative":
        rescaled = Borzoi.build({**found.trunk.settings, "positions": 4096}, bin_size=32, crop=_crop(found.trunk))
        rescaled.load_state_dict(found.trunk.state_dict())
        rescaled.spec = found.trunk.spec
        found = Loaded(rescaled.eval(), found.heads, found.report, found.window, found.bins)
    return found, torch.from_numpy(RECIPE.sequence(window))


def _crop(trunk: Any) -> int:
    return int(trunk.stages["crop"].bins)


def difference(found: Tensor, expected: np.ndarray | Tensor) -> float:
    """The largest difference, as a fraction of the largest expected value."""
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# ---- the published networks ----


@torch.no_grad()
@pytest.mark.parametrize("case", RECIPE.CASES)
def test_features_and_heads_are_those_of_borzoi_pytorch(case: str, tmp_path: Path) -> None:
    model, codes = loaded(tmp_path, case)
    config, _, every = RECIPE.CASES[case]
    state = model.trunk(codes)
    assert state.x.shape[-1] == model.bins == config.get("bins_to_return", 16_352)
    assert (model.trunk.settings["attention"] == "rotary") == bool(config.get("flashed"))
    assert difference(state.x[..., ::every], PARITY[f"{case}/embedding"]) <= 1e-5
    for name, head in model.heads.items():
        values = apply_link(head(state, SimpleNamespace(covariates={})), "softplus")
        assert difference(values[..., ::every], PARITY[f"{case}/{name}"]) <= 1e-5
    assert set(model.heads) == {name for name in ("human", "mouse") if f"{case}/{name}" in PARITY}


@pytest.mark.parametrize("case", RECIPE.GRADIENTS)
def test_gradients_are_those_of_borzoi_pytorch(case: str, tmp_path: Path) -> None:
    model, codes = loaded(tmp_path, case)
    trunk = model.trunk.double()  # as the peer's were computed
    x = trunk.run(State(one_hot(codes).double())).x
    (x * torch.from_numpy(RECIPE.direction(tuple(x.shape)))).sum().backward()
    parameters = dict(trunk.named_parameters())
    for theirs in RECIPE.GRADIENTS[case]:
        ours = [name for name, there in model.report.matched.items() if there == theirs]
        gradient = torch.cat([_gradient(parameters[name.removeprefix("trunk.")]) for name in ours])
        assert difference(gradient, PARITY[f"{case}/gradient/{theirs}"]) <= 1e-5, theirs


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize(("name", "settings"), [("borzoi", {}), ("flashzoi", FLASHZOI)])
def test_every_tensor_of_the_published_size_has_its_place(name: str, settings: dict[str, Any]) -> None:
    """With the names and shapes of the peer's own network, of 186 million parameters and a mouse head."""
    from seqgraft.models.hub_borzoi import _places

    with torch.device("meta"):
        places = _places(Borzoi.build(settings, bin_size=32, crop=5120))
    theirs = {n: tuple(shape) for n, shape in json.loads(str(PARITY[f"{name}/names"])).items()}
    assert {place.name: place.shape for place in places.values()} == {
        n: shape for n, shape in theirs.items() if not n.endswith(("_head.weight", "_head.bias"))
    }


# ---- weights ----


@pytest.mark.parametrize("case", ["short", "flashzoi"])
def test_the_report_accounts_for_every_tensor(case: str, tmp_path: Path) -> None:
    model, _ = loaded(tmp_path, case)
    assert set(model.report.matched.values()) == set(tensors_of(case))
    assert set(model.report.matched) == {
        *(f"trunk.{name}" for name in model.trunk.state_dict()),
        *(f"heads.{head}.{name}" for head, module in model.heads.items() for name in module.state_dict()),
    }
    assert (model.report.new, model.report.left) == ((), ())
    assert len(model.report.sha256) == 64
    assert not any(tensor.is_meta for tensor in (*model.trunk.state_dict().values(), *model.trunk.parameters()))
    assert model.trunk.spec.folds == ("borzoi_mouse" if case == "short" else "borzoi")
    assert ("Flashzoi" in model.trunk.spec.citation) == (case == "flashzoi")


@torch.no_grad()
def test_a_pickled_file_and_an_older_config_give_the_same(tmp_path: Path) -> None:
    """An entry that is absent means what the first version of the layout did."""
    first = load_borzoi(hub_folder(tmp_path / "a", "borzoi"))
    absent = {"bins_to_return": None, "return_center_bins_only": None, "dropout_rate": None}
    second = load_borzoi(hub_folder(tmp_path / "b", "borzoi", binary=True, **absent))
    assert weights.weight_hash(first.trunk) == weights.weight_hash(second.trunk)
    assert first.bins == second.bins == 6144
    whole = load_borzoi(hub_folder(tmp_path / "c", "borzoi", bins_to_return=-1))
    assert whole.bins == 16_384


def test_tables_of_positions_in_the_file_are_verified(tmp_path: Path) -> None:
    features, rows = bucket_rows(POSITIONS, mask_widths(16, POSITIONS), torch.device("cpu"))
    tables = {
        "short": ("transformer.1.0.fn.1.positions", features[rows]),
        "flashzoi": ("transformer.0.0.fn.1.mha.rotary_emb.inv_freq", rotary_frequencies(128, 20000.0)),
    }
    for case, (name, table) in tables.items():
        folder = hub_folder(tmp_path / case, case)
        save_file(tensors_of(case) | {name: table}, folder / "model.safetensors")
        found = load_borzoi(folder, positions=POSITIONS)
        assert found.report.left == (name,)
        assert name in str(found.report)
        save_file(tensors_of(case) | {name: table * 1.1}, folder / "model.safetensors")
        with pytest.raises(ModelError, match="not the one its model computes"):
            load_borzoi(folder, positions=POSITIONS)


TARGETS = (
    "\tidentifier\tfile\tclip\tclip_soft\tscale\tsum_stat\tstrand_pair\tdescription\n"
    "0\tA+\tx.w5\t768\t384\t0.3\tsum_sqrt\t2\tRNA:liver\n"
    "1\tB\ty.w5\t128\t32\t2\tmean\t1\tDNASE:liver\n"
    "2\tA-\tz.w5\t768\t384\t0.3\tsum_sqrt\t0\tRNA:liver\n"
)
MOUSE = TARGETS.replace("A+", "C").replace("\t2\tRNA", "\t0\tRNA").rpartition("2\tA-")[0]


@torch.no_grad()
def test_heads_take_published_tables_of_tracks(tmp_path: Path) -> None:
    """Each group of tracks has a head of its own, and the rows of the published one that are its tracks."""
    folder = hub_folder(tmp_path / "hub", "borzoi")
    for name, text in (("human", TARGETS), ("mouse", MOUSE.replace("\tB\t", "\tD\t"))):
        (tmp_path / f"{name}.txt").write_text(text)
    model = load_published(str(folder), targets={n: tmp_path / f"{n}.txt" for n in ("human", "mouse")})
    assert list(model.heads) == ["human_RNA", "human_DNASE", "mouse_RNA", "mouse_DNASE"]
    rna = model.heads["human_RNA"]
    assert rna.tracks.names == ["A+", "A-"]
    assert set(rna.tracks.frame["squash"]) == {"power75_legacy"}
    assert set(rna.tracks.frame["link"]) == {"softplus"}
    weight = tensors_of("borzoi")["human_head.weight"]
    assert torch.equal(rna.out.weight, weight[[0, 2]])
    assert torch.equal(model.heads["human_DNASE"].out.weight, weight[[1]])
    convert_published(model, tmp_path / "folder", name="b", licence="", source="here")
    pretrained = find_model(str(tmp_path / "folder"))
    assert pretrained is not None
    assert pretrained.tracks.names == ["A+", "A-", "B", "C", "D"]


def test_tables_of_other_heads_or_sizes_are_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "borzoi")
    three = TrackTable.build([{"name": f"t{i}", "link": "softplus"} for i in range(3)])
    for tables in ({"human": three}, {"": three}, {"human": three, "mouse": three}, {"human": three, "fly": three}):
        with pytest.raises(ModelError, match=r"\{'human': 3, 'mouse': 2\}"):
            load_borzoi(folder, tracks=tables)


def _change(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = tensors_of("short")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def _truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _folder_for_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors["transformer.1.0.fn.1.to_q.weight"]
    tensors["surplus"] = torch.zeros(1)
    tensors["horizontal_conv0.conv_layer.bias"] = torch.zeros(3)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors": (
        lambda folder: _change(folder, _drop),
        r"(?s)missing.*1.0.fn.1.to_q.weight.*unexpected.*surplus.*misshapen.*conv0.conv_layer.bias: \(3,\) instead",
    ),
    "whole numbers": (
        lambda folder: _change(folder, lambda t: t.update({"mouse_head.bias": t["mouse_head.bias"].int()})),
        "another type.*mouse_head.bias.*torch.int32.*float16",
    ),
    "a folder": (_folder_for_file, "weights are missing.*model.safetensors"),
    "no convolution": (
        lambda folder: _change(folder, lambda t: t.pop("unet1.1.conv_layer.weight")),  # type: ignore[arg-type, return-value]
        "lack convolutions.*unet1.1",
    ),
    "truncated": (_truncate, "cannot be read.*truncated"),
    "another model": (_config(model_type="prime"), "another model: 'prime'. model_type must be borzoi"),
    "flashed": (_config(flashed=True), "rotary_size must be even and fit the keys"),
    "another depth": (_config(depth=3), r"missing.*transformer.2"),
    "another width": (_config(dim=64, attn_dim_value=32), "another width than config.json says, 64: 32"),
    "values": (_config(attn_dim_value=8), "another width than dim / heads, 16"),
    "words": (_config(depth="two", flashed=1), "another kind.*depth.*flashed"),
    "heads": (_config(heads=3), "multiple of heads"),
    "no head": (_config(enable_human_head=True), "lack heads.*human"),
    "crop": (_config(bins_to_return=321), "512 bins cannot be cropped evenly to: 321"),
    "too many bins": (_config(bins_to_return=6144), "cropped evenly to: 6144"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "short")
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelError, match=message):
        load_borzoi(folder, positions=POSITIONS)


def test_the_attention_of_the_other_network_is_refused(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub", "flashzoi", flashed=False, attn_dim_value=144)
    with pytest.raises(ModelError, match=r"missing.*1\.to_q.*unexpected.*mha\.Wqkv"):
        load_borzoi(folder, positions=POSITIONS)


# ---- hub ids ----


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache, and no network: one commit of one repository, as huggingface_hub lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SEQGRAFT_CACHE", str(tmp_path / "cache"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    repository = tmp_path / "hub" / "models--johahi--flashzoi-replicate-0"
    snapshot = hub_folder(
        repository / "snapshots" / COMMIT, "long flashzoi", return_center_bins_only=True, bins_to_return=6144
    )
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):  # files are links to blobs
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


@torch.no_grad()
def test_a_hub_id_is_a_model_name(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "johahi/flashzoi-replicate-0"
    pretrained = find_model(name, COMMIT)
    assert pretrained is not None
    assert pretrained.folder == tmp_path / "cache" / "models" / "johahi--flashzoi-replicate-0" / COMMIT
    content = pretrained.content
    assert (content["architecture"], content["window"], content["bins"]) == ("borzoi", 524_288, 6144)
    assert (content["folds"], pretrained.folds) == ("borzoi", "borzoi")
    assert content["licence"] == "MIT"
    origin = content["converted_from"]
    assert (origin["source"], origin["revision"], len(origin["sha256"])) == (name, COMMIT, 64)
    assert COMMIT in (pretrained.folder / "card.md").read_text()
    assert (
        licence_of("EleutherAI/enformer-official-rough") == licence_of("johahi/borzoi-replicate-3-mouse") == "CC-BY-4.0"
    )
    assert licence_of("some/model") == "not stated: see the repository some/model"
    assert licence_of("/some/folder") == "not stated"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert licence_of("owner/name") == "not stated"  # a folder, however its path is written
    expected = load_borzoi(cached / "snapshots" / COMMIT)

    monkeypatch.setattr(folders, "load_published", None)  # converted once, and never read again
    config = parse_experiment({"data": "x", "model": {"name": name, "revision": COMMIT}}).model
    assert not weights.is_random(config)
    info = SimpleNamespace(window=16_384, bins=320, bin_size=32)
    model = build_pretrained(config, info)  # type: ignore[arg-type]
    assert isinstance(model, SequenceModel)
    assert model.trunk.spec.folds == "borzoi"
    assert weights.weight_hash(model.trunk) == weights.weight_hash(expected.trunk)
    table = TrackTable.build([{"name": "mine", "link": "softplus"}])
    assert build_model(config, table, info).trunk.settings == expected.trunk.settings  # type: ignore[arg-type]
    assert not [path for path in pretrained.folder.parent.iterdir() if path != pretrained.folder]


def test_hub_ids_that_cannot_be_used(cached: Path, tmp_path: Path) -> None:
    name = "johahi/flashzoi-replicate-0"
    for revision in (None, "main", COMMIT[:12]):
        with pytest.raises(ConfigError, match=r"model\.revision: .*needs the commit"):
            find_model(name, revision)
    with pytest.raises(ModelError, match="cannot be downloaded"):
        find_model(name, "f" * 40)
    with pytest.raises(ConfigError, match="only a hub id has a revision"):
        find_model("convnet", COMMIT)
    with pytest.raises(ConfigError, match="no such model"):
        find_model("nowhere")
    assert not (tmp_path / "cache").exists()


def test_a_conversion_that_fails_leaves_nothing(cached: Path, tmp_path: Path) -> None:
    (cached / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights are missing"):
        find_model("johahi/flashzoi-replicate-0", COMMIT)
    assert not (tmp_path / "cache").exists()


# ---- the command ----


def convert(*arguments: object) -> tuple[int, BaseException | None, str]:
    from typer.testing import CliRunner

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("seqgraft.card._SHOWN", ())  # the table of costs is tested with the card
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return result.exit_code, result.exception, " ".join(result.output.split())


def test_convert_takes_revision_targets_and_regions(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "targets.txt").write_text(TARGETS)
    (tmp_path / "published.bed").write_text("chr1\t0\t196608\tfold0\nchr1\t500000\t696608\tfold3\nchr2\t0\t9\tfold4\n")
    out = tmp_path / "model"
    code, error, shown = convert(
        *("johahi/flashzoi-replicate-0", out, "--name", "flashzoi", "--revision", COMMIT),
        *("--targets", tmp_path / "targets.txt", "--trained-on", tmp_path / "published.bed", "--licence", "mine"),
    )
    assert code == 0, error
    assert "tensors of johahi/flashzoi-replicate-0 are there. Use it with model:" in shown
    content = json.loads((out / "model.json").read_text())
    assert (content["name"], content["folds"], content["licence"]) == ("flashzoi", "borzoi", "mine")
    assert list(content["heads"]) == ["human_RNA", "human_DNASE"]
    assert [line.split("\t")[3] for line in (out / "trained_on.bed").read_text().splitlines()] == [
        *("train", "test", "valid")
    ]
    pretrained = find_model(str(out))
    assert pretrained is not None
    assert (pretrained.folds, pretrained.trained_on) == ("borzoi", out / "trained_on.bed")


def test_convert_says_what_is_wrong(cached: Path, tmp_path: Path) -> None:
    source = cached / "snapshots" / COMMIT
    (tmp_path / "wrong.bed").write_text("chr1\t0\t196608\tfold9\n")
    named = ("--name", "x")
    cases: list[tuple[tuple[object, ...], type[Exception], str]] = [
        ((source, tmp_path / "a", *named, "--trained-on", tmp_path / "wrong.bed"), DataError, "fold9"),
        ((source, tmp_path / "b", *named, "--targets", f"mouse={tmp_path / 'none.txt'}"), DataError, "does not exist"),
        (("johahi/flashzoi-replicate-0", tmp_path / "c", *named), ConfigError, "needs the commit"),
        ((tmp_path / "x.h5", tmp_path / "d", *named, "--trained-on", source), ConfigError, "--params"),
        ((tmp_path / "x.h5", tmp_path / "d", *named, "--params", "p", "--revision", COMMIT), ConfigError, "--revision"),
        ((source, tmp_path / "d", *named, "--revision", COMMIT), ConfigError, "only a hub id has a revision"),
        ((source, tmp_path / "d", *named, "--params", source), ConfigError, "for a Keras file"),
        ((source, tmp_path / "d", *named, "--citation", "x"), ConfigError, "for a Keras file"),
    ]
    for arguments, kind, message in cases:
        code, error, _ = convert(*arguments)
        assert code
        assert isinstance(error, kind), error
        assert message in str(error)
    assert not {"a", "b", "c", "d"} & {path.name for path in tmp_path.iterdir()}
