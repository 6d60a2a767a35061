"""Every command line of README and docs is one that the command takes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex

import pytest
import tyro

from puma_jax import train
from tests.docs.pages import PAGES, ROOT, blocks, name_of, prose

COMMAND = re.compile(r"python -m (puma_jax[.\w]*)((?: [^|;&]*)?)")
# Flags of other programs that pages name.
FOREIGN = {"--editable", "--env-file", "--help", "--dry-run", "--index-url", "--preset"}


def commands(page):
    """All calls of our modules in a page: its shell blocks, and code within sentences."""
    lines = [
        re.sub(r"\s+#.*", "", line)
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    found = [match.groups() for line in lines for match in COMMAND.finditer(line)]
    return [(module, shlex.split(given)) for module, given in found if "..." not in given]


SCRIPTS = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("benchmarks/**/*.py")))

CALLS = {
    f"{name_of(page)}: {module} {' '.join(given)}": (module, given)
    for page in PAGES
    for module, given in commands(page)
}


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "run", lambda config, workdir, reuse: None)
    monkeypatch.setattr(train, "initialize", lambda config: None)


def parse(module, given):
    """Parse as the command does, and do nothing."""
    if module == "puma_jax.train":
        train.main(given)
        return
    try:
        imported = importlib.import_module(f"{module}.__main__")
    except ModuleNotFoundError:
        imported = importlib.import_module(module)
    main = imported.main

    @functools.wraps(main)
    def nothing(*args, **kwargs):
        """Take what `main` takes."""

    tyro.cli(nothing, args=given)


@pytest.mark.parametrize("call", CALLS)
def test_the_command_takes_its_flags(call, nothing_runs):
    module, given = CALLS[call]
    wants_help = "--help" in given
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            # A call without flags only names the command.
            parse(module, given or ["--help"])
            stopped = None
        except SystemExit as stop:
            stopped = stop.code
    assert stopped == (0 if wants_help or not given else None), printed.getvalue()


@functools.cache
def known_flags() -> str:
    """The help of the commands that pages write about, one after the other."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        train.main(["--config", str(ROOT / "configs/openmoji.py"), "--help"])
    modules = {module for module, _ in CALLS.values()} - {"puma_jax.train"}
    for module in sorted(modules):
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parse(module, ["--help"])
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_within_sentences_exist(page, nothing_runs):
    spans = re.findall(r"`([^`]+)`", prose(page))
    ours = [span for span in spans if span.startswith("--") and "=" not in span]
    for shown in ours:
        span = re.sub(r"stages\.\w+", "stages.pruned", shown)
        flag = span.split()[0].rstrip(".*")
        if flag in FOREIGN or "{" in flag or f'"{flag}"' in SCRIPTS:
            continue
        assert flag in known_flags(), f"{name_of(page)}: {span}"
        stage = flag.startswith(("--stages.", "--evaluation.", "--log."))
        value = span.split()[1:]
        if stage and not any(word.isupper() for word in value):
            given = ["--config", "configs/openmoji.py", "--workdir", "w", flag, *value]
            if value or f"{flag}, " in known_flags():
                train.main(given)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_of_scripts_exist(page, nothing_runs):
    code = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    code += "\n".join(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page)))
    for script, given in re.findall(r"python ((?:benchmarks|launch)/[\w/]+\.py)([^\n#;&|]*)", code):
        source = (ROOT / script).read_text("utf-8")
        for shown in re.findall(r"--[\w.-]+", given):
            flag = re.sub(r"stages\.\w+", "stages.pruned", shown)
            name = flag.removeprefix("--").replace("-", "_")
            assert f'"{flag}"' in source or f"{name}:" in source or flag in known_flags(), flag


def test_pages_name_files_that_exist():
    named = re.compile(
        r"\b(?:puma_jax|configs|launch|benchmarks|tests)/[\w./-]+\.(?:py|sh|yaml|sbatch)\b"
    )
    for page in PAGES:
        for name in named.findall(page.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{name_of(page)}: {name}"
