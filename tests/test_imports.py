"""Imports point one way, are cheap where they must be, and have no effect outside the process."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "attention_guided_rl"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

# A module may import what stands in a line above its own, and nothing else of the package.
LAYERS = [
    layer.split()
    for layer in """
    errors records randomness selection statistics secrets caching onednn plain_data
        confined screen data.wikitext data.plain_text report report.log_lines report.verdict report.audit
    adapter
    config model memory peers guard reward storage interruption tables data.corpus data.text_files report.trajectories
        report.tables summary verification.reading
    config_files distributed rl_agent environment template loading tracking network data.hygiene data.encyclopedia
        data.article_cache report.drawing report.run_files report.figures fingerprints verification.checkpoint
    branching ema data.hub_dataset data.multistream data.mediawiki_reply report.html run_settings
    objective data.mediawiki data.dump_xml compare verification.settings
    data.files data.dump data.hub data.wikipedia data.pairs embedders.cache verification.logs
    data scorer rollouts survey_counts embedders.text embedders.attention embedders.hashing verification.trajectories
    sizes embedders.openai embedders.sentence_transformers verification.evaluation
    embedders verification
    session checkpoint
    update oracle pickers diagnostics
    trainer texts trial report.terminal
    arms ordering order_files
    evaluation
    runs headroom doctor dry_run survey
    report.survey
    cli
    __main__ PACKAGE
    """.strip()
    .replace("PACKAGE", PACKAGE)
    .replace("\n        ", " ")
    .splitlines()
]
LAYER = {module: number for number, layer in enumerate(LAYERS) for module in layer}

ONLY_IN = {
    "transformers": {"model", "loading", "caching", "rollouts", "scorer", "branching", "oracle"},
    "peft": {"model", "loading", "adapter"},
    "huggingface_hub": {"loading", "data.hub_dataset"},
    "accelerate": {"distributed"},
    "torch.distributed": {"distributed"},
    "matplotlib": {"report.figures"},
    "jinja2": {"report.html"},
    "tyro": {"cli"},
    "httpx2": {"network", "embedders.openai", "data.mediawiki", "data.hub_dataset"},
    "openai": {"embedders.openai"},
    "sentence_transformers": {"embedders.sentence_transformers"},
    "datasets": {"data.hub_dataset"},
    "pyarrow": {"data.hub", "data.hub_dataset"},
    "sqlite3": {"embedders.cache"},
    "tenacity": {"network"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or PACKAGE


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) a file imports anywhere, but for what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def inside(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, as they are named here."""
    for module, name in imports(path):
        if module == PACKAGE or module.startswith(f"{PACKAGE}."):
            place = module.removeprefix(PACKAGE).removeprefix(".")
            longer = f"{place}.{name}".removeprefix(".")
            yield longer if longer in MODULES else place or PACKAGE


def test_every_module_has_its_layer():
    assert set(MODULES) == set(LAYER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_above_its_own(module):
    for imported in inside(MODULES[module]):
        assert LAYER[imported] < LAYER[module], f"{module} imports {imported}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_met_in_one_place(library):
    found = {
        module
        for module, path in MODULES.items()
        for imported, name in imports(path)
        if f"{imported}.{name}".startswith(f"{library}.") or imported == library
    }
    assert found <= ONLY_IN[library]


def test_outside_the_model_transformers_lends_nothing_but_the_type_of_the_cache():
    for module in ("rollouts", "scorer", "branching", "oracle"):
        names = {name for imported, name in imports(MODULES[module]) if imported.startswith("transformers")}
        assert names <= {"DynamicCache"}


def test_nothing_imports_the_tests_or_runs_code_from_pickles():
    for path in MODULES.values():
        for imported, _ in imports(path):
            assert imported.split(".")[0] not in {"tests", "pickle", "dill", "joblib", "shelve", "pytest"}


PROBE = """
import contextlib, importlib, io, json, sys
from attention_guided_rl.cli import main
heavy = ("torch", "transformers", "matplotlib", "accelerate", "datasets", "scipy")
loaded = {}
for arguments in ([], ["--help"], ["--version"], ["config"], ["evaluate", "--help"], ["report", "no-such-run"],
                  ["verify", "no-such-run"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(arguments)
    loaded[" ".join(arguments)] = [name for name in heavy if name in sys.modules]

import attention_guided_rl
public = [name for name in attention_guided_rl.__all__ if name not in vars(attention_guided_rl)]
loaded["import"] = [name for name in heavy if name in sys.modules]
import attention_guided_rl.embedders
loaded["embedders"] = [name for name in ("openai", "sentence_transformers") if name in sys.modules]

# What other libraries do when they are imported is theirs; ours come after all of them.
outside = json.loads(sys.argv[2])
for name in outside:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
events = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen", "os.system", "os.mkdir",
           "os.rename", "os.remove", "shutil.rmtree", "os.truncate")
def watch(event, arguments):
    if event in WATCHED or event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append(f"{event} {arguments[:2]}")
sys.addaudithook(watch)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import torch
print(json.dumps({"loaded": loaded, "events": events, "cuda": torch.cuda.is_initialized(), "lazy": public}))
"""


@pytest.fixture(scope="module")
def probe() -> dict:
    """What one fresh interpreter saw."""
    ours = [PACKAGE if module == PACKAGE else f"{PACKAGE}.{module}" for module in MODULES if module != "__main__"]
    others = sorted({i for path in MODULES.values() for i, _ in imports(path) if i.split(".")[0] != PACKAGE} - {"tyro"})
    result = subprocess.run(
        [sys.executable, "-B", "-c", PROBE, json.dumps(ours), json.dumps([*others, "tyro"])],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "command",
    ["", "--help", "--version", "config", "evaluate --help", "report no-such-run", "verify no-such-run", "import"],
)
def test_what_needs_no_model_does_not_wait_for_torch(probe, command):
    assert probe["loaded"][command] == []


def test_only_who_uses_an_embedder_waits_for_its_library(probe):
    assert probe["loaded"]["embedders"] == []


def test_importing_opens_no_connection_and_writes_no_file(probe):
    assert probe["events"] == []


def test_importing_leaves_the_gpu_alone(probe):
    assert probe["cuda"] is False


def test_public_names_are_there_when_asked_for():
    import attention_guided_rl

    assert {"load_config", "train", "evaluate", "rollout", "score_order"} == set(attention_guided_rl.__all__)
    for name in attention_guided_rl.__all__:
        assert callable(getattr(attention_guided_rl, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = attention_guided_rl.no_such_name
