"""The command `puma-jax`: lists all commands, and runs one."""

from __future__ import annotations

import runpy
import sys

from puma_jax import cli
from puma_jax.errors import ConfigError

COMMANDS = {
    "train": ("puma_jax.train", "Train a model from a recipe; resumes after a stop"),
    "prune": ("puma_jax.prune", "Keep some decoder layers of a model"),
    "compose": ("puma_jax.compose", "Join a text decoder and a vision tower into one model"),
    "merge": ("puma_jax.merge", "Average models, or checkpoints of a training run"),
    "evaluate": ("puma_jax.evaluate", "Evaluate a model on a benchmark in M-BEIR layout"),
    "mine": ("puma_jax.mine", "Find hard negatives for training queries; resumes after a stop"),
    "score": ("puma_jax.score", "Score positives and negatives with a teacher; resumes likewise"),
    "embed": ("puma_jax.embed", "Embed a corpus into a folder of vectors; resumes after a stop"),
    "index": ("puma_jax.index", "Put a folder of vectors into a Milvus index"),
    "search": ("puma_jax.search", "Search an index or a folder of vectors from the shell"),
    "serve": ("puma_jax.serve", "Serve embeddings, search and a page over HTTP"),
    "export": ("puma_jax.export", "Export a model, or vectors, for other software"),
    "verify": ("puma_jax.verify", "Check that all engines and exports give the same vectors"),
    "build": ("puma_jax.data.builder", "Tokenize a benchmark ahead of training"),
    "mbeir": ("puma_jax.data.mbeir", "Check a benchmark in M-BEIR layout"),
    "openmoji": ("puma_jax.data.openmoji", "Build the demo benchmark of emoji"),
    "openclipart": ("puma_jax.data.openclipart", "Build a benchmark of public domain clip art"),
    "text-pairs": ("puma_jax.data.text_pairs", "Turn a table of pairs into a benchmark"),
}
"""Name of a command: its module, and what it does."""


def main() -> None:
    """List the commands, or run the one that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        raise ConfigError(f'there is no command "{name}", expected one of {", ".join(COMMANDS)}')
    module = COMMANDS[name][0]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def usage() -> str:
    """Return the commands, one on each line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(["usage: puma-jax COMMAND ...", "", *lines, "", "puma-jax COMMAND --help"])


def run() -> None:
    """Run `main`; an error is one line, and decides the exit code."""
    cli.exit_on_error(main)


if __name__ == "__main__":
    run()
