"""What an arm starts from: a model, and data. What is missing is made, and made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
from arms import Arm

from puma_jax import Embedder, merge, mine, score
from puma_jax.data.builder.build import build
from puma_jax.data.builder.settings import Settings
from puma_jax.data.prompts import Processor
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.evaluation.mining import MiningConfig
from puma_jax.model import encoder, hf

ARM = "arm"
"""Name of the only stage of an arm's run."""
_MINING = MiningConfig(ranks=(2, 50), negatives=2)
"""Models this small are unsure of ranks: negatives begin at once behind the first document."""


@dataclass(frozen=True)
class Data:
    """A benchmark, and the training data that are built of it."""

    root: Path
    built: Path


def model_of(arm: Arm, start: Path, scratch: Path, of_seed: Path) -> Path:
    """Return the folder of the model that an arm starts from.

    Args:
        arm: The arm.
        start: Model that the arms of its experiment start from.
        scratch: Model without any training.
        of_seed: Folder of the finished arms of the experiment and the seed.
    """
    if arm.continues:
        run = of_seed / arm.continues
        return _mean(run, arm.averages) if arm.averages else run / ARM
    if arm.forgets == "all":
        return scratch
    if arm.forgets == "layers":
        return _with_random_layers(start, of_seed / "random-layers")
    return start


def data_of(arm: Arm, start: Path, plain: Data, folder: Path) -> Data:
    """Return the data of an arm.

    Args:
        arm: The arm.
        start: Model that mines and scores.
        plain: Data without hard negatives.
        folder: Folder of the experiment.
    """
    if arm.negatives == "none":
        return plain
    root = folder / "mined"
    if not root.exists():
        mine.main(str(start), plain.root, root, _MINING)
    if arm.negatives == "scored":
        mined, root = root, folder / "scored"
        if not root.exists():
            score.main(mined, root, str(start))
    built = folder / f"built-{arm.negatives}"
    if not built.exists():
        checkpoint = hf.open_checkpoint(start)
        processor = Processor(load_tokenizer(start), checkpoint.config)
        build(Settings(root=root, out=built), processor)
    return Data(root, built)


def _mean(run: Path, last: int) -> Path:
    """Return the folder of the mean of a run's last checkpoints."""
    folder = run.with_name(f"mean-of-{run.name}")
    if not folder.exists():
        merge.main(folder, workdir=run, stage=ARM, last=last)
    return folder


def _with_random_layers(model: Path, folder: Path) -> Path:
    """Return the folder of a model whose decoder layers are drawn at random again."""
    if not folder.exists():
        embedder = Embedder.load(model, dtype=None)
        seed = int(folder.parent.name.removeprefix("seed-"))
        fresh = encoder.init(embedder.config, jax.random.key(seed + 1))
        embedder.params.decoder.layers = fresh.decoder.layers
        embedder.save(folder)
    return folder
