"""Reranker: scores pairs of a query and a document, each a text, images or both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open

from puma_jax.config import ComputeConfig, DType, ImageConfig, PromptConfig
from puma_jax.data.items import Item
from puma_jax.data.pairs import PairProcessor, Side
from puma_jax.data.preparing import prepare, read_patches, run
from puma_jax.data.raw_items import RawItem, checked
from puma_jax.embedder import Embedder
from puma_jax.errors import CheckpointError, ItemError
from puma_jax.files import sha256_of
from puma_jax.model import hf
from puma_jax.model.families import CONFIG_KEY, family_of
from puma_jax.typing import Float, ndarray

Pair = tuple[RawItem | str, RawItem | str]
"""A query and a document; the instruction of the query, if it has one, is that of the pair."""

_TABLE, _HEAD = "decoder.embedding.table", "lm_head.weight"


class Reranker:
    """Scores how well documents answer queries, as Qwen3-VL-Reranker does."""

    def __init__(self, embedder: Embedder, direction: Float[ndarray, "width"]):
        """Wrap a model; most callers want `Reranker.load`.

        Args:
            embedder: The model, whose prompt and pooling are not used.
            direction: Row of the head for "yes" less that for "no".
        """
        self._embedder = embedder
        self._direction = direction.astype(np.float64)
        self._processor = PairProcessor(embedder.tokenizer, embedder.config)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: DType | None = "bfloat16",
        compute: ComputeConfig | None = None,
        images: ImageConfig | None = None,
        mesh: Mesh | None = None,
    ) -> Reranker:
        """Open a reranker, such as "Qwen/Qwen3-VL-Reranker-2B".

        Args:
            source: Hugging Face folder or hub id.
            dtype: Dtype of weights and activations; None keeps the dtype of the files.
            compute: How to run; the default takes its dtype from `dtype`.
            images: Limits on image sizes; None takes 4 to 1,800 visual tokens.
            mesh: Devices that share the work, from `parallel.mesh.make_mesh`.

        Raises:
            ConfigError: `dtype` is not supported.
            CheckpointError: The folder does not hold a whole model, or one that is no reranker.
            UnknownModelError: No family supports its model_type.
        """
        checkpoint = hf.open_checkpoint(source)
        config = checkpoint.config
        published = family_of(config.family).embedder
        if published is None:
            raise CheckpointError(
                f"{source} is of family {config.family}, expected one with published rerankers, "
                "qwen3_vl"
            )
        if CONFIG_KEY in checkpoint.source.model or config.prompt.pooling == "last":
            raise CheckpointError(f"{source} is an embedder, expected a reranker: use Embedder")
        embedder = Embedder.load(
            source,
            dtype=dtype,
            compute=compute,
            images=images or published.configure(config).images,
            prompt=PromptConfig(template="instruct", pooling="last"),
            mesh=mesh,
        )
        processor = PairProcessor(embedder.tokenizer, embedder.config)
        yes, no = (_head_row(checkpoint, token) for token in (processor.yes, processor.no))
        return cls(embedder, yes - no)

    def score(
        self,
        query: RawItem | str,
        documents: Iterable[RawItem | str],
        *,
        instruction: str | None = None,
        tokens_per_chunk: int | None = None,
        progress: bool = True,
    ) -> Float[ndarray, "n"]:
        """Return how well each document answers a query, between 0 and 1; see `score_pairs`."""
        if isinstance(documents, str | dict):
            raise ItemError("score takes a list of documents and was given a single one")
        return self.score_pairs(
            ((query, document) for document in documents),
            instruction=instruction,
            tokens_per_chunk=tokens_per_chunk,
            progress=progress,
        )

    def score_pairs(
        self,
        pairs: Iterable[Pair],
        *,
        instruction: str | None = None,
        tokens_per_chunk: int | None = None,
        progress: bool = True,
    ) -> Float[ndarray, "n"]:
        """Return the score of each pair of a query and a document, between 0 and 1.

        It is sigmoid(h · (W[yes] − W[no])): h is the state of the last token after the final norm,
        W the head of the model. Pairs are packed into rows; no score depends on the other pairs,
        except for rounding.

        Args:
            pairs: Any number of pairs, read as they are needed.
            instruction: What queries without an instruction of their own ask for; a default that
                the published model was trained with if None.
            tokens_per_chunk: See `Embedder.encode`.
            progress: Whether to show a progress bar if the work takes more than two seconds.

        Raises:
            ItemError: A side of a pair has neither text nor image, or a field of the wrong kind.
            ImageError: An image cannot be read.
            EvaluationError: A state is not finite.
        """
        logits = self.logits(
            pairs, instruction=instruction, tokens_per_chunk=tokens_per_chunk, progress=progress
        )
        return np.exp(-np.logaddexp(0, -logits)).astype(np.float32)

    def logits(
        self,
        pairs: Iterable[Pair | Item],
        *,
        instruction: str | None = None,
        tokens_per_chunk: int | None = None,
        progress: bool = True,
    ) -> Float[ndarray, "n"]:
        """Return the logarithm of the odds of each score, float64; see `score_pairs`.

        Scores near 0 and 1 differ by less than float32 tells, their logits do not. Items from
        `preprocess` have their instruction already.
        """
        states = self._embedder.encode(
            self._preprocessed(pairs, instruction),
            tokens_per_chunk=tokens_per_chunk,
            progress=progress,
            name="pair {}".format,
            normalize=False,
        )
        return states.astype(np.float64) @ self._direction

    @property
    def fingerprint(self) -> str:
        """The SHA-256 digest of the model and of its head."""
        return sha256_of([self._embedder.fingerprint, self._direction.tolist()])

    @property
    def compute(self) -> ComputeConfig:
        """How the model runs."""
        return self._embedder.compute

    def preprocess(self, pair: Pair, instruction: str | None = None) -> Item:
        """Return the tokens of a pair and the patches of its images; see `score_pairs`."""
        return run(self.preparing(pair, instruction))

    async def preparing(self, pair: Pair, instruction: str | None = None) -> Item:
        """Return what `preprocess` does, as a coroutine for `data.preparing`."""
        query, document = (checked(side) for side in pair)
        if query.frames or document.frames:
            raise ItemError("a side of a pair has a video, expected texts and images")
        if document.instruction is not None:
            raise ItemError("a document has an instruction, expected it with the query")
        config = self._embedder.config
        # Images of both sides are asked for at once, so that none waits for another.
        images = (*query.images, *document.images)
        cut = tuple(await read_patches(images, config.vision, config.images))
        count = len(query.images)
        return self._processor.item(
            Side(query.text, cut[:count]),
            Side(document.text, cut[count:]),
            query.instruction or instruction,
        )

    def _preprocessed(
        self, pairs: Iterable[Pair | Item], instruction: str | None
    ) -> Iterator[Item]:
        """Return the items of pairs; an error names the pair by its number."""

        async def preparing(numbered: tuple[int, Pair | Item]) -> Item:
            number, pair = numbered
            if isinstance(pair, Item):
                return pair
            try:
                return await self.preparing(pair, instruction)
            except ItemError as error:
                raise type(error)(f"pair {number}: {error}") from error

        return prepare(preparing, enumerate(pairs))


def _head_row(checkpoint: hf.Checkpoint, token: int) -> Float[ndarray, "width"]:
    """Return the row of a token in the head, float32: of the token table if the two are tied.

    Raises:
        CheckpointError: The folder holds no head.
    """
    text = checkpoint.source.model.get("text_config") or {}
    model = checkpoint.source.model
    tied = model.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    name = family_of(checkpoint.config.family).weights[_TABLE] if tied else _HEAD
    if name not in checkpoint.files:
        raise CheckpointError(
            f"{checkpoint.folder} has no {_HEAD}, which its config says is not tied to the token "
            "table: it is not a reranker"
        )
    path, stored = checkpoint.files[name]
    with safe_open(path, "numpy") as file:
        rows = file.get_slice(stored)
        if rows.get_shape() != [
            checkpoint.config.decoder.vocab_size,
            checkpoint.config.decoder.width,
        ]:
            raise CheckpointError(
                f"{path}: {stored} has shape {rows.get_shape()}, expected that of the token table"
            )
        return np.asarray(rows[token : token + 1][0], np.float32)
