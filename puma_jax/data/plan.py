"""Which pairs make up a step, and where everything of them lies: `Plan.step`.

A step's plan is a pure function of (seed, step) and of a table of lengths made once when the data
is built. Nothing is read but numbers and nothing is remembered, so every host computes the same
plan, resuming is a number, and workers may come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from puma_jax.config import PlanConfig
from puma_jax.data.images import patch_counts
from puma_jax.data.items import Template
from puma_jax.data.packing import Placement, place
from puma_jax.data.shapes import batch_shape
from puma_jax.data.store import Instructions
from puma_jax.data.table import LengthTable
from puma_jax.errors import ConfigError
from puma_jax.rows import RowShape
from puma_jax.typing import Bool, Int, ndarray

# What a random choice is for: equal counters must not give equal choices.
_ORDER, _POSITIVE, _PROMPT = 1, 2, 3


@dataclass(frozen=True)
class Pairs:
    """Queries, and for each a candidate that answers it."""

    query: Int[ndarray, "pairs"]
    """Rows of the table of queries."""
    candidate: Int[ndarray, "pairs"]
    """Rows of the table of candidates."""
    prompt: Int[ndarray, "pairs"]
    """Which of the prompts of the query's key; -1 for none."""


@dataclass(frozen=True)
class Step:
    """The plan of one step: n pairs are 2n items, the queries first."""

    pairs: Pairs
    lengths: Int[ndarray, "items"]
    """Tokens of each item."""
    patches: Int[ndarray, "items"]
    """Image patches of each item."""
    placement: Placement


class Plan:
    """Batches of a training run, by step."""

    def __init__(
        self,
        table: LengthTable,
        instructions: Instructions,
        template: Template,
        config: PlanConfig,
    ):
        """Prepare what is the same for all steps.

        Args:
            table: Lengths and positives of all rows.
            instructions: Prompts of each key, and names of sets.
            template: What stands around the body of every item.
            config: Which pairs to draw.

        Raises:
            ConfigError: There are too few pairs for a batch, or a weight names no set.
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
        # Steps follow each other: that of the window before last can be made again.
        self._latest: tuple[Any, tuple[ndarray, ...]] = (None, ())
        self.steps_per_epoch = _steps_per_epoch([len(rows) for rows in self._sets], config)

    def pairs(self, step: int) -> Pairs:
        """Return the pairs of a step.

        In an epoch no query comes twice; pairs left over at its end wait for the next one.
        """
        if self.config.one_set_per_batch:
            query, epoch = self._one_set(step)
        else:
            query, epoch = self._dealt(step)
        return self._choose(query, epoch)

    def queries(self) -> Int[ndarray, "drawn"]:
        """Return the rows of queries that steps may hold; weights may leave sets out."""
        return np.concatenate(self._sets)

    def candidates(self) -> Bool[ndarray, "candidates"]:
        """Return which candidates steps may hold: the positives of their queries."""
        table = self.table
        asked = np.zeros(len(table.query_key), bool)
        asked[self.queries()] = True
        drawn = np.zeros(len(table.candidate_tokens), bool)
        drawn[table.positive_row[np.repeat(asked, np.diff(table.positive_start))]] = True
        return drawn

    def prompts(self, query: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return how many prompts these queries may be asked with; 0 asks without one."""
        if not self.config.instructions:
            return np.zeros(len(query), np.int64)
        return self._prompts[self.table.query_key[query]]

    def step(self, step: int, shape: RowShape, chunks: int) -> Step:
        """Return the plan of a step, packed into the fewest chunks that hold it.

        Args:
            step: Its number.
            shape: Of a chunk.
            chunks: The fewest to use; a batch that does not fit takes more of the same shape.

        Raises:
            PackingError: An item is larger than a row, which `fitting_shape` rules out.
        """
        pairs = self.pairs(step)
        lengths, patches = self.item_sizes(pairs)
        return Step(pairs, lengths, patches, place(lengths, patches, shape, chunks))

    def fitting_shape(self, chunks: int, groups: int, looked_at: int = 32) -> RowShape:
        """Return the tightest shape for the batches of this plan; see `shapes.batch_shape`.

        Args:
            chunks: Into how many chunks a batch is cut.
            groups: Data-parallel devices.
            looked_at: How many steps are looked at for the fullest and for how much they differ,
                spread over an epoch, or over several if each has few windows of balanced steps.
                Where each batch is of one set, no step is like another, and all steps of an epoch
                are looked at. Rows hold the largest item that can be drawn in any case.
        """
        mixed = not self.config.one_set_per_batch
        stop = self.steps_per_epoch
        if mixed:
            # Steps of a window are alike, so each is to be of a window of its own.
            stop = max(stop, looked_at * min(self.config.window, self.steps_per_epoch))
        spread = np.unique(np.linspace(0, stop - 1, looked_at if mixed else stop).astype(int))
        sizes = [self.item_sizes(self.pairs(step)) for step in spread.tolist()]
        return batch_shape(sizes, chunks, groups, self.largest_item(), sampled=mixed)

    def item_sizes(self, pairs: Pairs) -> tuple[Int[ndarray, "items"], Int[ndarray, "items"]]:
        """Return tokens and patches of all items of these pairs, the queries first."""
        sizes = self.query_sizes(pairs.query, pairs.prompt), self.candidate_sizes(pairs.candidate)
        lengths, patches = (np.concatenate(both) for both in zip(*sizes, strict=True))
        return lengths, patches

    def largest_item(self) -> tuple[int, int]:
        """Return the most tokens and the most patches of any item that steps may hold."""
        longest_prompt = np.where(self._prompts > 0, self._prompt_tokens.argmax(1), -1)
        if not self.config.instructions:
            longest_prompt[:] = -1
        query = self.queries()
        sizes = (
            self.query_sizes(query, longest_prompt[self.table.query_key[query]]),
            self.candidate_sizes(np.flatnonzero(self.candidates())),
        )
        tokens, patches = (
            max(int(of.max(initial=0)) for of in both) for both in zip(*sizes, strict=True)
        )
        return tokens, patches

    def query_sizes(
        self, query: Int[ndarray, "n"], prompt: Int[ndarray, "n"]
    ) -> tuple[Int[ndarray, "n"], Int[ndarray, "n"]]:
        """Return tokens and patches of queries asked with these prompts."""
        table = self.table
        patches = self._patches(table.query_height[query], table.query_width[query])
        instructed = self.template.joined_lengths(
            self._prompt_tokens[table.query_key[query], prompt],
            table.query_tokens[query],
            table.query_text[query],
            patches > 0,
        )
        bodies = np.where(prompt >= 0, instructed, table.query_plain_tokens[query])
        return self.template.item_lengths(bodies, patches), patches

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
        """Draw a positive and a prompt for every visit to a query."""
        table, seed = self.table, self.config.seed
        first = table.positive_start[query]
        positives = table.positive_start[query + 1] - first
        candidate = table.positive_row[first + _draw(positives, seed, _POSITIVE, epoch, query)]
        prompts = self.prompts(query)
        prompt = _draw(np.maximum(prompts, 1), seed, _PROMPT, epoch, query)
        return Pairs(query, candidate, np.where(prompts > 0, prompt, -1))

    def _dealt(self, step: int) -> tuple[ndarray, ndarray]:
        """Return queries and epochs of a step that mixes all sets.

        The pairs of a window of steps are drawn together and dealt out so that every step gets
        its share of long items and of large images. All steps then fill the same rows.
        """
        batch = self.config.batch
        epoch, within = divmod(step, self.steps_per_epoch)
        window, turn = divmod(within, self.config.window)
        first = window * self.config.window
        steps = min(self.config.window, self.steps_per_epoch - first)
        if self._latest[0] != (epoch, window):
            query, visit = self._draw_window(epoch, first * batch, steps * batch)
            lengths, patches = self.item_sizes(self._choose(query, visit))
            hands = _deal(_of_pairs(lengths), _of_pairs(patches), steps)
            self._latest = ((epoch, window), (query, visit, hands))
        query, visit, hands = self._latest[1]
        hand = hands[turn]
        return query[hand], visit[hand]

    def _draw_window(self, epoch: int, first: int, count: int) -> tuple[ndarray, ndarray]:
        """Return queries and their epochs at places of the endless stream of pairs."""
        if not self.config.weights:
            (rows,) = self._sets
            places = np.arange(first, first + count)
            return rows[_shuffle(places, len(rows), self.config.seed, epoch)], np.full(count, epoch)
        start = epoch * self.steps_per_epoch * self.config.batch + first
        shares = np.cumsum([0.0, *(weight for _, weight in self.config.weights)])
        # Where each set's part of the stream begins and ends, rounded so that all parts add up.
        begins, ends = (
            np.rint(at * shares / shares[-1]).astype(int) for at in (start, start + count)
        )
        queries, visits = [], []
        for number, rows in enumerate(self._sets):
            used = begins[number + 1] - begins[number]
            places = np.arange(used, ends[number + 1] - ends[number])
            visit, within = np.divmod(places, len(rows))
            shuffled = [
                _shuffle(within[visit == one], len(rows), self.config.seed, int(one), number)
                for one in np.unique(visit)
            ]
            queries.append(rows[np.concatenate([np.zeros(0, np.int64), *shuffled])])
            visits.append(visit)
        return np.concatenate(queries), np.concatenate(visits)

    def _one_set(self, step: int) -> tuple[ndarray, ndarray]:
        """Return queries and epochs of a step whose pairs all come from one set."""
        batch, seed = self.config.batch, self.config.seed
        epoch, within = divmod(step, self.steps_per_epoch)
        batches = np.array([len(rows) // batch for rows in self._sets])
        place_in_epoch = int(_shuffle(np.array([within]), self.steps_per_epoch, seed, epoch)[0])
        number = int(np.searchsorted(np.cumsum(batches), place_in_epoch, side="right"))
        before = place_in_epoch - int(batches[:number].sum())
        places = np.arange(before * batch, (before + 1) * batch)
        rows = self._sets[number]
        return rows[_shuffle(places, len(rows), seed, epoch, number)], np.full(batch, epoch)


def _rows_of_sets(
    table: LengthTable, instructions: Instructions, config: PlanConfig
) -> list[Int[ndarray, "rows"]]:
    """Return the rows of queries to draw from: one list, or one for each set."""
    if not config.weights and not config.one_set_per_batch:
        return [np.arange(len(table.query_set))]
    names = [name for name, _ in config.weights] or list(instructions.sets)
    unknown = [name for name in names if name not in instructions.sets]
    if unknown:
        raise ConfigError(
            f"plan.weights names {', '.join(unknown)}; the sets are {', '.join(instructions.sets)}"
        )
    rows = [np.flatnonzero(table.query_set == instructions.sets.index(name)) for name in names]
    total = sum(weight for _, weight in config.weights)
    for (name, weight), of_set in zip(config.weights, rows, strict=bool(config.weights)):
        # Fewer than two pairs in a window would leave its rounding without room.
        if not len(of_set) or not weight / total * config.batch * config.window >= 2:
            raise ConfigError(
                f"plan.weights gives {name}, of {len(of_set)} pairs, {weight} of {total}: "
                "that is less than two pairs in a window of steps; leave it out or raise it"
            )
    return rows


def _steps_per_epoch(sizes: list[int], config: PlanConfig) -> int:
    whole = (
        [size // config.batch for size in sizes]
        if config.one_set_per_batch
        else [sum(sizes) // config.batch]
    )
    if sum(whole) == 0:
        raise ConfigError(
            f"plan.batch {config.batch} is larger than the data: {max(sizes, default=0)} pairs"
        )
    return sum(whole)


def _of_pairs(sizes: ndarray) -> ndarray:
    """Sum the sizes of query and candidate of each pair."""
    return sizes.reshape(2, -1).sum(0)


def _deal(
    lengths: Int[ndarray, "pairs"], patches: Int[ndarray, "pairs"], hands: int
) -> Int[ndarray, "hands cards"]:
    """Deal pairs out so that every hand has about as many tokens and patches as any other.

    Pairs are sorted by patches and taken as many at a time as there are hands, so hands are alike
    in patches; of those, the longest goes to the hand with the fewest tokens so far.
    """
    rounds = np.lexsort((lengths, patches)).reshape(-1, hands)
    longest_first = np.argsort(-lengths[rounds], axis=1, kind="stable")
    rounds = np.take_along_axis(rounds, longest_first, axis=1)
    held = np.zeros(hands, np.int64)
    dealt = np.empty((len(rounds), hands), np.int64)
    for cards, sizes, hand_of in zip(rounds, lengths[rounds], dealt, strict=True):
        poorest_first = held.argsort(kind="stable")
        hand_of[poorest_first] = cards
        held[poorest_first] += sizes
    return dealt.T


def _shuffle(places: Int[ndarray, "n"], size: int, *key: int) -> Int[ndarray, "n"]:
    """Return where a random permutation of `range(size)` takes these places.

    A Feistel network over the next power of four, walked until the result is in range: any place
    is found without computing the others, so a permutation of millions costs nothing.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    out = np.asarray(places, np.uint64)
    walking = np.ones(len(out), bool)
    while walking.any():
        left, right = out[walking] >> shift, out[walking] & mask
        for turn in range(4):
            left, right = right, left ^ (_hash(*key, _ORDER, turn, right) & mask)
        out[walking] = (left << shift) | right
        walking = out >= size
    return out.astype(np.int64)


def _draw(below: Int[ndarray, "n"], *key: int | ndarray) -> Int[ndarray, "n"]:
    """Return a random whole number from 0 up to, without, each of `below`."""
    return (_hash(*key) % np.asarray(below, np.uint64)).astype(np.int64)


def _hash(*key: int | ndarray) -> ndarray:
    """Return 64 well-mixed bits for a key (the finaliser of SplitMix64, once for each part)."""
    state: ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
