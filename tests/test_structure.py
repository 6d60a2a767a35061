"""Imports run one way, promises have one home, every option says what it does."""

import ast
import builtins
import dis
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
import tyro

import puma_jax

ROOT = Path(puma_jax.__file__).parent

# From the ground up; a room imports from itself and from lower floors.
FLOORS = (
    ("errors", "typing", "axes"),
    ("schema",),
    ("files",),
    ("artifacts", "progress", "compilation_cache"),
    ("config", "rows", "cli"),
    ("model", "losses"),
    ("data", "parallel"),
    ("forward",),
    ("embedder",),
    ("reranker",),
    ("search",),
    ("evaluation", "service"),
    ("training", "export"),
    (
        *("train", "evaluate", "embed", "mine", "score", "index", "prune", "compose", "merge"),
        *("serve", "verify"),
    ),
    ("__main__",),
)
OPTIONAL = {
    "datasets",
    "faiss",
    "fastapi",
    "lance",
    "mteb",
    "orbax",
    "prometheus_client",
    "milvus_lite",
    "pyarrow",
    "pymilvus",
    "sentence_transformers",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tokamax",
    "torch",
    "uvicorn",
    "wandb",
}
COMMANDS = (
    "puma_jax.data.builder.__main__",
    "puma_jax.data.mbeir.__main__",
    "puma_jax.data.openclipart.__main__",
    "puma_jax.data.openmoji.__main__",
    "puma_jax.compose",
    "puma_jax.data.text_pairs",
    "puma_jax.embed",
    "puma_jax.evaluate",
    "puma_jax.export.__main__",
    "puma_jax.index",
    "puma_jax.merge",
    "puma_jax.mine",
    "puma_jax.prune",
    "puma_jax.score",
    "puma_jax.search.__main__",
    "puma_jax.serve",
    "puma_jax.train",
    "puma_jax.verify",
)


def modules() -> dict[str, Path]:
    """Return every module of the package by name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("puma_jax"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_imports_run_downward():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    known, upward = modules(), []
    for name, path in known.items():
        for imported in imports(path, known):
            above, below = room(name), room(imported)
            if above and below and above != below and floor[below] >= floor[above]:
                upward.append(f"{name} imports {imported}")
    assert not upward


def test_no_module_imports_itself_through_others():
    known = modules()
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_name_is_defined():
    """Shapes in annotations keep linters from telling undefined names: so they are looked up."""
    undefined = []
    for name, path in modules().items():
        if name.endswith("__main__"):
            continue
        known = {*vars(builtins), *vars(module := importlib.import_module(name))}
        known |= {*getattr(module, "__annotations__", {})}
        codes = [compile(path.read_text("utf-8"), path, "exec")]
        while codes:
            code = codes.pop()
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            undefined += [
                f"{name}: {instruction.argval}"
                for instruction in dis.get_instructions(code)
                if instruction.opname == "LOAD_GLOBAL" and instruction.argval not in known
            ]
    assert not undefined


def test_the_core_imports_nothing_heavy():
    code = "import sys, puma_jax; puma_jax.Embedder; print(*{n.split('.')[0] for n in sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not OPTIONAL & set(done.stdout.split())
    assert not done.stderr


def test_what_a_job_writes_is_written_in_one_module():
    pattern = re.compile(
        r"os\.replace|os\.rename|\.rename\(|\.partial\"|\.replace\((?:path|folder|out)\)"
    )
    for path in ROOT.rglob("*.py"):
        if path.name != "artifacts.py":
            found = pattern.findall(path.read_text("utf-8"))
            assert not found, f"{path.name}: {found}"


@pytest.mark.parametrize("module", COMMANDS)
def test_every_option_says_what_it_does(
    module: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """No help text is missing, a fragment, or in words of our own."""
    monkeypatch.setenv("COLUMNS", "80")  # wide pages have two columns
    command = importlib.import_module(module).main
    if module == "puma_jax.train":
        arguments = ["--config", str(ROOT.parent / "configs/openmoji.py"), "--workdir", "run"]
        show = functools.partial(command, [*arguments, "--help"])
    else:
        show = functools.partial(tyro.cli, command, args=["--help"])
    with pytest.raises(SystemExit):
        show()
    page = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    options: dict[str, str] = {}
    name = None
    for line in (line.strip("│ ") for line in page.splitlines()):
        if re.match(r"--?[a-z]", line):
            if name is not None and name.endswith(",") and not options[name].strip():
                del options[name]  # "--flag," stands above "--no-flag"
            name, _, metavar_and_text = line.partition(" ")
            # What stands behind two spaces is help, before them what the option takes.
            options[name] = metavar_and_text.partition("  ")[2]
        elif not line or set(line) <= {"-", "─"}:
            name = None
        elif name is not None:
            options[name] += f" {line}"
    assert len(options) >= 3
    for name, text in options.items():
        says = re.sub(r"\((default|required|optional|repeatable|sets?|fixed)\b.*", "", text).strip()
        assert says, f"{name} has no help"
        assert not re.match(r"(Of|What|Whose|Whom)\b", says), f"{name}: {says}"
        assert not re.search(r"\bshall\b", says), f"{name}: {says}"
