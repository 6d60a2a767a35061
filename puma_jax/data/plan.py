"""The plan of a step: which pairs it has and where their items lie in the packed rows.

A plan is a pure function of (seed, step) and of a table of lengths that is made when the data is
built. It reads only numbers and keeps no state, so every host computes the same plan, resuming
needs only the step number, and the number of workers does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from puma_jax.config import PlanConfig
from puma_jax.data import draws
from puma_jax.data.images import patch_counts
from puma_jax.data.items import TokenizedTemplate
from puma_jax.data.packing import Packing, place
from puma_jax.data.shapes import batch_shape
from puma_jax.data.store import Instructions
from puma_jax.data.table import LengthTable, Ragged, TeacherScores, at_places
from puma_jax.errors import ConfigError
from puma_jax.rows import PackedShape
from puma_jax.typing import Bool, Int, ndarray


@dataclass(frozen=True)
class Pairs:
    """Queries, each with a candidate that answers it and hard negatives that do not."""

    query: Int[ndarray, "pairs"]
    """Rows of the table of queries."""
    candidate: Int[ndarray, "pairs"]
    """Rows of the table of candidates."""
    prompt: Int[ndarray, "pairs"]
    """Index among the prompts of the query's key; -1 for none."""
    negative: Int[ndarray, "pairs negatives"]
    """Rows of the table of candidates; -1 where a query has fewer negatives than are drawn."""
    scores: TeacherScores | None = None
    """None if the data have none, or if no negatives are drawn."""


@dataclass(frozen=True)
class Step:
    """The plan of one step. Its items are all queries, then all candidates, then all negatives."""

    pairs: Pairs
    lengths: Int[ndarray, "items"]
    """Tokens of each item."""
    patches: Int[ndarray, "items"]
    """Image patches of each item."""
    packing: Packing


class Plan:
    """Batches of a training run, by step."""

    def __init__(
        self,
        table: LengthTable,
        instructions: Instructions,
        template: TokenizedTemplate,
        config: PlanConfig,
    ):
        """Compute what is the same for all steps.

        Args:
            table: Lengths, positives and negatives of all rows.
            instructions: Prompts of each key, and names of sets.
            template: The prompt template as tokens.
            config: How pairs are drawn.

        Raises:
            ConfigError: There are too few pairs for a batch, a weight names no set, or hard
                negatives are to be drawn and no query has any.
        """
        self.table = table
        self.template = template
        self.config = config
        self._prompts = np.array([len(prompts) for prompts in instructions.prompts] + [0])
        longest = max(1, self._prompts.max())
        # Last row: no key. Unused prompts have length 0 and are never drawn.
        self._prompt_tokens = np.zeros((len(self._prompts), longest), np.int64)
        for key, prompts in enumerate(instructions.prompts):
            self._prompt_tokens[key, : len(prompts)] = [len(prompt.tokens) for prompt in prompts]
        self._sets = _rows_of_sets(table, instructions, config)
        self._positives = Ragged(table.positive_start, table.positive_row)
        self._negatives = Ragged(table.negative_start, table.negative_row)
        if config.hard_negatives and not self.negatives().any():
            raise ConfigError(
                f"plan.hard_negatives is {config.hard_negatives}, but neg_cand_list is empty in "
                "all training queries: mine some with python -m puma_jax.mine, or set it to 0"
            )
        # The latest window. Steps come in order, so earlier windows need not be kept.
        self._latest: tuple[Any, tuple[ndarray, ...]] = (None, ())
        self.steps_per_epoch = _steps_per_epoch([len(rows) for rows in self._sets], config)

    def pairs(self, step: int) -> Pairs:
        """Return the pairs of a step.

        No query comes twice in an epoch. Pairs that do not fill a last batch are left out of it.
        """
        if self.config.homogeneous_batches:
            query, epoch = self._homogeneous(step)
        else:
            query, epoch = self._mixed(step)
        return self._choose(query, epoch)

    def queries(self) -> Int[ndarray, "drawn"]:
        """Return the rows of all queries that can be drawn; the weights may leave sets out."""
        return np.concatenate(self._sets)

    def candidates(self) -> Bool[ndarray, "candidates"]:
        """Return which candidates can be drawn as positives."""
        return self._named(self._positives)

    def negatives(self) -> Bool[ndarray, "candidates"]:
        """Return which candidates can be drawn as hard negatives."""
        if not self.config.hard_negatives:
            return np.zeros(len(self.table.candidate_tokens), bool)
        return self._named(self._negatives)

    def _named(self, documents: Ragged) -> Bool[ndarray, "candidates"]:
        """Return which candidates the lists of the queries that can be drawn hold."""
        asked = np.zeros(len(documents), bool)
        asked[self.queries()] = True
        named = np.zeros(len(self.table.candidate_tokens), bool)
        named[documents.values[np.repeat(asked, documents.lengths)]] = True
        return named

    def prompts(self, query: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return how many prompts each query can have; 0 means that it has no instruction."""
        if not self.config.instructions:
            return np.zeros(len(query), np.int64)
        return self._prompts[self.table.query_key[query]]

    def step(self, step: int, shape: PackedShape, chunks: int) -> Step:
        """Return the plan of a step, packed into the fewest chunks that hold it.

        Args:
            step: Number of the step.
            shape: The shape of a chunk.
            chunks: The fewest chunks to use; a batch that does not fit takes more.

        Raises:
            PackingError: An item is larger than a row; not with a shape from `fitting_shape`.
        """
        pairs = self.pairs(step)
        lengths, patches = self.item_sizes(pairs)
        return Step(pairs, lengths, patches, place(lengths, patches, shape, chunks))

    def fitting_shape(self, chunks: int, data_shards: int, looked_at: int = 32) -> PackedShape:
        """Return the tightest shape for the batches of this plan; see `shapes.batch_shape`.

        Args:
            chunks: Chunks in a batch.
            data_shards: Data-parallel devices.
            looked_at: How many steps are searched for the fullest ones and for how much they
                differ, spread over an epoch, or over several where each has few windows of balanced
                steps. With homogeneous batches all steps of an epoch are searched, because no two
                are alike. The rows always hold the largest item that can be drawn.
        """
        mixed = not self.config.homogeneous_batches
        stop = self.steps_per_epoch
        if mixed:
            # Steps of one window are alike, so the steps searched are of different windows.
            stop = max(stop, looked_at * min(self.config.balance_window, self.steps_per_epoch))
        spread = np.unique(np.linspace(0, stop - 1, looked_at if mixed else stop).astype(int))
        sizes = [self.item_sizes(self.pairs(step)) for step in spread.tolist()]
        return batch_shape(sizes, chunks, data_shards, self.largest_item(), sampled=mixed)

    def item_sizes(self, pairs: Pairs) -> tuple[Int[ndarray, "items"], Int[ndarray, "items"]]:
        """Return tokens and patches of the items of these pairs, in the order of `Step`."""
        documents = np.concatenate([pairs.candidate, pairs.negative[pairs.negative >= 0]])
        sizes = self.query_sizes(pairs.query, pairs.prompt), self.candidate_sizes(documents)
        lengths, patches = (np.concatenate(both) for both in zip(*sizes, strict=True))
        return lengths, patches

    def largest_item(self) -> tuple[int, int]:
        """Return the most tokens and the most patches of any item that can be drawn."""
        longest_prompt = np.where(self._prompts > 0, self._prompt_tokens.argmax(1), -1)
        if not self.config.instructions:
            longest_prompt[:] = -1
        query = self.queries()
        sizes = (
            self.query_sizes(query, longest_prompt[self.table.query_key[query]]),
            self.candidate_sizes(np.flatnonzero(self.candidates() | self.negatives())),
        )
        tokens, patches = (
            max(int(of.max(initial=0)) for of in both) for both in zip(*sizes, strict=True)
        )
        return tokens, patches

    def query_sizes(
        self, query: Int[ndarray, "n"], prompt: Int[ndarray, "n"]
    ) -> tuple[Int[ndarray, "n"], Int[ndarray, "n"]]:
        """Return tokens and patches of queries with these prompts; −1 is no prompt."""
        table = self.table
        patches = self._patches(table.query_height[query], table.query_width[query])
        instructed = self.template.joined_lengths(
            self._prompt_tokens[table.query_key[query], prompt],
            table.query_tokens[query],
            table.query_text_length[query],
            patches > 0,
        )
        tokens = np.where(prompt >= 0, instructed, table.query_plain_tokens[query])
        return self.template.item_lengths(tokens, patches), patches

    def candidate_sizes(
        self, candidate: Int[ndarray, "n"]
    ) -> tuple[Int[ndarray, "n"], Int[ndarray, "n"]]:
        """Return tokens and patches of candidates."""
        table = self.table
        patches = self._patches(table.candidate_height[candidate], table.candidate_width[candidate])
        return self.template.item_lengths(table.candidate_tokens[candidate], patches), patches

    def _patches(self, heights: ndarray, widths: ndarray) -> ndarray:
        config = self.template.config
        return patch_counts(heights, widths, config.vision, config.images)

    def _choose(self, query: ndarray, epoch: ndarray) -> Pairs:
        """Return each query with a positive, a prompt and negatives drawn for its epoch."""
        table, seed = self.table, self.config.seed
        first = table.positive_start[query]
        positives = table.positive_start[query + 1] - first
        place = draws.draw(positives, seed, draws.POSITIVE, epoch, query)
        prompts = self.prompts(query)
        prompt = draws.draw(np.maximum(prompts, 1), seed, draws.PROMPT, epoch, query)
        negative = self._choose_negatives(query, epoch)
        return Pairs(
            query,
            table.positive_row[first + place],
            np.where(prompts > 0, prompt, -1),
            at_places(table.negative_row, negative, -1),
            table.scores(first + place, negative) if negative.size else None,
        )

    def _choose_negatives(self, query: ndarray, epoch: ndarray) -> Int[ndarray, "n negatives"]:
        """Return places in `negative_row` of hard negatives, drawn without replacement.

        Of documents with the same content one can be drawn, and none if it answers the query. A
        query that has fewer negatives has places -1.
        """
        count, content = self.config.hard_negatives, self.table.candidate_content
        if not count:
            return np.zeros((len(query), 0), np.int64)
        negatives = self._negatives.take(query)

        def keys(documents: Ragged) -> Int[ndarray, "values"]:
            owner = np.repeat(np.arange(len(documents)), documents.lengths)
            return owner * len(content) + content[documents.values]

        found, first = np.unique(keys(negatives), return_index=True)
        keep = np.zeros(len(negatives.values), bool)
        keep[first] = ~np.isin(found, keys(self._positives.take(query)))
        places = Ragged(self._negatives.start, np.arange(len(self._negatives.values)))
        key = self.config.seed, draws.NEGATIVE, epoch, query
        return draws.sample(places.take(query).where(keep), count, *key)

    def _mixed(self, step: int) -> tuple[ndarray, ndarray]:
        """Return queries and epochs of a step that mixes all sets.

        The pairs of a window of steps are drawn together and split into batches with about equal
        numbers of tokens and patches, so that all steps fill the same rows.
        """
        batch = self.config.batch_size
        epoch, within = divmod(step, self.steps_per_epoch)
        window, step_in_window = divmod(within, self.config.balance_window)
        first = window * self.config.balance_window
        steps = min(self.config.balance_window, self.steps_per_epoch - first)
        if self._latest[0] != (epoch, window):
            query, visit = self._draw_window(epoch, first * batch, steps * batch)
            pairs = self._choose(query, visit)
            lengths, patches = (_pair_sizes(sizes, pairs) for sizes in self.item_sizes(pairs))
            batches = balance_batches(lengths, patches, steps)
            self._latest = ((epoch, window), (query, visit, batches))
        query, visit, batches = self._latest[1]
        drawn = batches[step_in_window]
        return query[drawn], visit[drawn]

    def _draw_window(self, epoch: int, first: int, count: int) -> tuple[ndarray, ndarray]:
        """Return `count` queries of the stream of pairs, from `first` on, and their epochs."""
        if not self.config.mixture_weights:
            (rows,) = self._sets
            places = np.arange(first, first + count)
            return rows[draws.shuffle(places, len(rows), self.config.seed, epoch)], np.full(
                count, epoch
            )
        start = epoch * self.steps_per_epoch * self.config.batch_size + first
        shares = np.cumsum([0.0, *(weight for _, weight in self.config.mixture_weights)])
        # Where the part of each set begins and ends, rounded so that all parts add up.
        begins, ends = (
            np.rint(at * shares / shares[-1]).astype(int) for at in (start, start + count)
        )
        queries, visits = [], []
        for number, rows in enumerate(self._sets):
            used = begins[number + 1] - begins[number]
            places = np.arange(used, ends[number + 1] - ends[number])
            visit, within = np.divmod(places, len(rows))
            shuffled = [
                draws.shuffle(within[visit == one], len(rows), self.config.seed, int(one), number)
                for one in np.unique(visit)
            ]
            queries.append(rows[np.concatenate([np.zeros(0, np.int64), *shuffled])])
            visits.append(visit)
        return np.concatenate(queries), np.concatenate(visits)

    def _homogeneous(self, step: int) -> tuple[ndarray, ndarray]:
        """Return queries and epochs of a step whose pairs all come from one set."""
        batch, seed = self.config.batch_size, self.config.seed
        epoch, within = divmod(step, self.steps_per_epoch)
        batches = np.array([len(rows) // batch for rows in self._sets])
        place_in_epoch = int(
            draws.shuffle(np.array([within]), self.steps_per_epoch, seed, epoch)[0]
        )
        number = int(np.searchsorted(np.cumsum(batches), place_in_epoch, side="right"))
        before = place_in_epoch - int(batches[:number].sum())
        places = np.arange(before * batch, (before + 1) * batch)
        rows = self._sets[number]
        return rows[draws.shuffle(places, len(rows), seed, epoch, number)], np.full(batch, epoch)


def _rows_of_sets(
    table: LengthTable, instructions: Instructions, config: PlanConfig
) -> list[Int[ndarray, "rows"]]:
    """Return the rows of queries to draw from: one array for all sets, or one for each set."""
    if not config.mixture_weights and not config.homogeneous_batches:
        return [np.arange(len(table.query_set))]
    names = [name for name, _ in config.mixture_weights] or list(instructions.sets)
    unknown = [name for name in names if name not in instructions.sets]
    if unknown:
        raise ConfigError(
            f"plan.mixture_weights names {', '.join(unknown)}; "
            f"the sets are {', '.join(instructions.sets)}"
        )
    rows = [np.flatnonzero(table.query_set == instructions.sets.index(name)) for name in names]
    total = sum(weight for _, weight in config.mixture_weights)
    for (name, weight), of_set in zip(
        config.mixture_weights, rows, strict=bool(config.mixture_weights)
    ):
        # With fewer than two pairs in a window, rounding could leave a set out of it.
        if not len(of_set) or not weight / total * config.batch_size * config.balance_window >= 2:
            raise ConfigError(
                f"plan.mixture_weights gives {name}, of {len(of_set)} pairs, {weight} of {total}: "
                "that is less than two pairs in a balance window; drop the set or raise its weight"
            )
    return rows


def _steps_per_epoch(sizes: list[int], config: PlanConfig) -> int:
    whole = (
        [size // config.batch_size for size in sizes]
        if config.homogeneous_batches
        else [sum(sizes) // config.batch_size]
    )
    if sum(whole) == 0:
        raise ConfigError(
            f"plan.batch_size {config.batch_size} is larger than the data: "
            f"{max(sizes, default=0)} pairs"
        )
    return sum(whole)


def _pair_sizes(sizes: ndarray, pairs: Pairs) -> ndarray:
    """Return the size of query, candidate and negatives together, for each pair."""
    n = len(pairs.query)
    total = sizes[: 2 * n].reshape(2, n).sum(0)
    np.add.at(total, np.nonzero(pairs.negative >= 0)[0], sizes[2 * n :])
    return total


def balance_batches(
    lengths: Int[ndarray, "pairs"], patches: Int[ndarray, "pairs"], batches: int
) -> Int[ndarray, "batches size"]:
    """Return the pairs of each batch, so that all batches have about equal tokens and patches.

    Pairs are sorted by patches and cut into groups of one pair for each batch, which makes the
    batches equal in patches. Within a group, longer pairs go to batches with fewer tokens so far.

    Args:
        lengths: Tokens of each pair.
        patches: Image patches of each pair.
        batches: Number of batches; it divides the number of pairs.

    Returns:
        Indices of pairs.
    """
    groups = np.lexsort((lengths, patches)).reshape(-1, batches)
    longest_first = np.argsort(-lengths[groups], axis=1, kind="stable")
    groups = np.take_along_axis(groups, longest_first, axis=1)
    tokens = np.zeros(batches, np.int64)
    balanced = np.empty((len(groups), batches), np.int64)
    for group, sizes, pair_of_batch in zip(groups, lengths[groups], balanced, strict=True):
        shortest_first = tokens.argsort(kind="stable")
        pair_of_batch[shortest_first] = group
        tokens[shortest_first] += sizes
    return balanced.T
