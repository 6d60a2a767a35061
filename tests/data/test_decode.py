"""Images as a person sees them, against Pillow's own turning, transformers' white and Chromium."""

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from puma_jax.data import decode
from puma_jax.data.images import image_size, open_image
from puma_jax.errors import ImageError
from tests.reference import random_image

ORIENTATION = 0x0112
XMP = (
    b"XML:com.adobe.xmp\0\0\0\0\0<rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/'"
    b' tiff:Orientation="6"/>'
)


def encoded(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def turned(image_format, orientation, **options):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(random_image(24, 40), image_format, exif=exif, **options)


def png_chunks(content):
    at = 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += 12 + length


def png(chunks):
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def raw_png(rows, bits, color_type, width, transparent):
    """A PNG file of rows of packed samples, with a transparent color."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    color = struct.pack(f">{len(transparent)}H", *transparent)
    return png([(b"IHDR", header), (b"tRNS", color), (b"IDAT", packed), (b"IEND", b"")])


def raw_tiff(row, width, bits, photometric):
    """A TIFF file of one row of gray in so many bits."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1}
    tags[279] = len(row)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(row) + len(row) % 2
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", start) + row.ljust(start - 8, b"\0") + directory


def pixels(source):
    image = open_image(source)
    assert image.mode == "RGB"
    # What was applied once is not applied again.
    np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(image))
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied(image_format, orientation):
    content = turned(image_format, orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    np.testing.assert_array_equal(pixels(content), np.asarray(upright))
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(content))), np.asarray(upright))
    assert image_size(content) == (upright.height, upright.width)
    assert (upright.width < upright.height) == (orientation > 4)


def metadata_behind_pixels():
    chunks = list(png_chunks(turned("PNG", 6)))
    late = [chunk for chunk in chunks if chunk[0] == b"eXIf"]
    rest = [chunk for chunk in chunks if chunk[0] != b"eXIf"]
    plain = list(png_chunks(encoded(random_image(24, 40), "PNG")))
    return {
        "late EXIF": [*rest[:-1], *late, rest[-1]],
        "XMP": [plain[0], (b"iTXt", XMP), *plain[1:]],
        "late XMP": [*plain[:-1], (b"iTXt", XMP), plain[-1]],
        "late text": [*plain[:-1], (b"tEXt", b"date:create\x002020"), plain[-1]],
    }


@pytest.mark.parametrize("name", ["late EXIF", "XMP", "late XMP", "late text"])
def test_orientation_is_found_wherever_a_png_file_has_it(name):
    content = png(metadata_behind_pixels()[name])
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert upright.size == ((40, 24) if name == "late text" else (24, 40))
    np.testing.assert_array_equal(pixels(content), np.asarray(upright))
    assert image_size(content) == (upright.height, upright.width)


def test_a_size_is_read_from_the_header_alone():
    content = encoded(random_image(300, 200), "PNG")
    assert image_size(content[:200]) == (300, 200)


def test_a_damaged_exif_block_turns_nothing():
    content = turned("JPEG", 6)
    damaged = content.replace(b"Exif\0\0II", b"Exif\0\0XX").replace(b"Exif\0\0MM", b"Exif\0\0XX")
    assert damaged != content
    assert pixels(damaged).shape == (24, 40, 3)
    assert image_size(damaged) == (24, 40)


def transparent_images():
    image = random_image(24, 40)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1)))
    rgba, gray, palette = image.copy(), image.convert("L"), image.quantize(16)
    rgba.putalpha(alpha)
    cut = image.point(lambda value: value // 64 * 64)
    return {
        "RGBA": (rgba, "PNG", {}),
        "LA": (rgba.convert("LA"), "PNG", {}),
        "a palette's color": (palette, "PNG", {"transparency": 3}),
        "a palette's values": (palette, "PNG", {"transparency": bytes(range(0, 256, 16))}),
        "a gray": (gray.point(lambda value: value // 32 * 32), "PNG", {"transparency": 96}),
        "a color": (cut, "PNG", {"transparency": cut.getpixel((3, 3))}),
        "GIF": (palette, "GIF", {"transparency": 3}),
        "WEBP": (rgba, "WEBP", {"lossless": True}),
        "TIFF": (rgba, "TIFF", {}),
        "AVIF": (rgba, "AVIF", {}),
    }


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, of its own way
@pytest.mark.parametrize("name", transparent_images())
def test_transparent_pixels_are_laid_on_white(name, monkeypatch):
    image, image_format, options = transparent_images()[name]
    content = encoded(image, image_format, **options)
    opened = Image.open(io.BytesIO(content))
    expected = convert_to_rgb(opened, return_numpy=True)
    assert (expected != np.asarray(opened.convert("RGB"))).any()
    np.testing.assert_array_equal(pixels(content), expected)
    np.testing.assert_array_equal(pixels(opened), expected)
    monkeypatch.setattr(decode, "_STRIP_PIXELS", 7 * 40)
    np.testing.assert_array_equal(pixels(content), expected)


def test_a_palette_with_transparent_colors_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0)).quantize(4)
    assert image.mode == "P"
    assert (pixels(image) == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_gray_of_few_bits_is_that_of_the_file(bits):
    """As Chromium 156 shows it; Pillow compares the file's value with those of 8 bits."""
    values = np.arange(8) % 2**bits
    row = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(bits, "big")
    content = raw_png([row], bits, 0, 8, [1])
    expected = np.where(values == 1, 255, values * 255 // (2**bits - 1))
    for source in (content, opened := Image.open(io.BytesIO(content)), opened):
        np.testing.assert_array_equal(pixels(source)[0, :, 0], expected)


def test_a_transparent_color_of_16_bits_is_white():
    colors = np.array([[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0xF0F0]], ">u2")
    content = raw_png([colors.tobytes()], 16, 2, 2, colors[0].tolist())
    assert pixels(content).tolist() == [[[255, 255, 255], [0x12, 0x56, 0xF0]]]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_gray_of_16_bits_keeps_its_high_byte(image_format):
    """Chromium 156 shows a PNG file of all values so, to the bit."""
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    content = encoded(Image.fromarray(values), image_format)
    for source in (content, Image.open(io.BytesIO(content)), Image.fromarray(values)):
        gray = pixels(source)
        np.testing.assert_array_equal(gray, np.repeat((values >> 8)[..., None], 3, -1))


def test_a_transparent_gray_of_16_bits_is_white():
    values = np.array([[0x1234, 0x1235, 0xFF00]], np.uint16)
    content = encoded(Image.fromarray(values), "PNG", transparency=0x1234)
    assert pixels(content)[0, :, 0].tolist() == [255, 0x12, 0xFF]


def test_gray_tiff_files_of_12_bits_and_with_white_at_0_are_right():
    assert pixels(raw_tiff(bytes.fromhex("000fff7ff0"), 3, 12, 1))[0, :, 0].tolist() == [
        0,
        255,
        127,
    ]
    row = np.array([0, 0x1234, 0xFFFF], "<u2").tobytes()
    assert pixels(raw_tiff(row, 3, 16, 0))[0, :, 0].tolist() == [255, 255 - 0x12, 0]
    assert pixels(raw_tiff(row, 3, 16, 1))[0, :, 0].tolist() == [0, 0x12, 255]


@pytest.mark.parametrize(
    ("dtype", "message"),
    [(np.float32, 'mode "F", floats without an agreed'), (np.int32, '"I", integers of 32 bits')],
)
def test_numbers_without_an_agreed_white_are_refused(dtype, message):
    image = Image.fromarray(np.full((5, 4), 1, dtype))
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match=message):
            read(encoded(image, "TIFF"))
    with pytest.raises(ImageError, match=f"^image has pixels .*{message}"):
        open_image(image)


def test_the_first_frame_of_an_animation_is_read():
    frames = [random_image(24, 40, seed) for seed in range(3)]
    for image_format in ("GIF", "PNG", "WEBP"):
        options = {"save_all": True, "append_images": frames[1:], "lossless": True}
        content = encoded(frames[0], image_format, **options)
        expected = Image.open(io.BytesIO(content)).convert("RGB")
        np.testing.assert_array_equal(pixels(content), np.asarray(expected))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_threads_may_share_an_image(image_format):
    image = random_image(700, 900)
    content = encoded(image.quantize(64) if image_format == "GIF" else image, image_format)
    expected = np.asarray(open_image(content))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            shared = Image.open(io.BytesIO(content))
            for result in pool.map(open_image, [shared] * 4):
                np.testing.assert_array_equal(np.asarray(result), expected)


def test_another_program_is_not_started(tmp_path, monkeypatch):
    def started(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(random_image(20, 20), "EPS"))
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match=r"photo.jpg cannot be decoded: .* none of JPEG, PNG"):
            read(path)
    message = r"photo.jpg is EPS, expected one of JPEG, .*: decode it first"
    with Image.open(path) as opened, pytest.raises(ImageError, match=message):
        open_image(opened)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        for path in (tmp_path / "fifo.jpg", tmp_path / "socket.jpg", "/dev/zero"):
            for read in (open_image, image_size):
                with pytest.raises(ImageError, match=f"{path} is a pipe, a socket or a device"):
                    read(path)
    with pytest.raises(ImageError, match="is a folder, expected an image file"):
        open_image(tmp_path)
    (tmp_path / "link.png").symlink_to("image.png")
    with pytest.raises(ImageError, match=r"link\.png does not exist"):
        open_image(tmp_path / "link.png")
    random_image(20, 30).save(tmp_path / "image.png")
    assert image_size(tmp_path / "link.png") == (20, 30)


@pytest.mark.parametrize("path", ["a\nb\udcff.jpg", "a\0.jpg", "a" * 300])
def test_an_error_about_any_path_is_one_line_that_can_be_printed(path):
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert str(caught.value).isprintable()


def test_an_image_without_pixels_is_refused():
    for source in (np.zeros((0, 4, 3), np.uint8), Image.new("RGB", (4, 0))):
        with pytest.raises(ImageError, match="image has 4 × 0 pixels, expected at least 1 × 1"):
            open_image(source)


def test_pixels_in_flight_are_limited_over_threads(monkeypatch):
    monkeypatch.setattr(decode, "PIXELS_IN_FLIGHT", 2500)
    lock, in_flight, most = threading.Lock(), [0], [0]

    def work(image):
        with decode.decoded(image):
            with lock:
                in_flight[0] += image.width
                most[0] = max(most[0], in_flight[0])
            time.sleep(0.002)
            with lock:
                in_flight[0] -= image.width

    images = [Image.new("L", (1, 100 * (1 + n % 9))) for n in range(40)]
    images = [Image.new("L", (image.height, 1)) for image in images] + [Image.new("L", (9000, 1))]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, [*images, *images]))
    # The one above the limit is decoded, too, but alone.
    assert most[0] == 9000
    most[0] = 0
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, images[:-1] * 3))
    assert 900 < most[0] <= 2500


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_threads_keep_no_memory_of_large_images():
    code = """
import io, re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
from puma_jax.data import decode

def decoded(content):
    with decode.decoded(content):
        pass

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

file = io.BytesIO()
Image.new("RGB", (6000, 3600)).save(file, "PNG", compress_level=1)
decode.PIXELS_IN_FLIGHT = 1
decoded(file.getvalue())
alone = peak()
with ThreadPoolExecutor(6) as pool:
    list(pool.map(decoded, [file.getvalue()] * 12))
print(peak() / alone)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 3  # more than 5 if every thread keeps its own


def test_an_error_while_an_image_is_open_gives_its_pixels_back():
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), decode.decoded(random_image(9, 9)):
            _ = 1 / 0
    assert decode._pixels == 0


def test_a_forked_process_decodes_while_a_thread_of_its_parent_does():
    code = """
import os, threading
from PIL import Image
from puma_jax.data import decode

def hold():
    with decode._turn, decode._lock_of(image):
        held.set()
        done.wait()

image, held, done = Image.new("L", (9, 9)), threading.Event(), threading.Event()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    with decode.decoded(image):
        os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
done.set()
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "7"


def heic(orientation=1):
    import pillow_heif

    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = pillow_heif.from_pillow(random_image(64, 128))
    content = io.BytesIO()
    file.save(content, exif=exif.tobytes(), quality=-1, chroma=444, matrix_coefficients=0)
    return content.getvalue()


def test_heic_files_are_read_with_the_extra_and_turned():
    content = heic()
    np.testing.assert_array_equal(pixels(content), np.asarray(random_image(64, 128)))
    assert image_size(content) == (64, 128)


def test_a_heic_file_without_the_extra_names_it(monkeypatch, tmp_path):
    (tmp_path / "a.jpg").write_bytes(heic())
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(
        ImageError, match=r"a.jpg .* HEIC needs pillow-heif, .*pip install pillow-heif"
    ):
        open_image(tmp_path / "a.jpg")
    avif = encoded(random_image(20, 20), "AVIF")
    assert image_size(avif[:8] + b"mif1" + avif[12:]) == (20, 20)
