"""The site builds without a warning, loads nothing from other hosts, and its pictures are small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.docs.pages import PAGES, ROOT, name_of

PICTURES = sorted((ROOT / "docs/img").glob("*.svg"))
LOADED = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc(?:set)?=[\"']?(?:https?:)?//"
    r"|<link\b(?=[^>]*rel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*href=[\"']?(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_strict_build_has_no_dead_link(site):
    assert (site / "index.html").exists()
    assert "mac_loss" in (site / "reference/losses/index.html").read_text("utf-8")


def test_nothing_is_loaded_from_other_hosts(site):
    for page in site.rglob("*.html"):
        assert not LOADED.search(page.read_text("utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text("utf-8"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_has_colors_for_light_and_dark(picture):
    text = picture.read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert len(text) < 200_000
    if picture.name not in ("logo.svg", "license.svg"):
        assert root.get("id") == "only-dark"
        assert 'id="only-light"' in text
        assert "#only-light:target" in text


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "launch/README.md"])
def test_links_between_files_of_the_repository_resolve(page):
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for link in (first or second for first, second in links):
        # Badges are pages of the host, beside the repository's files.
        if not link.startswith(("http", "#", "../../actions/")):
            assert (folder / link.split("#")[0]).exists(), f"{page}: {link}"


def test_no_page_and_no_message_promises_a_package_that_does_not_exist():
    for path in (*PAGES, *(ROOT / "puma_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")):
        text = path.read_text("utf-8")
        assert "puma-jax[" not in text, name_of(path)
        assert "pypi.org/project/puma" not in text, name_of(path)
