"""Build the demo benchmark: `python -m puma_jax.data.openmoji --out DIR`."""

from __future__ import annotations

import tyro

from puma_jax import cli
from puma_jax.data.demo.settings import Settings
from puma_jax.data.openmoji.build import build


def main(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Build the OpenMoji demo benchmark in M-BEIR layout.

    Args:
        settings: The variant to build, and the folder to write.
    """
    if not build(settings):
        print("Nothing to do: it is already built.")
    print(f"The benchmark is in {settings.out}")


if __name__ == "__main__":
    cli.run(main)
