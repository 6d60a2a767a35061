"""What a user can cause is one line that is safe to print, and a code that says what it was."""

import errno
import subprocess
import sys

import pytest

from puma_jax import cli
from puma_jax.errors import ArtifactError, printable

HOSTILE = "a\x1b[31m\0\r\n\x9b\u202e\u2066\u2028\udcff.jpg"
HARMLESS = r"a\x1b[31m\x00\r\n\x9b\u202e\u2066\u2028\udcff.jpg"


def end_of(error, capsys):
    """Return exit code and what is printed when a command raises an error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.exit_on_error(main)
    return ended.value.code, capsys.readouterr().err


def test_a_message_does_not_steer_the_terminal(capsys):
    assert end_of(ArtifactError(HOSTILE), capsys) == (2, f"error: {HARMLESS}\n")


def test_a_message_is_as_safe_where_no_command_prints_it():
    assert str(ArtifactError(HOSTILE)) == HARMLESS
    assert len(str(ArtifactError("x" * 10**6))) < 5000


def test_names_in_what_is_printed_do_not_either(capsys):
    with cli.printable_output():
        print("first\tline\n", HOSTILE.replace("\n", ""))
    assert capsys.readouterr().out == "first\tline\n " + HARMLESS.replace(r"\n", "") + "\n"


@pytest.mark.parametrize(
    "text", ["Größe 漢 العربية", "👩‍👩‍👧 🏴\U000e0067\U000e007f", "e\u0301\n\t"]
)
def test_text_of_all_scripts_stays_as_it_is(text):
    assert printable(text) == text


def test_an_interrupt_is_a_line_and_130(capsys):
    assert end_of(KeyboardInterrupt(), capsys) == (130, "error: interrupted\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_disk_that_is_full_or_read_only_is_a_line(number, capsys):
    code, printed = end_of(OSError(number, "cause", "out\x1b/a"), capsys)
    assert (code, printed) == (2, "error: out\\x1b/a: cause\n")


def test_a_fault_of_the_program_keeps_its_traceback(capfd):
    code, printed = end_of(ValueError("a fault"), capfd)
    assert code == 1
    assert printed.startswith("Traceback")
    # A pipe that broke, but is not our output's, is such a fault.
    assert end_of(BrokenPipeError(errno.EPIPE, "Broken pipe"), capfd)[0] == 1


COMMAND = """
import sys
from puma_jax import cli

def main(count: int = 1):
    '''Print lines.'''
    for number in range(count):
        print("x" * 100)
    print(sys.argv[0])

cli.run(main)
"""


@pytest.mark.parametrize("flags", [["--count", "10000"], ["--help"]])
def test_output_that_nobody_reads_ends_the_command_silently(flags):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_flag_of_another_type_is_refused_with_usage_only():
    for flags in (["--count", "7" * 5000], ["--count", "1e999"], ["--count", "\udcff"]):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *flags], capture_output=True, check=False
        )
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr + done.stdout


WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
import puma_jax.embedder
from transformers.utils import is_torch_available
assert not is_torch_available()
"""


def test_where_torch_is_not_installed_nothing_is_said_about_it():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("module", ["train", "embed", "export", "data.builder"])
def test_help_is_usage_and_nothing_else(module):
    command = [sys.executable, "-m", f"puma_jax.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m puma_jax.{module}")
    assert done.stderr == ""
