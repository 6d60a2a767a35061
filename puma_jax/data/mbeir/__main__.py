"""Check a folder in M-BEIR layout: `python -m puma_jax.data.mbeir validate ROOT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from puma_jax import cli
from puma_jax.data.mbeir.validation import validate


def main(
    command: Positional[Literal["validate"]], root: Positional[Path], check_images: bool = True
) -> None:
    """Read every record, image and reference of a benchmark, and print what is wrong with them.

    Exits with 1 if there are bad records.

    Args:
        command: What to do.
        root: Folder in M-BEIR layout.
        check_images: Decode every image once; without, images may be missing.
    """
    report = validate(root, check_images=check_images)
    print(report)
    if not report.sound:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
