"""Errors for users: one line with the thing, the value found, what was expected, what to do."""


class PumaError(Exception):
    """Base of every error that puma_jax raises on purpose; entry points print it as one line."""

    in_all_processes = False
    """Whether all processes of a run raise it at the same place."""


class ConfigError(PumaError):
    """A setting, or a combination of settings, that cannot be run."""


class ArtifactError(PumaError):
    """A file or folder of ours that is another job's, cannot be written, or cannot be read."""


class CheckpointError(PumaError):
    """A model folder that is missing, truncated, or does not hold what its config says."""


class UnknownModelError(CheckpointError):
    """A `model_type` that no family in `puma_jax.model.families` handles."""


class LayerSelectionError(PumaError):
    """A choice of decoder layers that is empty or names a layer the model does not have."""


class AttentionError(PumaError):
    """An attention implementation that is unknown, or not available on this machine."""


class ItemError(PumaError):
    """An item to embed that has neither text nor image, or fields of the wrong kind."""


class ImageError(ItemError):
    """An image that cannot be opened, decoded, or resized within the model's limits."""


class PackingError(PumaError):
    """An item that does not fit into the rows it should be packed in."""


class DataError(PumaError):
    """A data file or record that does not follow the M-BEIR layout."""


class TrainingError(PumaError):
    """A training run that cannot continue, such as one whose loss is not finite."""


class EvaluationError(PumaError):
    """Vectors that cannot be evaluated: not finite, or not one for each item."""


class VectorsError(PumaError):
    """A folder of vectors that is unfinished, damaged, or of another model or corpus."""
