"""Errors for users: one line with the thing, the value found, what was expected, what to do."""

import re

# Control characters steer a terminal, marks of direction reorder what it shows, separators break
# the line, and lone surrogates, which stand for the bytes of names that are not UTF-8, cannot be
# encoded. Newlines and tabs are for the caller to judge.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_LONGEST_MESSAGE = 4000


def printable(text: str) -> str:
    r"""Return a text with all that would steer a terminal escaped; newlines and tabs stay.

    >>> print(printable("a\x1b[31m\u202e"))
    a\x1b[31m\u202e
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """Return a text as one line that is safe to print, and no longer than a screen."""
    line = printable(text[:_LONGEST_MESSAGE]).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(text) <= _LONGEST_MESSAGE else f"{line}..."


class PumaError(Exception):
    """Base of every error that puma_jax raises on purpose; entry points print it as one line."""

    in_all_processes = False
    """Whether all processes of a run raise it at the same place."""

    def __str__(self) -> str:
        """Return the message; names and values in it come from anywhere, and from libraries."""
        return one_line(super().__str__())


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


class LongTextError(ItemError):
    """A text of more tokens than the model reads, where it must not be truncated."""


class PackingError(PumaError):
    """An item that does not fit into the rows it should be packed in."""


class WorkerError(PumaError):
    """A process that did a part of the work has ended before its time."""


class DataError(PumaError):
    """A data file or record that does not follow the M-BEIR layout."""


class TrainingError(PumaError):
    """A training run that cannot continue, such as one whose loss is not finite."""


class EvaluationError(PumaError):
    """Vectors that cannot be evaluated: not finite, or not one for each item."""


class SearchError(PumaError):
    """A search that cannot be answered: its filter, its model, or the index does not fit."""


class VectorsError(PumaError):
    """A folder of vectors that is unfinished, damaged, or of another model or corpus."""
