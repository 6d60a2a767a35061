"""Every knob of a training run. A config file's `get_config()` returns a `TrainConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puma_jax.config import (
    ComputeConfig,
    ImageConfig,
    LoraConfig,
    PlanConfig,
    PromptConfig,
    require,
)
from puma_jax.data.mbeir.lines import OnBadRecord
from puma_jax.parallel.mesh import MeshConfig
from puma_jax.parallel.multihost import DistributedConfig


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss; see `puma_jax.losses`."""

    kind: Literal["info_nce", "mac", "mamcl"] = "info_nce"
    """Which negatives count, and how hard: all, by modality, of the target's modality only."""
    temperature: float = 0.05
    """Of all scores; of MAC-Loss, that of negatives of other modalities (tau_norm)."""
    decay: float = 0.5
    """MAC-Loss: how far the temperature of the target's modality falls until half time."""
    relative: bool = False
    """MAC-Loss: temperatures divide differences to the positive's score, not scores."""
    learn_temperature: bool = False
    """Train the temperature, from the one given."""
    mask_same_document: bool = False
    """Do not take the positive of another query for a negative if it is also one's own."""
    rows: int | None = None
    """Queries whose scores a device holds at a time; all of its own if not given. In a ring it is
    the edge of a tile, for which 256 to 512 is good."""
    over_devices: Literal["gather", "ring"] = "gather"
    """Where several devices share the loss, each holds all candidates, or those of one device at a
    time as they go round in a ring: for batches whose vectors and scores are too large."""


@dataclass(frozen=True)
class DistillConfig:
    """Layer-pruned self-distillation (arXiv 2507.08064, section 3.2)."""

    weight: tuple[float, float] = (0.0, 0.0)
    """Share of distillation in the loss, at the start and at the end; the rest is contrastive."""
    scale: float = 0.05
    """What the squared errors are multiplied with."""
    cached: bool = False
    """Compute the teacher's states of all items once, ahead, in place of in every step."""

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return max(self.weight) > 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine with a warm-up (arXiv 2507.08064)."""

    learning_rate: float = 2e-4
    """At its peak."""
    first_layer: float = 1.0
    """What the rate of the decoder's first layer is multiplied with."""
    warmup: float = 0.03
    """Fraction of the steps in which the rate rises."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-7
    weight_decay: float = 0.0
    """Of matrices; biases, norms and the temperature do not decay."""
    clip: float = 1.0
    """The global norm of gradients is cut at this."""


@dataclass(frozen=True)
class StageConfig:
    """One stage: from the weights it starts with to those it hands on."""

    steps: int = 0
    """How many steps; 0 counts epochs."""
    epochs: float = 0.0
    model: str | None = None
    """Hugging Face folder or hub id to start from; the stage before, or from scratch, if none."""
    keep_layers: str = ""
    """Layers of the decoder to keep, "12" for the first so many, or indices such as "0-10,27"; all
    of them if empty. With distillation, those that are cut stay on as the teacher."""
    root: Path | None = None
    """Benchmark in M-BEIR layout to train on; the run's if not given."""
    plan: PlanConfig = PlanConfig()
    chunks: int = 1
    """Parts of a batch that go through the model one after the other (GradCache,
    arXiv 2101.06983). Memory is that of one part; with more than one, each is computed twice. A
    batch that does not fit into the rows of so many takes more of them, and the log says so."""
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    train: Literal["lora", "full"] = "lora"
    """Adapters on the decoder's linears, or all of the decoder."""
    vision: bool = False
    """Train the vision tower too."""
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        """Check what would otherwise fail far from here."""
        require(
            (self.steps > 0) != (self.epochs > 0),
            f"a stage has steps {self.steps} and epochs {self.epochs}: give one of them",
        )
        require(self.chunks >= 1, f"chunks {self.chunks} must be at least 1")


@dataclass(frozen=True)
class ScratchConfig:
    """A small Qwen2-VL that starts from random weights and a vocabulary of its own data."""

    vocab_size: int
    """Rows of the token table, special tokens and [RET] among them."""
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vision_width: int
    vision_layers: int
    vision_heads: int


@dataclass(frozen=True)
class DataConfig:
    """Where data come from and who prepares them."""

    root: Path
    """Folder in M-BEIR layout."""
    built: Path | None = None
    """What `python -m puma_jax.data.builder` made of it; built in the workdir if not given."""
    on_bad_record: OnBadRecord = "error"
    """Stop at an image that cannot be decoded, or leave its pair out of the loss."""
    workers: int = 0
    """Processes that make batches; 0 makes them in threads of this one."""


@dataclass(frozen=True)
class EvaluationConfig:
    """When, and on how much, the model is measured."""

    every: int = 0
    """Steps between evaluations on a subset; 0 for none but those at the end of stages."""
    split: str = "val"
    """The split whose subset is used while training."""
    queries: int = 50
    """Of each set, while training."""
    documents: int = 500
    """Of each pool, while training."""
    final: str = "test"
    """The split that finished stages are measured on, with whole pools."""
    final_stages: tuple[str, ...] = ()
    """Stages that are measured when they end; the last one always is."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How often a run is saved."""

    every: int = 500
    """Steps."""
    keep: int = 2
    """The latest so many are kept."""


@dataclass(frozen=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between lines of metrics."""
    tensorboard: bool = True
    wandb: str | None = None
    """Project of Weights & Biases to log to."""
    profile: tuple[int, int] | None = None
    """First and last step of every stage to trace, for XProf or Perfetto, into profile/."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    data: DataConfig
    stages: dict[str, StageConfig]
    seed: int = 0
    scratch: ScratchConfig | None = None
    images: ImageConfig = ImageConfig()
    prompt: PromptConfig = PromptConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        """Check that there is something to start from, and something to do."""
        require(bool(self.stages), "a run needs at least one stage")
        first = next(iter(self.stages))
        require(
            self.scratch is not None or self.stages[first].model is not None,
            f"stage {first} has no model to start from: set stages.{first}.model or scratch",
        )
