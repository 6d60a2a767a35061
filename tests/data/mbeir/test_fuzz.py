"""Ten thousand damaged records and images: nothing but a DataError may come out of them."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from puma_jax.data import mbeir
from puma_jax.data.lines import BadRecords, RowIndex
from puma_jax.data.mbeir import validation
from puma_jax.data.pair_rows import PairColumns, PairTable
from puma_jax.errors import DataError

QUERY_ROWS = [
    '{"qid": "9:6", "query_txt": null, "query_img_path": "a/1.jpg", "query_modality": "image", '
    '"query_src_content": null, "pos_cand_list": ["9:2"], "neg_cand_list": [], "task_id": 3}',
    '{"qid": "5:1", "query_txt": "Größe 漢?", "query_img_path": "a/2.jpg", "query_modality": '
    '"text,image", "pos_cand_list": [{"did": "6:1"}], "neg_cand_list": ["5:3"], "task_id": 6, '
    '"cand_scores": {"6:1": 0.5}}',
]
CANDIDATE_ROWS = [
    '{"txt": null, "img_path": "a/1.jpg", "modality": "image", "did": "9:1", "src_content": null}',
    '{"txt": "a text \\ud83d\\ude00", "img_path": null, "modality": "text", "did": "ü"}',
]
QREL_ROWS = ["9:6 0 9:2 1 3", "5:1 0 6:1 2 6"]
INSTRUCTION_ROWS = [
    "image\ttext\tMSCOCO\t9\tFind a caption.\tWhat is to be seen?",
    "image,text\ttext\tOVEN\t5\tName it.\t\t",
]
PAIR_ROWS = ["A man plays.,Somebody plays.,Nobody", '"He said ""no"", and left",b,"c\nd"']

VALUES = [
    *[None, True, 0, 3, -1, 10**300, 1.5, float("nan"), float("-inf"), "", " ", "image", "text"],
    *[
        "\ud800",
        "a\udfffb",
        "\0",
        "\ufeff",
        "\u2028",
        "a b",
        "../a",
        "/a",
        "x" * 9999,
        "text,image",
    ],
    *[[], {}, [[]], [None], [3], ["9:1", 3], {"did": None}, [{"did": {}}], [{"did": "9:1"}]],
]
BYTES = [b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"\\", b","]
BYTES += [b"\t", b" ", b"{", b"}", b"[", b"]", b"\\u", b"\\ud800", b"NaN", b"1e999", b"\x1f"]


def damage_json(row, rng):
    """Change what an object holds, so that it is still JSON, or nearly."""
    value = json.loads(row)
    for _ in range(rng.randint(1, 2)):
        key = rng.choice([*value, "another"])
        if rng.random() < 0.2:
            value.pop(key, None)
        else:
            value[key] = rng.choice(VALUES)
    text = json.dumps(value)
    change = rng.random()
    if change < 0.1:
        text = '{"qid": "1:1", "did": "1:1", ' + text[1:]
    elif change < 0.15:
        key = rng.choice(["qid", "task_id", "pos_cand_list", "another"])
        deep = rng.choice(["[", '{"a":']) * rng.choice([30, 900, 1100, 50_000])
        text = text[:-1] + f', "{key}": {rng.choice([deep, "7" * 5000])}}}'
    return text.encode()


def damage_bytes(content, rng):
    """Cut, repeat, overwrite or insert bytes."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.randint(0, 9))
        kind = rng.randrange(5)
        if kind == 0:
            del content[start:end]
        elif kind == 1:
            content[start:start] = content[start:end]
        elif kind == 2:
            content[start:end] = rng.randbytes(end - start)
        elif kind == 3:
            content[start:start] = rng.choice(BYTES)
        else:
            del content[start:]
    return bytes(content)


def damaged(rows, count, rng):
    for _ in range(count):
        row = rng.choice(rows)
        if row.startswith("{") and rng.random() < 0.5:
            yield damage_json(row, rng)
        else:
            yield damage_bytes(row.encode(), rng)


def check_message(error):
    message = str(error)
    assert message.isprintable(), message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("rows", "parse", "read", "write"),
    [
        (QUERY_ROWS, mbeir.parse_query, mbeir.read_queries, mbeir.write_queries),
        (CANDIDATE_ROWS, mbeir.parse_candidate, mbeir.read_candidates, mbeir.write_candidates),
        (QREL_ROWS, mbeir.parse_qrel, mbeir.read_qrels, mbeir.write_qrels),
    ],
)
def test_a_damaged_record_is_an_error_or_sound(tmp_path, rows, parse, read, write):
    contents = list(damaged(rows, 2500, random.Random(0)))
    sound = []
    for content in contents:
        try:
            sound.append(parse(content))
        except DataError as error:
            check_message(error)
    assert 100 < len(sound) < 2400

    # What was accepted can be written, and comes back the same.
    path = tmp_path / "rows"
    write(path, sound)
    assert list(read(path)) == [row for row in sound if getattr(row, "relevance", 1) > 0]

    # The same from a file, where a newline among the damage makes two lines of one.
    path.write_bytes(b"\n".join(contents))
    skipped = BadRecords(keep=10_000)
    accepted = sum(1 for _ in read(path, on_bad_record="skip", skipped=skipped))
    assert accepted >= 100
    for message in skipped.messages:
        assert message.startswith("rows:")
        check_message(message)
    index = RowIndex(path, parse)
    assert len(index) >= accepted + skipped.count
    for row in range(len(index)):
        try:
            index[row]
        except DataError as error:
            check_message(error)


def test_a_damaged_table_of_instructions_is_an_error_or_sound(tmp_path):
    path = tmp_path / "query_instructions.tsv"
    sound = 0
    for content in damaged(INSTRUCTION_ROWS, 750, random.Random(1)):
        path.write_bytes(content)
        try:
            instructions = mbeir.read_instructions(path)
        except DataError as error:
            check_message(error)
            continue
        sound += 1
        mbeir.write_instructions(path, instructions.values())
        assert mbeir.read_instructions(path) == instructions
    assert 50 < sound < 700


def test_damaged_text_pairs_are_errors_or_sound(tmp_path):
    path = tmp_path / "nli.csv"
    accepted = 0
    skipped = BadRecords(keep=10_000)
    for content in damaged(["\n".join(PAIR_ROWS)], 750, random.Random(2)):
        path.write_bytes(b"sent0,sent1,hard_neg\n" + content + b"\n" + PAIR_ROWS[0].encode())
        try:
            table = PairTable(path, PairColumns())
        except DataError as error:  # the whole table, as a name of a column is damaged
            check_message(str(error))
            continue
        for pair in table.pairs("skip", skipped):
            assert all((pair.query.text, pair.document.text))
            assert all(part.text for part in pair.negatives)
            accepted += 1
    assert accepted > 750
    assert skipped.count > 100
    for message in skipped.messages:
        check_message(message)


def test_a_damaged_image_is_an_error_or_decodes(tmp_path):
    rng = random.Random(3)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    images = []
    for image_format, mode in (
        *[("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "CMYK")],
        *[("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB"), ("PPM", "RGB")],
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert("RGB").convert(mode).save(buffer, image_format)
        images.append(buffer.getvalue())

    count = 1000
    contents = [damage_bytes(rng.choice(images), rng) for _ in range(count)]
    pool = []
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.img").write_bytes(content)
        pool.append(mbeir.Candidate(f"x:{number}", None, f"{number}.img", "image"))
    mbeir.write_candidates(tmp_path / "cand_pool/local/mbeir_x_task4_cand_pool.jsonl", pool)
    report = validation.validate(tmp_path)
    (file,) = report.files
    assert file.records + file.bad == count
    assert 100 < file.bad < count - 100
