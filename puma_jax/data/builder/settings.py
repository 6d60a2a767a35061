"""Which data to build, and where to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from puma_jax.data.lines import OnBadRecord
from puma_jax.data.threads import usable_cores
from puma_jax.errors import ConfigError
from puma_jax.schema import Count, check


@dataclass(frozen=True)
class Settings:
    """The data to build. The same settings give the same bytes with any number of workers."""

    root: Annotated[Path, tyro.conf.arg(name="data.root")]
    """Folder in M-BEIR layout. The union of its training sets is built, or all sets without one."""
    out: Path
    """Folder to write: empty, missing, or of a build with the same settings, which is resumed or
    brought up to date."""
    sets: tuple[str, ...] = ()
    """Datasets ("nights") or sets ("nights_task4") to build, with the documents that their queries
    refer to. Empty, the default, builds all sets and the whole pool."""
    images: Literal["inline", "path"] = "inline"
    """Store the bytes of image files ("inline"), or only their paths below the root ("path")."""
    shard_items: Count = 8192
    """Lines in a shard."""
    on_bad_record: OnBadRecord = "error"
    """Stop at a bad record ("error"), or skip bad records and print their number ("skip")."""
    workers: Count = usable_cores()
    """Processes that build shards, by default one for each core that may be used; their number
    changes only the time."""

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: A number is below 1, or a path is a bucket's.
        """
        check(self)
        for name, folder in (("data.root", self.root), ("out", self.out)):
            path = folder.as_posix()
            if re.match(r"\w{2,}:/", path):
                raise ConfigError(
                    f"{name} {path} is not a local folder: build in one, then copy it to the bucket"
                )
