"""The pictures of the benchmark, with their splits, and the documents of the pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from puma_jax.data.demo.pictures import look_alikes
from puma_jax.data.demo.split import Split, connected, split_by_fraction
from puma_jax.data.mbeir import Candidate
from puma_jax.data.openclipart.metadata import Clip
from puma_jax.typing import UInt8, ndarray

DATASET = "openclipart"
DATASET_ID = "11"  # M-BEIR's own are 0 to 9, OpenMoji's is 10


@dataclass(frozen=True)
class Catalogue:
    """The pictures of the benchmark, the documents, and who is held out."""

    clips: Sequence[Clip]
    alike: Mapping[str, Sequence[Clip]]
    """The pictures that look the same, by the path of the first."""
    first: Mapping[str, str]
    """Path of the first picture that looks the same, by the path of each."""
    pictures: Mapping[str, Candidate]
    """Documents of pictures, by path."""
    names: Mapping[str, Candidate]
    """Documents of names."""
    splits: Mapping[str, Split]
    """Split of each name."""
    known: frozenset[str]
    """Words of the names, keywords and folders of training."""

    def showing(self, clips: Sequence[Clip]) -> tuple[str, ...]:
        """Return the ids of pictures and of all that look the same."""
        paths = {same.path for clip in clips for same in self.alike[self.first[clip.path]]}
        return tuple(self.pictures[path].did for path in sorted(paths))


def image_path(path: str) -> str:
    """Return the path of a picture in the benchmark."""
    return f"mbeir_images/{DATASET}/{path}.png"


def make_catalogue(
    clips: Sequence[Clip], pixels: UInt8[ndarray, "clips size size 3"], seed: int
) -> Catalogue:
    """Return the catalogue of pictures.

    Names are held out whole, together with those whose pictures look the same.
    """
    first = {
        clip.path: clips[index].path for clip, index in zip(clips, look_alikes(pixels), strict=True)
    }
    alike: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        alike[first[clip.path]].append(clip)
    name_of = {clip.path: clip.name for clip in clips}
    family = connected((clip.name, name_of[first[clip.path]]) for clip in clips)
    split_of = split_by_fraction(set(family.values()), seed, "names", test=0.2, val=0.1)
    names = sorted(family)
    splits = {name: split_of[family[name]] for name in names}
    trained = [clip for clip in clips if splits[clip.name] == "train"]
    number = iter(range(1, len(clips) + len(names) + 1))
    return Catalogue(
        clips=clips,
        alike=alike,
        first=first,
        pictures={
            clip.path: Candidate(
                did=f"{DATASET_ID}:{next(number)}",
                text=None,
                image=image_path(clip.path),
                modality="image",
                source=clip.path,
            )
            for clip in clips
        },
        names={
            name: Candidate(
                did=f"{DATASET_ID}:{next(number)}",
                text=name,
                image=None,
                modality="text",
                source=name,
            )
            for name in names
        },
        splits=splits,
        known=frozenset(
            word
            for clip in trained
            for text in (clip.name, clip.folder, *clip.keywords)
            for word in words(text)
        ),
    )


def words(texts: str) -> list[str]:
    """Return the words of a text, without commas and colons."""
    return texts.replace(",", " ").replace(":", " ").split()
