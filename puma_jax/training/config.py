"""The config of a training run: a config file's `get_config()` returns a `TrainConfig`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from puma_jax.config import (
    ComputeConfig,
    ImageConfig,
    LoraConfig,
    PlanConfig,
    PromptConfig,
    require,
    require_ascending,
)
from puma_jax.data.lines import OnBadRecord
from puma_jax.parallel.mesh import MeshConfig
from puma_jax.parallel.multihost import DistributedConfig
from puma_jax.schema import Count, CountOrZero, Fraction, NotNegative, Positive, Range, check

RESERVED = frozenset(
    {"base", "checkpoints", "config", "data", "metrics", "profile", "results", "stages", "teacher"}
    | {"tensorboard", "wandb"}
)
"""Names in a workdir that no stage may have; a stage's model has the name of the stage."""

Steps = Annotated[int, Range(0, 2**31 - 1)]
"""A number of steps: a step is counted in 32 bits."""
Size = Annotated[int, Range(1, 2**20)]
"""A size of a model from scratch."""
DecayRate = Annotated[float, Range(0, 1, open_high=True)]
"""Decay rate of a moving average."""


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss of a stage; see `puma_jax.losses`."""

    kind: Literal["info_nce", "mac", "mamcl"] = "info_nce"
    """Loss function: "info_nce" takes every other candidate as a negative, "mac" (MAC-Loss) gives
    negatives of the target's modality a temperature of their own, "mamcl" keeps only those."""
    temperature: Positive = 0.05
    """Temperature that divides all scores; in MAC-Loss, tau_norm, the temperature of negatives of
    other modalities."""
    decay: NotNegative = 0.5
    """How far tau_hard of MAC-Loss falls: tau_norm · exp(-decay) from the middle of training on."""
    relative: bool = False
    """Divide differences to the positive's score by the temperatures of MAC-Loss, in place of the
    scores themselves."""
    learn_temperature: bool = False
    """Train the temperature, starting from `temperature`."""
    mask_same_document: bool = False
    """Leave another query's positive out of the negatives if it is the query's own document, told
    by text and image, not by id."""
    mask_margin: NotNegative | None = None
    """Leave out negatives whose cosine exceeds that of the query's positive by more than this, as
    likely answers; None keeps all, and 0.1 is the value of Qwen3-Embedding (arXiv 2506.05176)."""
    widths: tuple[Count, ...] = ()
    """Narrower widths that vectors are trained for, too (Matryoshka, arXiv 2205.13147): for each,
    the loss of the first values of all vectors, scaled to length 1, is added."""
    width_weights: tuple[Positive, ...] = ()
    """Weight of the loss of each of `widths`; that of the whole width is 1. Empty takes 1 for all
    of them."""
    exit_layers: tuple[Count, ...] = ()
    """Numbers of first layers that the model is trained for, too: for each, the loss that the model
    with only these layers has, at all widths, is added. There is one forward pass for all."""
    exit_weights: tuple[Positive, ...] = ()
    """Weight of the loss of each of `exit_layers`; that of all layers is 1. Empty takes 1 for all
    of them."""
    chunk_size: Count | None = None
    """Queries whose scores a device holds at a time; None holds those of all its queries. In a
    ring it is the edge of a tile, and 256 to 512 is a good size."""
    cross_device: Literal["gather", "ring"] = "gather"
    """How devices compare their vectors: "gather" holds all candidates on each device, "ring"
    passes them from device to device, for batches whose vectors and scores are too large."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "loss")
        for name, weights in (("widths", "width_weights"), ("exit_layers", "exit_weights")):
            numbers, given = getattr(self, name), getattr(self, weights)
            require_ascending(numbers, f"loss.{name}")
            require(
                len(given) in (0, len(numbers)),
                f"loss.{weights} {list(given)} must have one weight for each of loss.{name} "
                f"{list(numbers)}, or be empty",
            )


@dataclass(frozen=True)
class DistillConfig:
    """Layer-pruned self-distillation (arXiv 2507.08064, section 3.2)."""

    weight: tuple[Fraction, Fraction] = (0.0, 0.0)
    """Weight of distillation in the loss at the first and the last step, from 0 to 1; the rest is
    contrastive. Two zeros train without a teacher."""
    scale: NotNegative = 0.05
    """Factor that multiplies the squared errors, or the divergence."""
    target: Literal["states", "similarities"] = "states"
    """The student learns "states", the pooled states of the teacher, by squared error, as in the
    paper, or "similarities", its softmax over all candidates of the batch for each query, by the
    Kullback-Leibler divergence (SEED, arXiv 2101.04731)."""
    items: Literal["pairs", "candidates"] = "pairs"
    """The student learns the states of "pairs", queries and candidates, as in the paper, or of
    "candidates" alone. These are far fewer where queries come with several prompts, so that
    `cached` computes them in a short time."""
    temperature: Positive = 0.05
    """Temperature that divides the cosines of both models if similarities are distilled."""
    cached: bool = False
    """Compute the teacher's states once before training, those of every query with every prompt and
    of every candidate that steps may draw, and not in every step."""

    def __post_init__(self) -> None:
        """Check the ranges, and that similarities have queries."""
        check(self, "distill")
        require(
            self.target == "states" or self.items == "pairs",
            f'distill.items "{self.items}" with distill.target "similarities", which compares '
            'queries with candidates: expected "pairs"',
        )

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return max(self.weight) > 0


@dataclass(frozen=True)
class ScoreDistillConfig:
    """Distillation of a teacher's scores, which `python -m puma_jax.score` writes into the data."""

    weight: NotNegative = 0.0
    """Weight of the cross-entropy between the teacher's and the model's softmax over the positive
    and the hard negatives of a query; it is added to the rest of the loss. 0 turns it off."""
    temperature: Positive = 0.05
    """Temperature that divides the model's cosines."""
    teacher_temperature: Positive = 0.05
    """Temperature that divides the teacher's scores: cosines of an embedder, or logits of a
    reranker, which are some twenty times as large."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "score_distill")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warmup and cosine decay (arXiv 2507.08064)."""

    kind: Literal["adamw", "muon"] = "adamw"
    """"muon" gives the kernels of linears updates whose singular values are all about 1, with the
    root mean square of AdamW's, so that a learning rate fits both; embeddings, biases, norms and
    adapters keep AdamW."""
    learning_rate: Positive = 2e-4
    """Peak learning rate, reached at the end of warmup."""
    first_layer_lr_scale: NotNegative = 1.0
    """Factor on the learning rate of the decoder's first layer."""
    warmup_ratio: Fraction = 0.03
    """Fraction of the steps over which the learning rate rises."""
    beta1: DecayRate = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: DecayRate = 0.98
    """Decay rate of AdamW's second moment."""
    eps: Positive = 1e-7
    """Constant in the denominator of AdamW's update."""
    momentum: DecayRate = 0.95
    """Decay rate of Muon's momentum."""
    weight_decay: NotNegative = 0.0
    """Weight decay of matrices; biases, norms and the temperature do not decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm if theirs is larger."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "optimizer")


@dataclass(frozen=True)
class StageConfig:
    """One stage: from the weights it starts with to the model it saves."""

    steps: Steps | None = None
    """Optimizer steps; None or 0 trains for `epochs` instead. If neither is above 0, nothing is
    trained: the stage's model is the one it starts from, with the layers that it keeps."""
    epochs: Annotated[float, Range(0, 1e6)] | None = None
    """Passes over the training pairs; None or 0 trains for `steps` instead."""
    model: str | None = None
    """Hugging Face folder or hub id to start from; None takes the model of the stage before, or
    for the first stage the one made from scratch."""
    init_from: str | None = None
    """Earlier stage whose model to start from, such as one that several stages continue; None takes
    the stage before."""
    adapter: str | None = None
    """PEFT folder or hub id of an adapter on `model`. If adapters are trained, this one is trained
    further, with the rank, alpha and targets it has; otherwise it is merged first."""
    keep_layers: str = ""
    """Decoder layers to keep: "12" for the first twelve, or indices such as "0-10,27"; empty keeps
    all. With distillation, the removed layers remain as part of the teacher."""
    data_root: Path | None = None
    """Benchmark in M-BEIR layout to train on; None takes data.root."""
    plan: PlanConfig = PlanConfig()
    grad_cache_chunks: Annotated[int, Range(1, 2**16)] = 1
    """Parts of a batch that go through the model one after the other (GradCache,
    arXiv 2101.06983). Activation memory is that of one part; from 2 on, the forward pass of each
    part runs twice. A batch that does not fit into the rows of so many takes more, and the log says
    so."""
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    score_distill: ScoreDistillConfig = ScoreDistillConfig()
    trainable: Literal["lora", "full"] = "lora"
    """Weights to train: "lora" trains adapters on the decoder's linears, "full" the decoder."""
    train_vision: bool = False
    """Train the vision tower too."""
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        """Check the ranges, and that the length of training is given once."""
        check(self, "stage")
        require(
            not (self.steps and self.epochs) and (self.steps, self.epochs) != (None, None),
            f"a stage has steps {self.steps} and epochs {self.epochs}: give one of them, or 0 to "
            "train nothing",
        )
        require(
            not self.score_distill.weight or self.plan.hard_negatives > 0,
            f"stage.score_distill.weight {self.score_distill.weight} needs plan.hard_negatives "
            "above 0: a teacher's scores are those of a positive and of hard negatives",
        )
        require(
            not self.distill.on
            or self.distill.target == "states"
            or self.loss.cross_device == "gather",
            'stage.distill.target "similarities" compares each query with all candidates: it needs '
            'stage.loss.cross_device "gather"',
        )
        require(
            self.init_from is None or self.model is None,
            f"stage.init_from {self.init_from} and stage.model {self.model} exclude each other: a "
            "stage starts from one model",
        )
        require(
            self.adapter is None or self.model is not None,
            f"stage.adapter {self.adapter} needs stage.model, the model that it is on",
        )
        require(
            self.adapter is None or not (self.trains_lora and self.distill.on),
            f"stage.adapter {self.adapter} cannot be trained further with distillation: its "
            "teacher would lack it; merge it first, with python -m puma_jax.export huggingface",
        )

    @property
    def trains(self) -> bool:
        """Whether the stage has steps."""
        return bool(self.steps or self.epochs)

    @property
    def trains_lora(self) -> bool:
        """Whether the stage has steps that train adapters."""
        return self.trains and self.trainable == "lora"


@dataclass(frozen=True)
class ScratchConfig:
    """A small Qwen2-VL with random weights and a tokenizer trained on the benchmark's texts."""

    vocab_size: Size
    """Entries of the vocabulary, special tokens and [RET] included."""
    width: Size
    """Hidden size of the decoder."""
    layers: Annotated[int, Range(1, 1024)]
    """Decoder layers."""
    heads: Size
    """Attention heads of the decoder."""
    kv_heads: Size
    """Key and value heads of the decoder."""
    mlp_width: Size
    """Hidden size of the decoder's MLP."""
    vision_width: Size
    """Hidden size of the vision tower."""
    vision_layers: Annotated[int, Range(1, 1024)]
    """Blocks of the vision tower."""
    vision_heads: Size
    """Attention heads of the vision tower."""

    def __post_init__(self) -> None:
        """Check the ranges, and that heads divide what they share."""
        check(self, "scratch")
        require(
            self.width % (2 * self.heads) == 0,
            f"scratch.width {self.width} must be a multiple of 2 × scratch.heads {self.heads}",
        )


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    root: Path
    """Benchmark in M-BEIR layout to train and evaluate on."""
    built: Path | None = None
    """Folder that `python -m puma_jax.data.builder` wrote for data.root; None builds the data in
    the workdir."""
    on_bad_record: OnBadRecord = "error"
    """"error" stops at a bad record, "skip" leaves it out: of the built data, or if its image
    cannot be decoded, of the loss."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "data")


@dataclass(frozen=True)
class EvaluationConfig:
    """When the model is evaluated, and on how much data."""

    every_steps: CountOrZero = 0
    """Steps between evaluations on a subset while training; 0 evaluates only finished stages."""
    split: str = "val"
    """Split that is evaluated while training."""
    max_queries: Count = 50
    """Queries of each set that are evaluated while training."""
    max_candidates: Count = 500
    """Candidates of each local pool while training; the positives of the chosen queries are
    always added."""
    final_split: str = "test"
    """Split that finished stages are evaluated on, with whole pools."""
    final_stages: tuple[str, ...] = ()
    """Stages that are evaluated when they end; the last stage always is."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "evaluation")


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved, and how many checkpoints remain."""

    every_steps: Count = 500
    """Steps between checkpoints; the last step of a stage is always saved."""
    max_to_keep: Count = 2
    """Latest checkpoints of a stage to keep; older ones are deleted. If the latest is damaged, the
    one before it is used."""
    keep_finished: bool = False
    """Keep the checkpoints of a stage when it is finished, for `python -m puma_jax.merge`."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "checkpoint")


@dataclass(frozen=True)
class LogConfig:
    """Metrics and traces that are written while training."""

    every_steps: Count = 10
    """Steps between records of metrics; the last step of a stage is always recorded."""
    tensorboard: bool = True
    """Write metrics for TensorBoard, too, into tensorboard/ of the workdir."""
    wandb: str | None = None
    """Weights & Biases project to log metrics to; None logs to none."""
    profile: tuple[Count, Count] | None = None
    """First and last step of every stage to trace, for XProf or Perfetto, into profile/ of the
    workdir; None traces nothing."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self, "log")
        require(
            self.profile is None or self.profile[0] <= self.profile[1],
            f"log.profile {self.profile} must be a first and a last step",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run."""

    data: DataConfig
    stages: dict[str, StageConfig]
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Seed of random weights, dropout and the order of the data; it is added to the plan's seed."""
    scratch: ScratchConfig | None = None
    """Model to make from scratch, for a first stage that names no model."""
    images: ImageConfig | None = None
    """Limits on image sizes; None takes those that come with the model, or for a model from scratch
    the defaults."""
    prompt: PromptConfig | None = None
    """Prompt around an item; None takes the one that comes with the model, likewise."""
    causal: bool | None = None
    """Whether a token attends only to those before it; None takes what the model does. False trains
    a model whose tokens attend to their whole item, for `prompt.pooling` "mean"."""
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        """Check names and ranges, and that there is something to start from."""
        check(self)
        require(bool(self.stages), "a run needs at least one stage")
        for name in self.stages:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) is not None,
                f"stage {name!r} must have a name of letters, digits, _ and -, at most 64 of them",
            )
            require(
                name.lower() not in RESERVED,
                f"stage {name} has the name of another part of a workdir: none may be called "
                f"{', '.join(sorted(RESERVED))}",
            )
            require(
                self.causal is not False or not self.stages[name].distill.on,
                f"causal false in stage {name} with distillation: the teacher would attend to "
                "later tokens, which it never learned; leave out one of the two",
            )
        folded = [name.lower() for name in self.stages]
        twice = [name for name in self.stages if folded.count(name.lower()) > 1]
        require(not twice, f"stages {', '.join(twice)} differ only in upper and lower case")
        for name in self.evaluation.final_stages:
            require(
                name in self.stages,
                f"evaluation.final_stages names {name}, which is not one of the stages "
                f"{', '.join(self.stages)}",
            )
        names = list(self.stages)
        for place, (name, stage) in enumerate(self.stages.items()):
            require(
                stage.init_from is None or stage.init_from in names[:place],
                f"stages.{name}.init_from {stage.init_from} is not a stage before it: "
                f"{', '.join(names[:place]) or 'there is none'}",
            )
        first = names[0]
        require(
            self.scratch is not None or self.stages[first].model is not None,
            f"stage {first} has no model to start from: set stages.{first}.model or scratch",
        )

    def stage_before(self, name: str) -> str | None:
        """Return the stage whose model a stage starts from.

        Args:
            name: Name of the stage.

        Returns:
            None if the stage names a model, or is the first one and starts from scratch.
        """
        stage, names = self.stages[name], list(self.stages)
        if stage.model is not None or name == names[0]:
            return None
        return stage.init_from or names[names.index(name) - 1]
