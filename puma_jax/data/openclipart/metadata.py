"""What the pictures of Open Clip Art show: names, keywords and folders, cleaned.

The metadata were written by hundreds of people, and converted by scripts: a title may be that of a
whole collection or of another picture, and keywords may be empty or addresses of objects.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DC = "{http://purl.org/dc/elements/1.1/}"
_WORK = re.compile(r"\{.*\}Work")
# Series that a script or a set of icons made: their names say nothing of what they show, or all of
# them show the same with a number. Flags are those of OpenMoji's benchmark.
_SERIES = (
    "buttons",
    "computer/buttons",
    "computer/icons",
    "recreation/games/cards",
    "shapes",
    "signs_and_symbols/flags",
    "signs_and_symbols/led",
    "special",
)
_FILES_OF_A_TITLE = 4  # a title of more is that of a collection
_PICTURES_OF_A_NAME = 8  # a name of more says too little
_LETTERS_OF_A_NAME = 3
_MARKS = frozenset({"aiga", "aj", "bb", "bwh", "rpswb"})
"""Marks of series in names of files."""
_NO_KEYWORD = re.compile(r"hash|hash\(.*\)|0x[0-9a-f]+|[^a-z]*|.*[@/].*|unsorted|openclipart")


@dataclass(frozen=True, slots=True)
class Clip:
    """A picture, and what is said of it."""

    path: str
    """Path of its file below the folder of all, without ".svg"."""
    name: str
    """Name of the thing it shows, in lower case."""
    keywords: frozenset[str]

    @property
    def folder(self) -> str:
        """The folders that it is in, the innermost last: "animals, mammals, dogs"."""
        return ", ".join(plain(part) for part in self.path.split("/")[:-1])


@dataclass(frozen=True, slots=True)
class _Said:
    """The title, the creator and the keywords that a file's metadata give."""

    title: str
    creator: str
    keywords: tuple[str, ...]


def read_clips(root: Path, paths: Sequence[str]) -> tuple[list[Clip], Counter[str]]:
    """Return the pictures that are used, and how many are left out for each reason.

    Args:
        root: Folder of all pictures.
        paths: Paths of their files below it, without ".svg".
    """
    left_out: Counter[str] = Counter()
    said: dict[str, _Said] = {}
    for path in paths:
        if path.startswith(tuple(f"{folder}/" for folder in _SERIES)):
            left_out["in folders of series"] += 1
            continue
        found = _read(root / f"{path}.svg")
        if found is None:
            left_out["not readable"] += 1
        else:
            said[path] = found
    names = _names(said)
    pictures = Counter(names.values())
    clips = []
    for path, name in names.items():
        if sum(map(str.isalpha, name)) < _LETTERS_OF_A_NAME:
            left_out["without a name"] += 1
        elif pictures[name] > _PICTURES_OF_A_NAME:
            left_out[f"with the name of more than {_PICTURES_OF_A_NAME}"] += 1
        else:
            clips.append(Clip(path, name, _keywords(said[path])))
    return clips, left_out


def plain(text: str) -> str:
    """Return the words of a text in lower case, without marks and numbers.

    >>> plain("Waxing_Crescent-02 ")
    'waxing crescent'
    """
    return " ".join(re.sub(r"[\W\d_]+", " ", text).lower().split())


def _read(file: Path) -> _Said | None:
    """Return what the first description in a file says; None if the file is no XML."""
    work = None
    try:
        for _, element in ElementTree.iterparse(file):
            if _WORK.fullmatch(element.tag):
                work = element
                break
    except ElementTree.ParseError:
        return None
    if work is None:
        return _Said("", "", ())
    creator = work.find(f"{_DC}creator")
    items = [item for subject in work.findall(f"{_DC}subject") for item in subject.iter()]
    return _Said(
        title=work.findtext(f"{_DC}title") or "",
        creator="" if creator is None else " ".join(creator.itertext()),
        keywords=tuple(item.text or "" for item in items if item.tag.endswith("}li")),
    )


def _names(said: Mapping[str, _Said]) -> dict[str, str]:
    """Return the name of each picture: its title, or the name of its file if that is better."""
    files: dict[str, set[str]] = defaultdict(set)
    stems = {path: plain(path.rpartition("/")[2]) for path in said}
    for path, one in said.items():
        files[plain(one.title)].add(stems[path])
    names = {}
    for path, one in said.items():
        title, stem = plain(one.title), stems[path]
        # Files are named by titles, then authors; those of collections otherwise.
        own = len(files[title]) <= _FILES_OF_A_TITLE or stem.startswith(title)
        if title and own and "clipart" not in title:
            names[path] = title
        else:
            words = [word for word in stem.split() if len(word) > 1 and word not in _MARKS]
            names[path] = " ".join(words)
    return names


def _keywords(said: _Said) -> frozenset[str]:
    """Return the keywords that say something of the picture."""
    words = {word.strip().lower() for word in said.keywords}
    kept = {plain(word) for word in words if not _NO_KEYWORD.fullmatch(word)}
    return frozenset(kept - {plain(said.creator), ""})
