"""The shape of the package: imports point down, each heavy dependency has one door, and some things are never written.

Every import counts, wherever it stands: at the top, inside a function, or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "seqgraft"

# Lowest first. A module imports only from rows above its own, and within its package from that package's BASES.
LAYERS: tuple[tuple[str, ...], ...] = (
    # 0
    ("errors", "progress"),
    ("sequence",),
    ("genome", "bigwig", "sample", "oracle"),
    ("tracks", "dosage"),
    # 1
    ("losses", "metrics", "plots", "repository"),
    ("cell_plots", "intervals", "logos", "trends", "value_plots"),
    (
        "data.covariates",
        *("data", "data.augment", "data.dataset", "data.duplicates", "data.folds", "data.labels", "data.seen"),
        *("data.tables", "data.tiles", "data.labelled", "data.peaks", "data.coverage", "data.simulate", "data.cohort"),
        "data.simulated_cells",
        *("data.gene_starts", "data.h5ad", "data.h5ad_files"),
        *("data.calls", "data.donors", "data.expression", "data.genotypes", "data.haplotypes", "data.personal"),
        *("data.binned", "data.barcodes", "data.fragment_files", "data.fragments", "data.pseudobulk", "data.quality"),
        *("data.spill", "data.windows"),
    ),
    # 2
    (
        "models",
        "models.base",
        "models.stages",
        "models.convnet",
        "models.borzoi",
        "models.dryrun",
        "models.encoder",
        "models.enformer",
        "models.module",
        "models.params",
        "models.reading",
        "models.remote_code",
        "models.sites",
        "models.track_head",
        "models.vocabulary",
        "models.wrap",
    ),
    ("models.tokens",),
    ("models.masked",),
    ("models.huggingface", "models.language"),
    ("models.automodel", "models.hub_borzoi", "models.hub_enformer", "models.hub_language"),
    ("models.hub_automodel",),
    ("models.hub",),
    ("models.folders",),
    ("models.weights",),
    ("models.baskerville",),
    # 3
    (
        *("adapters", "adapters.base", "adapters.files", "adapters.freeze", "adapters.lora", "adapters.bottleneck"),
        "adapters.prompt",
    ),
    ("adapters.baskerville",),
    # 4
    ("regions", "scoring"),
    ("predict", "objectives"),
    ("cache_tiles", "joint"),
    ("cache", "memory", "local"),
    # 5
    ("train", "baselines", "genes", "output", "card", "token_counts"),
    ("controls", "target", "specificity"),
    ("attribute", "plain"),
    # 6
    ("evaluate", "linearity", "variants.place"),
    ("donor_scores", "ism"),
    ("agreement", "predixcan"),
    ("effects",),
    ("variants.alleles", "variants.marks", "variants.over", "variants.scorers"),
    ("variants.score",),
    ("variants.likelihood",),
    ("variants.panels", "variants.table", "variants.screen"),
    ("variants.calibrate",),
    ("variants",),
    ("markov",),
    ("perplexity",),
    # 7
    ("experiment",),
    ("exposure",),
    ("run",),
    ("apply", "export", "plan"),
    # 8
    ("cells",),
    ("results",),
    ("grids",),
    (
        "sweep",
        "report",
        "report.page",
        "report.scores",
        "report.cards",
        "report.cell_types",
        "report.donors",
        "report.effects",
        "report.genes",
        "report.glossary",
        "report.values",
        "report.run",
        "report.comparison",
        "report.sweep",
    ),
    ("share_card",),
    ("share",),
    ("serve.asked", "serve.jobs"),
    ("serve.answers",),
    ("serve.served",),
    ("serve.app",),
    ("serve",),
    # 9
    ("demo",),
    ("cli",),
    ("__main__",),
    ("",),  # the package itself: it may offer anything below, lazily
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}

# What siblings in a package may import, and who may import all of its package: the places where things are registered.
BASES = {
    "data": {
        "data.covariates",
        *("data.barcodes", "data.binned", "data.fragment_files", "data.pseudobulk", "data.quality", "data.spill"),
        *("data.augment", "data.dataset", "data.duplicates", "data.folds", "data.labels", "data.seen"),
        *("data.tables", "data.tiles", "data.donors", "data.expression", "data.genotypes", "data.haplotypes"),
        *("data.calls", "data.cohort", "data.simulated_cells"),
        *("data.gene_starts", "data.h5ad_files", "data.labelled"),
    },
    "models": {"models.base", "models.dryrun", "models.module", "models.sites", "models.stages"},
    "adapters": {"adapters.base"},
    "report": {
        *("report.cards", "report.cell_types", "report.donors", "report.effects", "report.genes", "report.glossary"),
        *("report.page", "report.scores", "report.values"),
    },
}
REGISTRIES = {"data", "variants", "models", "models.folders", "models.weights", "adapters", "report"}

DOORS: dict[str, set[str]] = {
    "accelerate": {"train"},
    "bitsandbytes": {"adapters.lora"},
    "fastapi": {"serve.app"},
    "h5py": {"data.h5ad_files", "models.baskerville"},
    "huggingface_hub": {"models.huggingface", "repository"},
    "jinja2": {"report"},
    "matplotlib": {"cell_plots", "logos", "plots", "trends", "value_plots"},
    "optuna": {"grids"},
    "peft": {"adapters.lora"},
    "pybigtools": {"bigwig", "tracks"},
    "pydantic": {"experiment"},
    "pysam": {"genome"},
    "ray": {"cells"},
    "rich": {"cli", "progress"},
    "tokenizers": {"models.tokens"},
    "transformers": {"models.automodel", "models.hub_automodel", "models.hub_language", "models.remote_code"},
    "typer": {"cli"},
    "uvicorn": {"serve"},
    "yaml": {"experiment"},
    "zarr": {"output"},
}
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

# These start without torch: preparing data, reading metrics and `--help` do not pay for it.
LIGHT = ("errors", "progress", "sequence", "genome", "bigwig", "sample", "tracks", "metrics")
HEAVY = ("torch", "peft", "transformers", "accelerate", "matplotlib", "pandas", "scipy", "sklearn")


def name_of(path: Path) -> str:
    """`.../seqgraft/data/__init__.py` is `data`, `.../seqgraft/data/dataset.py` is `data.dataset`, the root is ``."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text(), str(path)) for path in sorted(SOURCE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every `(dotted name, line)` that the nodes below import; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom(level=0):
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            case ast.Call(func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module")):
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        yield name, node.lineno


@cache
def edges() -> dict[str, dict[str, int]]:
    """Module -> the modules of this package that it imports, with the line."""
    graph: dict[str, dict[str, int]] = {}
    for module, tree in modules().items():
        found = graph.setdefault(module, {})
        for dotted, line in imported(tree):
            if dotted == "seqgraft.__version__" or dotted.partition(".")[0] != "seqgraft":
                continue
            inner = dotted.partition(".")[2]
            target = inner if inner in modules() else inner.rpartition(".")[0]
            found.setdefault(target, line)
    return graph


def may_import(module: str, target: str) -> bool:
    if RANK[target] < RANK[module]:
        return True
    package = module.partition(".")[0]
    same_package = target.startswith(f"{package}.")
    return same_package and (module in REGISTRIES or target in BASES.get(package, ()))


def test_every_module_has_a_layer() -> None:
    unlisted = sorted(modules().keys() - RANK.keys())
    assert not unlisted, f"Add {unlisted} to LAYERS in {Path(__file__).name}, and to the tree in docs/design.md."


def test_imports_point_down() -> None:
    wrong = [
        f"{module or 'seqgraft'} imports {target or 'seqgraft'} (line {line})"
        for module, targets in edges().items()
        for target, line in targets.items()
        if module in RANK and target in RANK and not may_import(module, target)
    ]
    assert not wrong, "Imports point to a lower layer, or to the base file of the same package:\n" + "\n".join(wrong)


def test_no_import_cycle() -> None:
    try:
        TopologicalSorter({module: targets.keys() for module, targets in edges().items()}).prepare()
    except CycleError as error:
        pytest.fail(f"Import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", DOORS)
def test_one_door(package: str) -> None:
    users = {
        module for module, tree in modules().items() for name, _ in imported(tree) if name.partition(".")[0] == package
    }
    assert users <= DOORS[package], f"{package} comes in through {DOORS[package] or 'no module yet'}, not {users}."


@pytest.mark.parametrize("module", sorted(modules()))
def test_module_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(modules()[module]), f"Say in the first lines of {module or 'seqgraft'} what it is for."


@pytest.mark.parametrize("module", sorted(modules()))
def test_what_is_never_written(module: str) -> None:
    tree = modules()[module]
    wrong = [f"line {line}: {name} can run code" for name, line in imported(tree) if name.partition(".")[0] in NEVER]
    wrong += [f"line {node.lineno}: {what}" for node in ast.walk(tree) for what in forbidden(node)]
    assert not wrong, f"{module}:\n" + "\n".join(wrong)


def forbidden(node: ast.AST) -> Iterator[str]:
    """What must not be written at this node."""
    match node:
        case ast.ImportFrom(level=level) if level:
            yield "relative import; write it in full, so that the layers can be checked"
        case ast.ExceptHandler(type=None):
            yield "bare except; name the errors"
        case ast.ExceptHandler(type=caught):
            if "Exception" in {inner.id for inner in ast.walk(caught) if isinstance(inner, ast.Name)}:
                yield "except Exception; name the errors"
        case ast.Call(func=ast.Name(id="eval" | "exec")):
            yield "eval or exec"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=verb), keywords=keywords):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
            if (owner, verb) == ("torch", "load") and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if (owner, verb) == ("torch", "save"):
                yield "torch.save writes a pickle; write safetensors"
            if owner in {"np", "numpy"} and verb == "load" and given.get("allow_pickle") != "False":
                yield "numpy.load without allow_pickle=False"
            if owner == "yaml" and verb in {"load", "load_all", "unsafe_load", "full_load"}:
                yield "yaml.load; use yaml.safe_load"
            if owner == "pd" and verb in {"read_pickle", "to_pickle"}:
                yield "pandas pickle"


@pytest.mark.parametrize(
    "code",
    [
        "from .dataset import Dataset",
        "try: pass\nexcept: pass",
        "try: pass\nexcept Exception: pass",
        "try: pass\nexcept (ValueError, Exception) as e: pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "yaml.load(text)",
        "eval(text)",
    ],
)
def test_the_rules_bite(code: str) -> None:
    assert [what for node in ast.walk(ast.parse(code)) for what in forbidden(node)]


def test_the_layers_bite() -> None:
    assert not may_import("data.dataset", "train")
    assert not may_import("data.labelled", "data.coverage")
    assert not may_import("losses", "metrics")
    assert may_import("data.labelled", "data.dataset")
    assert may_import("data", "data.labelled")
    assert may_import("cli", "train")
    inside = "def f():\n    from seqgraft.train import fit\nif TYPE_CHECKING:\n    import seqgraft.cli"
    assert {name for name, _ in imported(ast.parse(inside))} == {"seqgraft.cli", "seqgraft.train.fit"}


def heavy_after(statement: str) -> list[str]:
    """The heavy packages that a fresh interpreter has loaded after the statement."""
    loaded = f"' '.join(name for name in {HEAVY} if name in sys.modules)"
    probe = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nprint('\\nloaded:', {loaded})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("loaded:")[2].split()


def test_help_is_light() -> None:
    run = "import sys; sys.argv = ['seqgraft', '--help']; from seqgraft.__main__ import main; main()"
    assert not heavy_after(run), "seqgraft --help loads heavy packages: import them inside the command."


def test_help_is_quick() -> None:
    """Under half a second of processor time, the best of three: other processes share the cores here."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "seqgraft", "--help"], capture_output=True, timeout=120, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def test_light_modules_load_no_torch() -> None:
    names = [name for name in LIGHT if name in modules()]
    names += [name for name in modules() if name.partition(".")[0] == "data"]
    statement = "import " + ", ".join(f"seqgraft.{name}" for name in names)
    assert "torch" not in heavy_after(statement), f"One of {names} loads torch at its top."


def test_data_files_ship() -> None:
    """Whatever lies in the source folder is in the installed package: trunks, report templates, py.typed."""
    import seqgraft

    installed = Path(seqgraft.__file__).parent
    wanted = [path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert not [str(path) for path in wanted if not (installed / path).is_file()]
