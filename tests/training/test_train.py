"""Flags of the command: what the docs show is accepted, what cannot be run is one line."""

import re
import shlex
from pathlib import Path

import pytest

from puma_jax.errors import ConfigError
from puma_jax.train import load_config, parse

REPOSITORY = Path(__file__).parents[2]
DEMO = str(REPOSITORY / "configs/openmoji.py")
FLAG = re.compile(
    r"(--(?:stages|mesh|log|data|evaluation|checkpoint)\.[\w.-]+(?: [\w./,][\w./,-]*)*)"
)


def flags(*more: str, config: str = DEMO) -> list[str]:
    return ["--config", config, "--workdir", "run", *more]


def test_flags_change_the_config():
    config, workdir, reuse = parse(
        flags("--preset", "full", "--stages.pruned.loss.relative", "--reuse", "other")
    )
    assert config.stages["pruned"].loss.relative
    assert config.stages["pruned"].steps == 500
    assert (workdir, reuse) == (Path("run"), Path("other"))


def test_the_flags_of_the_docs_are_accepted(capsys):
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    text = re.sub(r"(--[\w.-]+)\n(\w)", r"\1 \2", text.replace("\\\n", " "))
    shown = sorted(set(FLAG.findall(re.sub(r"stages\.\w+", "stages.pruned", text))))
    assert "--stages.pruned.loss.relative" in shown
    refused = []
    for flag in shown:
        try:
            needed = ["--stages.pruned.model", "DIR"] if ".adapter" in flag else []
            if "score-distill" in flag:
                needed += ["--stages.pruned.plan.hard-negatives", "4"]
            parse(flags(*needed, *shlex.split(flag)))
        except SystemExit:
            # A page may name a flag without its value.
            if " " in flag or "Missing value" not in capsys.readouterr().err:
                refused.append(flag)
    assert not refused


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--checkpoint.every-steps", "0", "checkpoint.every_steps 0 must be"),
        ("--log.every-steps", "0", "log.every_steps 0 must be"),
        ("--scratch.heads", "0", "scratch.heads 0 must be in"),
        ("--scratch.width", str(10**30), "scratch.width 1000.* must be in"),
        ("--seed", str(10**30), "seed 1000.* must be in"),
        ("--stages.pruned.steps", str(10**30), "stage.steps 1000.* must be in"),
        ("--stages.pruned.loss.temperature", "-1", "loss.temperature -1.0 must be above 0"),
        ("--stages.pruned.optimizer.learning-rate", "nan", "learning_rate NaN is not a finite"),
    ],
)
def test_a_value_that_cannot_be_run_is_one_line(flag, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(flags(flag, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "stages: {}", "is not a Python file"),
        ("a.py", "x = (", r"a\.py:1: SyntaxError"),
        ("a.py", "\nimport nothing_of_this_name", r"a\.py:2: ModuleNotFoundError: No module"),
        ("a.py", "x = 1", "has no function get_config"),
        ("a.py", "def get_config():\n    return 1", "returns a int, expected a TrainConfig"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        parse(flags(config=str(path)))
    assert "\n" not in str(error.value)


def test_a_config_that_fails_is_one_line(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def get_config(size: int = 1):\n    return size / 0")
    with pytest.raises(ConfigError, match=r"a\.py:2: ZeroDivisionError: division by zero$"):
        parse(flags(config=str(path)))


def test_a_setting_that_is_no_more_is_told_with_what_to_use(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "from puma_jax.training.config import DataConfig\n"
        'def get_config():\n    return DataConfig("data", workers=8)'
    )
    use = "leave it out, .* PUMA_JAX_IMAGE_WORKERS sets another number$"
    with pytest.raises(ConfigError, match=rf"a\.py:3: TypeError: .*'workers': {use}"):
        parse(flags(config=str(path)))
    for given in (("--data.workers", "8"), ("--data.workers=8",)):
        with pytest.raises(ConfigError, match=f"^--data.workers is no longer a setting: {use}"):
            parse(flags(*given))


def test_a_missing_config_is_told(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        load_config(tmp_path / "a.py")
