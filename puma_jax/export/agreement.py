"""How far the vectors of several engines lie apart on the golden items, and whether that is fine.

The reference is puma_jax in float32, all items together. Two measures are taken, because each
misses something: 1 − cosine does not see the length of a vector, and the largest difference of a
value says little about directions in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puma_jax.config import DType
from puma_jax.data.prompts import query_text
from puma_jax.data.raw_items import images_of
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, PumaError, one_line
from puma_jax.evaluation.report import markdown
from puma_jax.export import engines, golden
from puma_jax.export.golden import SPECIAL_TOKENS, GoldenItem
from puma_jax.files import read_json
from puma_jax.model.families import family_of
from puma_jax.typing import Float, ndarray


class Tolerance(NamedTuple):
    """The largest differences that are fine."""

    cosine: float
    """Largest 1 − cosine of an item's two vectors."""
    value: float
    """Largest difference of one value of an item's two vectors."""


TOLERANCES: dict[DType, Tolerance] = {
    "float32": Tolerance(1e-7, 5e-5),
    "bfloat16": Tolerance(1e-2, 0.1),
}
"""Tolerances by the less precise of the dtypes that weights and activations have."""


@dataclass(frozen=True)
class Check:
    """A row of the table: an engine, and how far its vectors lie from the reference."""

    engine: str
    verdict: str
    """"equal", "differs", "failed", or "not checked"."""
    compared: int = 0
    """Number of items whose vectors were compared."""
    cosine: float | None = None
    """Largest 1 − cosine."""
    value: float | None = None
    """Largest difference of a value."""
    tolerance: Tolerance | None = None
    note: str = ""
    """Item of the largest difference, items left out, or the reason of the verdict."""

    @property
    def bad(self) -> bool:
        """Whether the engine does not give the vectors of the reference."""
        return self.verdict in ("differs", "failed")


class Agreement:
    """The golden items of a model, their reference vectors, and checks against them."""

    def __init__(self, model: Embedder, dtype: DType):
        """Encode the golden items.

        Args:
            model: The model in float32.
            dtype: Dtype of the files of its weights.
        """
        self.model = model
        self.dtype = dtype
        self.items = golden.golden_items(model)
        self.reference = golden.encode(model, self.items)

    def check(
        self,
        engine: str,
        encode: Callable[[Sequence[GoldenItem]], Float[ndarray, "n width"]],
        dtype: DType = "float32",
        without: Collection[str] = (),
    ) -> Check:
        """Return how far the vectors of an engine lie from the reference.

        Args:
            engine: Name of the engine, for the table.
            encode: Returns the vectors of items. Its errors are the verdict, whichever they are.
            dtype: The less precise of the dtypes of weights and activations.
            without: Names of items that the engine is known to read in another way.
        """
        numbers = [n for n, item in enumerate(self.items) if item.name not in without]
        try:
            vectors = encode([self.items[number] for number in numbers])
        except ImportError as error:
            return Check(engine, "not checked", note=f"not installed: {_first_line(error)}")
        except Exception as error:  # of foreign software: any
            return Check(engine, "failed", note=_first_line(error))
        named = ", ".join(item.name for item in self.items if item.name in without)
        return self._compared(engine, vectors, numbers, dtype, f"without {named}" if named else "")

    def check_golden(self, folder: Path, dtype: DType) -> Iterator[Check]:
        """Yield how far the golden vectors of a folder lie from the reference, if it has any."""
        engine = f"golden vectors of {folder}"
        try:
            found = golden.read(folder, self.items)
        except PumaError as error:
            yield Check(engine, "failed", note=str(error))
            return
        if found is None:
            return
        vectors, numbers = found
        changed = [item.name for n, item in enumerate(self.items) if n not in numbers]
        if changed:
            yield Check(
                engine,
                "failed",
                compared=len(numbers),
                note=f"items are other ones than here: {', '.join(changed)}; export again",
            )
        else:
            yield self._compared(engine, vectors, numbers, dtype, "")

    def _compared(
        self,
        engine: str,
        vectors: Float[ndarray, "n values"],
        numbers: Sequence[int],
        dtype: DType,
        note: str,
    ) -> Check:
        """Return the check of vectors, of which only the first values may be given."""
        expected = np.asarray(self.reference[list(numbers)], np.float64)[:, : vectors.shape[-1]]
        if vectors.shape != expected.shape or not np.isfinite(vectors).all():
            found = "not finite" if vectors.shape == expected.shape else f"{list(vectors.shape)}"
            wanted = f"expected finite vectors {list(expected.shape)}"
            return Check(engine, "failed", note=f"vectors are {found}, {wanted}")
        given = vectors.astype(np.float64)
        lengths = np.linalg.norm(given, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = 1 - (given * expected).sum(1) / np.maximum(lengths, 1e-30)
        value = np.abs(given - expected).max(1)
        tolerance = TOLERANCES[dtype]
        largest = max(float(cosine.max()), 0.0), float(value.max())
        good = largest[0] <= tolerance.cosine and largest[1] <= tolerance.value
        if not good:
            excess = np.maximum(cosine / tolerance.cosine, value / tolerance.value)
            beyond = int((excess > 1).sum())
            worst = self.items[numbers[int(excess.argmax())]].name
            said = f"{beyond} of {len(numbers)} beyond tolerance, most of all {worst}"
            note = "; ".join(filter(None, [said, note]))
        return Check(
            engine, "equal" if good else "differs", len(numbers), *largest, tolerance, note
        )

    def checks_of_puma_jax(self, low: Embedder) -> Iterator[Check]:
        """Yield the checks of the model itself: each item alone, and in bfloat16.

        Args:
            low: The model in bfloat16.
        """

        def alone(items: Sequence[GoldenItem]) -> Float[ndarray, "n width"]:
            return np.concatenate([golden.encode(self.model, [item]) for item in items])

        yield self.check("puma_jax, each item alone", alone)
        yield self.check(
            "puma_jax in bfloat16", lambda items: golden.encode(low, items), "bfloat16"
        )

    def check_transformers(self, folder: Path, dtype: DType, name: str = "transformers") -> Check:
        """Return the check of transformers on a Hugging Face folder."""
        if family_of(self.model.config.family).backbone_architecture is None:
            return Check(name, "not checked", note="transformers has no composed models")
        if self.model.config.prompt.positions != "mrope":
            note = f'transformers does not compute positions "{self.model.config.prompt.positions}"'
            return Check(name, "not checked", note=note)
        stride = self.model.config.images.spatial_pool_stride
        if stride > 1:
            note = f"transformers does not pool visual tokens (images.spatial_pool_stride {stride})"
            return Check(name, "not checked", note=note)
        return self.check(
            name, lambda items: engines.transformers(folder, self.model, items), dtype
        )

    def checks_of_export(self, folder: Path) -> Iterator[Check]:
        """Yield the checks of the folder of an export, whatever its format.

        Raises:
            ConfigError: It is no folder of an export.
        """
        kind = kind_of(folder)
        dtype = self._dtype_of_files(folder, kind)
        if kind == "stablehlo":
            yield self.check(
                f"StableHLO, {folder}",
                lambda items: engines.stablehlo(folder, items),
                # It computes in the dtype of its weights.
                "bfloat16" if _dtype(folder, kind) == "bfloat16" else dtype,
                {*self._truncated(), *self._of_several_images()},
            )
        else:
            exported = Embedder.load(folder, dtype="float32")
            yield self.check(
                f"puma_jax, {folder}", lambda items: golden.encode(exported, items), dtype
            )
            del exported
        if kind == "sentence-transformers":
            yield self.check(
                f"Sentence Transformers, {folder}",
                lambda items: engines.sentence_transformers(folder, items),
                dtype,
                {SPECIAL_TOKENS, *self._truncated()},
            )
        elif kind == "huggingface":
            yield self.check_transformers(folder, dtype, f"transformers, {folder}")
        yield from self.check_golden(folder, dtype)

    def check_service(self, url: str, api_key: str | None) -> Check:
        """Return the check of a running service, which has the dtype of the files of its model."""
        return self.check(
            f"service, {url}", lambda items: engines.service(url, items, api_key), self.dtype
        )

    def _of_several_images(self) -> list[str]:
        """Return the names of the items of more than one image."""
        return [item.name for item in self.items if len(images_of(item.raw)) > 1]

    def _truncated(self) -> list[str]:
        """Return the names of the items whose text the model truncates."""
        limit = self.model.config.prompt.max_text_tokens
        told = {"add_special_tokens": False, "split_special_tokens": True}
        return [
            item.name
            for item in self.items
            if (text := query_text(item.raw.get("instruction"), item.raw.get("text")))
            and len(self.model.tokenizer(text, **told)["input_ids"]) > limit
        ]

    def _dtype_of_files(self, folder: Path, kind: str) -> DType:
        """Return the dtype whose tolerance the weights of an export have.

        Weights that were not rounded on the way have the tolerance of float32.
        """
        return "float32" if _dtype(folder, kind) in ("float32", self.dtype) else "bfloat16"


def kind_of(folder: Path) -> str:
    """Return the format of the folder of an export.

    Raises:
        ConfigError: It has none.
    """
    for name, kind in (
        ("embed.jax", "stablehlo"),
        ("modules.json", "sentence-transformers"),
        ("config.json", "huggingface"),
    ):
        if (folder / name).is_file():
            return kind
    raise ConfigError(
        f"{folder} is no export: it has neither embed.jax nor modules.json nor config.json"
    )


def _first_line(error: Exception) -> str:
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])


def _dtype(folder: Path, kind: str) -> str:
    """Return the dtype that the files of an export name."""
    name = "manifest.json" if kind == "stablehlo" else "config.json"
    return str(read_json(folder / name).get("dtype"))


def table(checks: Sequence[Check]) -> str:
    """Return the checks as a markdown table, and below it what is to be said about them."""
    rows = [
        [
            check.engine,
            f"{check.compared}" if check.compared else "–",
            *(_number(check.cosine), _number(check.value)),
            "–"
            if check.tolerance is None
            else f"{check.tolerance.cosine:g}, {check.tolerance.value:g}",
            check.verdict,
        ]
        for check in checks
    ]
    header = ["engine", "items", "1 − cosine", "value", "tolerances", "verdict"]
    notes = [f"- {check.engine}: {check.note}" for check in checks if check.note]
    return "\n".join([markdown(header, rows), *([""] if notes else []), *notes])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
