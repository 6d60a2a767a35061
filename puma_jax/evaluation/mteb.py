"""Wrap an `Embedder` for mteb: `mteb.evaluate(MtebModel(embedder, ...), tasks)`.

mteb depends on torch, which nothing else here needs. It is an extra and imported only here:
`pip install -e '.[mteb]'` in the clone of puma_jax.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from puma_jax.data.prompts import normalize_text
from puma_jax.embedder import Embedder, RawItem
from puma_jax.errors import ConfigError, ItemError
from puma_jax.typing import AnyArray, Float, ndarray

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta

_Batch = Mapping[str, Sequence[Any]]
"""Columns "text" and "image", either or both; others are not read."""


class MtebModel:
    """An mteb encoder for texts, images, and images with text.

    Instructions are those of mteb's own `InstructSentenceTransformerModel`, so that results are
    comparable with the leaderboards:

    - A query has the prompt of its task, or of its type of task if the task has none. So has every
      text and image of a task without queries, such as STS or clustering.
    - A document has no instruction; its title precedes its text.
    - If each query has an instruction of its own (InstructIR, FollowIR), mteb appends it to the
      query's text, and the task's prompt still comes first.
    """

    def __init__(self, embedder: Embedder, name: str, revision: str | None = None):
        """Wrap an embedder.

        Args:
            embedder: Embedder to evaluate.
            name: "organization/model". mteb caches results by name and revision without looking at
                the weights: each checkpoint needs another name or revision.
            revision: Revision of the model, such as the checkpoint's step.

        Raises:
            ConfigError: mteb is not installed, or cannot use the name.
        """
        try:
            import mteb  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"mteb cannot be imported ({error}): run pip install -e '.[mteb]' in the clone "
                "of puma_jax"
            ) from error
        if "/" not in name:
            raise ConfigError(f'name "{name}" has no "/", expected organization/model')
        self.embedder = embedder
        self.name = name
        self.revision = revision

    @functools.cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """Metadata that mteb writes with the results; None for fields an embedder does not know."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        params = self.embedder.params
        leaves = jax.tree.leaves(params)
        return ModelMeta(
            loader=None,
            name=self.name,
            revision=self.revision,
            release_date=None,
            languages=None,
            n_parameters=sum(leaf.size for leaf in leaves),
            n_embedding_parameters=params.decoder.embedding.table[...].size,
            memory_usage_mb=sum(leaf.nbytes for leaf in leaves) / 2**20,
            max_tokens=self.embedder.config.prompt.max_text_tokens,
            embed_dim=self.embedder.embedding_dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image"],
        )

    def encode(
        self,
        inputs: Iterable[_Batch],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: str | None = None,
        show_progress_bar: bool = True,
        precision: str = "float32",
        **kwargs: Any,
    ) -> Float[ndarray, "n width"]:
        """Return one unit vector for each row of the batches, float32 and in their order.

        Args:
            inputs: A data loader of mteb, read when needed.
            task_metadata: Metadata of the task, which holds the instruction.
            hf_split: Split of the task, for error messages.
            hf_subset: Subset of the task, for error messages.
            prompt_type: "query", "document", or None for tasks without that distinction.
            show_progress_bar: Whether to show a progress bar if encoding takes more than a few
                seconds.
            precision: Precision of the vectors; only "float32".
            kwargs: Not used; the batch size is the embedder's own.

        Raises:
            ConfigError: `precision` is not "float32".
            ItemError: A batch has neither texts nor images.
            ImageError: An image cannot be read. mteb gives no ids: the message has the task, the
                split, queries or documents, and the number of the item, from 0.
        """
        if precision != "float32":
            raise ConfigError(f'precision is "{precision}", expected "float32"')
        try:
            return self.embedder.encode(
                (item for batch in inputs for item in _items(batch)),
                instruction=_instruction(task_metadata, prompt_type),
                progress=show_progress_bar,
            )
        except ItemError as error:
            side = getattr(prompt_type, "value", prompt_type)
            part = f"{task_metadata.name} {hf_subset} {hf_split}{f' {side}' if side else ''}"
            raise type(error)(f"{part}: {error}") from error

    def similarity(self, embeddings1: AnyArray, embeddings2: AnyArray) -> AnyArray:
        """Return the cosine similarities of all pairs of vectors, as a torch tensor."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: AnyArray, embeddings2: AnyArray) -> AnyArray:
        """Return the cosine similarities of vectors with the same index, as a torch tensor."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def _instruction(task: TaskMetadata, prompt_type: str | None) -> str | None:
    """Return the instruction for the items of a task; None for documents."""
    from mteb.abstasks.abstask import get_abstask_prompt

    if prompt_type == "document":
        return None
    prompt = task.prompt.get("query") if isinstance(task.prompt, dict) else task.prompt
    return prompt or get_abstask_prompt(task.name)


def _items(batch: _Batch) -> Iterator[RawItem]:
    """Yield the items of a batch."""
    columns = {name: batch[name] for name in ("text", "image") if name in batch}
    if not columns:
        raise ItemError(f"a batch has {sorted(batch)}, expected text or image")
    for row in zip(*columns.values(), strict=True):
        # If only some documents have an image, or a text, mteb fills the gaps with empty values.
        item = {
            name: value
            for name, value in zip(columns, row, strict=True)
            if value is not None and not (name == "text" and not normalize_text(value))
        }
        # Some corpora hold empty documents, which other models embed, too. They get the vector of
        # the full stop that ends every text.
        yield item or {"text": "."}
