"""The benchmark of clip art keeps its promises, on a few pictures that are made here."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from puma_jax.data.mbeir import validate
from puma_jax.data.openclipart import Settings, build
from puma_jax.data.openclipart.metadata import Clip, plain, read_clips
from puma_jax.data.openclipart.pictures import is_blank, render
from puma_jax.errors import ArtifactError, ConfigError

RED = '<rect x="10" y="20" width="40" height="20" fill="#d00"/>'


def svg(title="", keywords=(), *, creator="", content=RED, size='width="100" height="100"'):
    items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" {size}>
 <metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"
  xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <cc:Work rdf:about=""><dc:title>{title}</dc:title>
   <dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>
   <dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
   <dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
  </cc:Work></rdf:RDF></metadata>{content}</svg>"""


def write(root, files):
    for path, content in files.items():
        file = root / f"{path}.svg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return sorted(files)


def test_names_and_keywords_are_cleaned_and_what_is_left_out_is_counted(tmp_path):
    hashed = ("", "HASH(0x8a3ecd4)", "hash", "0x8b754fc", "unsorted", "11", "Tom Smith", "a@b.org")
    files = {
        "animals/dogs/bored_dog_tom_01": svg(
            "Bored Dog", (*hashed, "mammal", "big_dog"), creator="Tom Smith"
        ),
        "animals/contour_giraffe": svg("Clipart by Nicu - contour_chipmunk", ["mammal"]),
        "people/anna_02": "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "signs/a_1": svg(""),
        "signs/broken": "<svg",
        "shapes/stars/star_7": svg("gramastar"),
        "shapeshop/aiga_bus_m": svg("AIGA signs"),
        **{f"shapeshop/aiga_{name}_": svg("AIGA signs") for name in ("car", "bar", "exit", "lift")},
        **{f"people/smiley_{number}": svg("Smiley") for number in range(9)},
    }  # fmt: skip
    clips, left_out = read_clips(tmp_path, write(tmp_path, files))
    assert {clip.name for clip in clips} == {
        "bored dog", "contour giraffe", "anna", "bus", "car", "bar", "exit", "lift",
    }  # fmt: skip
    dog = next(clip for clip in clips if clip.name == "bored dog")
    assert dog.keywords == {"mammal", "big dog"}
    assert dog.folder == "animals, dogs"
    assert left_out == {
        "in folders of series": 1,
        "not readable": 1,
        "with the name of more than 8": 9,
        "without a name": 1,
    }


def test_a_picture_fills_the_square_whatever_the_page_and_its_units(tmp_path):
    pages = {
        "page": svg(size='width="210mm" height="297mm"'),
        "points": svg(size='width="400pt" height="50pt"'),
        "pixels": svg(),
    }
    write(tmp_path, pages)
    for name in pages:
        picture = render(tmp_path / f"{name}.svg", 28)
        red = picture[..., 1] < 128
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        assert len(columns) >= 25, name  # 2 × 1, without the margins of the page
        assert abs(len(rows) - 14) <= 3
        assert abs(rows.mean() - 13.5) <= 1


def test_what_cannot_be_rendered_or_seen_is_told(tmp_path):
    white = svg(content=RED.replace("#d00", "white"))
    write(tmp_path, {"white": white, "none": svg(size='width="0" height="0"')})
    assert is_blank(render(tmp_path / "white.svg", 28))
    assert render(tmp_path / "none.svg", 28) is None
    (tmp_path / "latin.svg").write_bytes(svg("Glacé").encode("latin-1"))
    assert render(tmp_path / "latin.svg", 28) is None


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Pictures of forty subjects, of which two pairs look the same, and what is left out."""
    root = tmp_path_factory.mktemp("svg")
    shapes = [
        f'<rect x="0" y="0" width="{20 + 9 * wide}" height="50" fill="{color}"/>'
        f'<circle cx="9" cy="9" r="{3 + wide}" fill="{other}"/>'
        for wide in range(4)
        for color in ("red", "blue", "green", "black", "orange")
        for other in ("yellow", "gray")
    ]
    letters = "abcdefghijklmnopqrstuvwxyzäöüßéèêáàâñçåø"
    subjects = [f"{letter}ird of {letter}land" for letter in letters]
    files = {
        f"animals/{'birds' if number % 2 else 'bugs'}/picture_{number}": svg(
            subject,
            ("animal", f"kind {'qrstuvw'[number % 7]}", f"size {'abcdefgh'[number % 8]}"),
            content=shape,
        )
        for number, (subject, shape) in enumerate(zip(subjects, shapes, strict=True))
    }
    for copy, number in enumerate((3, 11)):
        files[f"copies/of_{number}"] = svg(f"Copy {'ab'[copy]}", ["copy"], content=shapes[number])
    files["animals/bugs/second"] = svg(subjects[0], ["animal"])
    files["animals/white"] = svg("Ghost", content="")
    files["animals/none"] = svg("Nothing", size='width="0" height="0"')
    write(root, files)
    return root


@pytest.fixture(scope="module")
def built(drawn, tmp_path_factory):
    out = tmp_path_factory.mktemp("openclipart") / "bench"
    assert build(Settings(out, size=28, workers=1, svg=drawn))
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def queries(root, split):
    return [row for path in sorted((root / "query" / split).iterdir()) for row in rows(path)]


def documents(root):
    return {
        row["did"]: row for row in rows(root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl")
    }


def test_every_record_image_and_reference_is_sound(built):
    report = validate(built)
    assert report.sound, report
    assert not report.notes
    with Image.open(built / "mbeir_images/openclipart/animals/bugs/second.png") as image:
        assert (image.mode, image.size) == ("RGB", (28, 28))


def test_what_is_held_out_is_nowhere_in_training(built):
    found = documents(built)
    pixels = {}
    for row in found.values():
        if row["img_path"]:
            with Image.open(built / row["img_path"]) as image:
                pixels[row["img_path"]] = image.tobytes()

    def seen(split):
        texts, pictures = set(), set()
        for query in queries(built, split):
            texts.add(query["query_txt"])
            shown = [query["query_img_path"]]
            for did in query["pos_cand_list"]:
                texts.add(found[did]["txt"])
                shown.append(found[did]["img_path"])
            pictures |= {pixels[path] for path in shown if path}
        return texts - {None}, pictures

    texts, pictures = seen("train")
    for split in ("val", "test"):
        held_texts, held_pictures = seen(split)
        assert held_texts
        assert held_pictures
        assert not held_texts & texts
        assert not held_pictures & pictures


def test_right_answers_are_all_that_have_the_name_or_keywords_or_look_the_same(built, drawn):
    found = documents(built)
    clips, _ = read_clips(
        drawn, sorted(p.relative_to(drawn).as_posix()[:-4] for p in drawn.rglob("*.svg"))
    )
    clip_of = {clip.path: clip for clip in clips}
    alike = defaultdict(set)
    for row in found.values():
        if row["img_path"]:
            alike[(built / row["img_path"]).read_bytes()].add(row["src_content"])
    same = {path: paths for paths in alike.values() for path in paths}
    assert Counter(map(len, alike.values()))[2] == 2
    asked = Counter()
    for split in ("train", "val", "test"):
        for query in queries(built, split):
            parts = query["query_src_content"].split(" + ")
            (kind,) = {part.partition(":")[0] for part in parts} - {"new word"}
            asked[kind] += 1
            answers = {found[did]["src_content"] for did in query["pos_cand_list"]}
            if kind == "picture":
                path = query["query_img_path"].removeprefix("mbeir_images/openclipart/")
                expected = {clip_of[one].name for one in same[path.removesuffix(".png")]}
            else:
                right = [clip for clip in clip_of.values() if _fits(clip, query["query_txt"])]
                expected = {path for clip in right for path in same.get(clip.path, ())}
            assert answers == expected, query
    assert asked["name"] == 42
    assert asked["picture"] == 41
    assert asked["keywords"] > 20


def _fits(clip: Clip, text: str) -> bool:
    folder, _, keywords = text.partition(": ")
    if not keywords:
        return clip.name == text
    return clip.folder == folder and clip.keywords >= set(keywords.split(", "))


def test_words_that_training_does_not_show_are_named(built):
    found = documents(built)
    shown = " ".join(
        text
        for query in queries(built, "train")
        for text in (query["query_txt"], *(found[did]["txt"] for did in query["pos_cand_list"]))
        if text
    )
    known = {*shown.replace(",", " ").replace(":", " ").split()}
    for query in queries(built, "test"):
        texts = [query["query_txt"], *(found[did]["txt"] for did in query["pos_cand_list"])]
        used = {word for text in texts if text for word in plain(text).split()}
        new = {part.removeprefix("new word: ") for part in query["query_src_content"].split(" + ")}
        assert used - known == new & used


def test_what_is_left_out_is_said_and_the_same_settings_give_the_same_bytes(
    built, drawn, tmp_path, capsys
):
    out = tmp_path / "again"
    assert build(Settings(out, size=28, workers=3, svg=drawn))
    said = "43 of 45 pictures are used; left out: 1 blank, 1 not rendered\n"
    assert capsys.readouterr().out == said
    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert left_out == {"blank": 1, "not rendered": 1}
    names = [path.relative_to(built) for path in built.rglob("*") if path.is_file()]
    assert len(names) > 50
    for name in names:
        assert (out / name).read_bytes() == (built / name).read_bytes()
    assert not build(Settings(out, size=28, svg=drawn))
    write(tmp_path / "svg", {"one": svg("One")})
    with pytest.raises(ArtifactError, match="differs in svg"):
        build(Settings(out, size=28, svg=tmp_path / "svg"))


def test_a_folder_without_pictures_is_refused_with_the_way_to_get_them(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"has no SVG files: run apt-get install openclipart"):
            build(Settings(tmp_path / "out", svg=folder))
    write(tmp_path, {"shapes/star": svg("Star")})
    with pytest.raises(ConfigError, match="has no picture that can be used"):
        build(Settings(tmp_path / "out", size=28, svg=tmp_path))
    assert not (tmp_path / "out").exists()
