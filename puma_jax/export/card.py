"""The model card: description, layers, training, results and license of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, DataError
from puma_jax.evaluation.report import Evaluation, markdown
from puma_jax.files import read_json, read_object
from puma_jax.model.families import family_of
from puma_jax.model.tree import named_leaves

_PAPER = "https://arxiv.org/abs/2507.08064"
_LOAD = {
    "huggingface": """from puma_jax import Embedder

model = Embedder.load("{folder}")
vectors = model.encode([{{"text": "a red bicycle"}}, {{"image": "bike.jpg"}}])""",
    "stablehlo": """# In this folder; pip install jax flatbuffers safetensors tokenizers pillow
from load import Embedder

vectors = Embedder().encode([{{"text": "a red bicycle"}}, {{"image": "bike.jpg"}}])""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
vectors = model.encode([{{"text": "a red bicycle"}}, {{"image": "bike.jpg"}}])""",
}
_READ_IMAGES = (
    "The EXIF orientation is applied, transparent pixels are put on white, and gray of 16 bits "
    "keeps its high byte. Color profiles are not applied."
)
_IMAGES = {
    "huggingface": f"{_READ_IMAGES} This holds for puma_jax; other software has rules of its own.",
    "stablehlo": _READ_IMAGES,
    "sentence-transformers": "The model was trained on upright images with transparent pixels on "
    "white. Of a path, Sentence Transformers applies the EXIF orientation and drops an alpha "
    "channel; of a PIL image, it does neither, and puts transparent pixels on white. "
    "`ImageOps.exif_transpose(Image.open(path))`, with both names from PIL, is read as in "
    "training. Bring gray images of 16 bits to 8 bits first, or they turn white.",
}
"""How each kind of export reads images."""
_VERIFICATION = "## Verification"


@dataclass(frozen=True)
class Loss:
    """The part of a stage's loss that a card tells."""

    kind: str
    temperature: float
    relative: bool


@dataclass(frozen=True)
class Distillation:
    """The part of a stage's distillation that a card tells."""

    weight: tuple[float, float]


@dataclass(frozen=True)
class Optimizer:
    """The part of a stage's optimizer that a card tells."""

    learning_rate: float


@dataclass(frozen=True)
class Plan:
    """The part of a stage's plan that a card tells."""

    batch_size: int


@dataclass(frozen=True)
class Stage:
    """The part of a training stage that a card tells.

    No field has a default: what an older version has not recorded is not made up.
    """

    model: str | None
    init_from: str | None
    keep_layers: str
    loss: Loss
    distill: Distillation
    trainable: str
    train_vision: bool
    steps: int | None
    epochs: float | None
    plan: Plan
    optimizer: Optimizer


@dataclass(frozen=True)
class Run:
    """The part of the config.json of a training run that a card tells."""

    seed: int
    stages: dict[str, Stage]


@dataclass(frozen=True)
class Training:
    """Record of the training of a model: one stage of a run of `puma_jax.train`."""

    run: Run
    stage: str
    evaluation: Evaluation | None

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that made the model, by name, from the last one that names a base model."""
        names = list(self.run.stages)
        made = [self.stage]
        while (first := self.run.stages[made[0]]).model is None and made[0] != names[0]:
            made.insert(0, first.init_from or names[names.index(made[0]) - 1])
        return {name: self.run.stages[name] for name in made}

    @property
    def base(self) -> str | None:
        """The model that training started from; None if it was random weights."""
        return next(iter(self.stages.values())).model


@dataclass(frozen=True)
class _StageResults:
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Results:
    """The part of the results.json of a training run that a card tells."""

    stages: dict[str, _StageResults]


def training_of(model: Path) -> Training | None:
    """Return how a model was trained, if its folder lies in the workdir of the run.

    Raises:
        ConfigError: The files of the run are damaged, or of another version of puma_jax.
    """
    path = model.absolute().parent / "config.json"
    if not path.is_file():
        return None
    advice = f"copy {model} out of its workdir to export it without a record of its training"
    try:
        stages = read_json(path, error=ConfigError).get("stages")
        if not isinstance(stages, dict) or model.name not in stages:
            return None  # what lies above is no run, or not the run of this model
        run = read_object(path, Run, error=ConfigError, unknown="ignore")
        return Training(run, model.name, _evaluation_of(model))
    except (ConfigError, DataError) as error:
        raise ConfigError(
            f"{error}: the file is damaged, or of another version of puma_jax; {advice}"
        ) from None


def _evaluation_of(model: Path) -> Evaluation | None:
    """Return the results of a model in its run; None if the run has none, or is not finished."""
    path = model.absolute().parent / "results.json"
    if not path.is_file():
        return None
    results = read_object(path, _Results, error=ConfigError, unknown="ignore")
    found = results.stages.get(model.name)
    if found is None or found.evaluation is None:
        return None
    try:
        return Evaluation.from_json(found.evaluation)
    except DataError as error:
        raise ConfigError(f"{path}: {error}") from None


def model_card(
    embedder: Embedder,
    kind: str,
    name: str,
    *,
    license_name: str | None = None,
    training: Training | None = None,
    evaluation: Evaluation | None = None,
) -> str:
    """Return a model card in markdown, with the header that model hubs read.

    Args:
        embedder: Model that the card describes.
        kind: Format of the export.
        name: Name of the model.
        license_name: SPDX name of the license; by default the card refers to the base model.
        training: Record of its training, if known.
        evaluation: Results of the model; by default those of the training run.
    """
    if evaluation is None and training is not None:
        evaluation = training.evaluation
    base = training.base if training else None
    composed = family_of(embedder.config.family).backbone_architecture is None
    huggingface = "puma_jax" if composed else "transformers"
    header = {
        "library_name": {"huggingface": huggingface, "stablehlo": "jax"}.get(kind, kind),
        "pipeline_tag": "feature-extraction",
        "license": license_name.lower() if license_name else "other",
        **({"base_model": base} if base else {}),
    }
    sections = [
        "\n".join(["---", *(f"{key}: {value}" for key, value in header.items()), "---"]),
        f"# {name}",
        _what_it_is(embedder),
        f"```python\n{_LOAD[kind].format(folder=name)}\n```",
        f"**Images.** {_IMAGES[kind]}",
        _training(training) if training else "",
        _results(evaluation) if evaluation else "",
        f"## License\n\n{_license(license_name, base, training)}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def with_verification(card: str, table: str) -> str:
    """Return a card with the table of `puma_jax.verify`, in place of an older one.

    Args:
        card: The card in markdown.
        table: What the command prints.
    """
    before, _, rest = card.partition(f"{_VERIFICATION}\n")
    after = rest.partition("\n## ")
    text = (
        "Largest differences from puma_jax in float32 on its golden items, by "
        f"`python -m puma_jax.verify`:\n\n{table}"
    )
    kept = f"## {after[2].strip()}" if after[2] else ""
    return "\n\n".join(filter(None, [before.strip(), kept, f"{_VERIFICATION}\n\n{text}"])) + "\n"


def _what_it_is(embedder: Embedder) -> str:
    config = embedder.config
    parameters = sum(leaf.size for leaf in named_leaves(embedder.params).values())
    kept = ", ".join(map(str, config.kept_layers))
    return (
        f"One vector of {embedder.embedding_dim} values for a text, an image, or an image with a "
        "text; the inner product of two is their similarity. "
        f"{parameters / 1e6:,.2f} M parameters, family `{config.family}`, made with "
        f"puma_jax after [PUMA]({_PAPER}).\n\n"
        f"**Layers.** Decoder layers kept from the base model, counted from 0: {kept}.\n\n"
        f"{_exits(embedder)}"
        f"{_widths(embedder)}"
        f"**Limits.** Texts of up to {config.prompt.max_text_tokens} tokens, images of "
        f"{config.images.min_pixels:,} to {config.images.max_pixels:,} pixels after resizing. "
        f"{_visual_tokens(config.images)}"
        f"Positions: {config.prompt.positions}. Prompt: {config.prompt.template}, "
        f"{_pooling(config.prompt)}."
    )


def _exits(embedder: Embedder) -> str:
    """Return the paragraph on the depths that a model was trained for; "" if it was for one."""
    if not embedder.config.exit_layers:
        return ""
    exits = ", ".join(map(str, embedder.config.exit_layers))
    return (
        f"**Depths.** Trained for its first {exits} layers alone, too: "
        "`Embedder.load(...).keep_layers(n)`.\n\n"
    )


def _widths(embedder: Embedder) -> str:
    """Return the paragraph on the widths that a model was trained for; "" if it was for none."""
    if not embedder.config.widths:
        return ""
    widths = ", ".join(map(str, embedder.config.widths))
    return (
        f"**Widths.** Trained for the first {widths} values of a vector, too, scaled to length 1 "
        "(Matryoshka).\n\n"
    )


def _visual_tokens(images: ImageConfig) -> str:
    """Return how visual tokens are pooled; "" if they are not."""
    if images.spatial_pool_stride == 1:
        return ""
    side = images.spatial_pool_stride
    becomes = {"average": "their mean", "random": "one of them, drawn by the image's content"}
    return (
        f"Each {side} × {side} visual tokens become {becomes[images.spatial_pool_mode]}, which "
        "transformers and vLLM do not do. "
    )


def _pooling(prompt: PromptConfig) -> str:
    """Return which states of an item are its vector."""
    return {
        "ret": f"pooled at `{prompt.ret_token}`",
        "last": "pooled at its last token",
        "mean": "pooled by the mean over all tokens",
    }[prompt.pooling]


def _training(training: Training) -> str:
    rows = []
    for name, stage in training.stages.items():
        share = stage.distill.weight
        rows.append(
            [
                name,
                stage.keep_layers or "all",
                stage.loss.kind + (", relative" if stage.loss.relative else ""),
                str(stage.loss.temperature),
                f"{share[0]:g} → {share[1]:g}" if max(share) > 0 else "–",
                stage.trainable + (" + vision" if stage.train_vision else ""),
                str(stage.steps or f"{stage.epochs or 0:g} epochs"),
                str(stage.plan.batch_size),
                f"{stage.optimizer.learning_rate:g}",
            ]
        )
    header = ["stage", "layers", "loss", "temperature", "distillation", "trained", "steps"]
    table = markdown([*header, "batch", "rate"], rows)
    start = f"`{training.base}`" if training.base else "random weights"
    return f"## Training\n\nFrom {start}, seed {training.run.seed}.\n\n{table}"


def _results(evaluation: Evaluation) -> str:
    return (
        f"## Results\n\n{evaluation.table()}\n\nSplit {evaluation.split}, hits in per cent with "
        "95 % bootstrap intervals: in the set's own pool, and in that of all sets."
    )


def _license(name: str | None, base: str | None, training: Training | None) -> str:
    if name:
        return f"{name}."
    if base:
        return f"The weights come from `{base}`: its license holds for them."
    if training:
        return "Trained from random weights, under no named license."
    return "Not named. If the weights come from a base model, its license holds for them."
