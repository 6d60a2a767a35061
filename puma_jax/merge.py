"""Average models, or the checkpoints of a training run, into one model.

`python -m puma_jax.merge --models runs/a/mac runs/b/mac --out merged`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puma_jax import Embedder, cli
from puma_jax.artifacts import atomic_folder, check_output, lock, write_json
from puma_jax.config import DType, ModelConfig, require
from puma_jax.data.prompts import Processor, prompt_fingerprint
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.errors import CheckpointError
from puma_jax.model import averaging, hf
from puma_jax.model.averaging import Source

MANIFEST = "merged.json"
"""Says what a model is the mean of."""


def main(
    out: Path,
    models: tuple[str, ...] = (),
    workdir: Path | None = None,
    stage: str | None = None,
    last: int | None = None,
    steps: tuple[int, ...] = (),
    weights: tuple[float, ...] = (),
    dtype: DType | None = None,
) -> None:
    """Write the weighted mean of models that have the same shape, tokenizer and prompt.

    Sums are taken in float64, a tensor at a time.

    Args:
        out: Folder to write; must not exist, or be empty.
        models: Hugging Face folders or hub ids of the models.
        workdir: Folder of a training run, whose checkpoints to average in place of models.
        stage: Stage of the run.
        last: Number of checkpoints, the latest ones; all that there are by default.
        steps: Steps of the checkpoints to average, in place of the latest ones.
        weights: Weight of each model or checkpoint, scaled to add up to 1. All equal by default.
        dtype: Dtype to write. That of the models by default, or float32 if they differ.
    """
    require(
        bool(models) != (workdir is not None),
        "give either --models, or --workdir and --stage",
    )
    require(
        (stage is not None) == (workdir is not None) and not (workdir is None and (last or steps)),
        "--stage, --last and --steps choose checkpoints of a --workdir, which needs a --stage",
    )
    require(not (last and steps), f"--last {last} and --steps exclude each other")
    require(last is None or last >= 2, f"last is {last}, expected at least 2")
    require(workdir is None or workdir.is_dir(), f"--workdir {workdir} is not a folder")
    check_output(out)
    if workdir is not None and stage is not None:
        # Training deletes checkpoints.
        with lock(workdir):
            _merge_steps(workdir, stage, last, steps, weights, dtype, out)
    else:
        _merge_models(models, weights, dtype, out)


def _merge_models(
    models: tuple[str, ...], weights: tuple[float, ...], dtype: DType | None, out: Path
) -> None:
    require(
        len(models) == len({*models}) >= 2,
        f"models are {', '.join(models)}: give at least two, each of them once",
    )
    shares = averaging.scaled(weights, len(models))
    checkpoints = [hf.open_checkpoint(model) for model in models]
    config = averaging.mean_config([one.config for one in checkpoints], models)
    prompts = [
        prompt_fingerprint(Processor(load_tokenizer(one.folder), one.config)) for one in checkpoints
    ]
    for model, prompt in zip(models, prompts, strict=True):
        if prompt != prompts[0]:
            raise CheckpointError(
                f"{model} has another tokenizer than {models[0]}: only models that are alike have "
                "a mean"
            )
    dtypes = {one.dtype for one in checkpoints}
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else "float32")
    for note in averaging.left_out([one.config for one in checkpoints], config):
        print(note)
    _write(out, config, checkpoints[0], checkpoints, dict(zip(models, shares, strict=True)), dtype)


def _merge_steps(
    workdir: Path,
    stage: str,
    last: int | None,
    steps: tuple[int, ...],
    weights: tuple[float, ...],
    dtype: DType | None,
    out: Path,
) -> None:
    from puma_jax.training.averaging import open_steps

    found = open_steps(workdir, stage, last=last, steps=steps)
    shares = averaging.scaled(weights, len(found.steps))
    names = {f"step {step}": share for step, share in zip(found.steps, shares, strict=True)}
    _write(out, found.config, found.base, found.weights, names, dtype or found.dtype)


def _write(
    out: Path,
    config: ModelConfig,
    first: hf.Checkpoint,
    sources: Sequence[Source],
    shares: dict[str, float],
    dtype: DType,
) -> None:
    """Write the mean, and say what it is of; the folder appears whole, or not at all.

    Args:
        out: Folder to write.
        config: Config of the mean.
        first: The model whose tokenizer, and other fields of whose configs, are kept.
        sources: Weights of each model or checkpoint.
        shares: Name and weight of each.
        dtype: Dtype to write.
    """
    params = averaging.mean(config, sources, [*shares.values()], dtype)
    tokenizer = load_tokenizer(first.folder)
    with atomic_folder(out) as partial:
        Embedder(config, params, tokenizer, source=first.source).save(partial)
        write_json(partial / MANIFEST, {"mean_of": shares})
    said = ", ".join(f"{share:.4g} × {name}" for name, share in shares.items())
    print(f"{said}\nThe model, in {dtype}, is in {out}")


if __name__ == "__main__":
    cli.run(main)
