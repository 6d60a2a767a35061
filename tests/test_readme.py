"""The examples in README and docs run as they stand, on a small model in place of the real one."""

import re
from pathlib import Path

import numpy as np

from puma_jax.data import mbeir
from tests.reference import random_image

ROOT = Path(__file__).parent.parent


def run_examples(page: str, replace: dict[str, str] | None = None) -> dict:
    """Run all Python blocks of a page, one after the other, and return the names they leave."""
    names: dict = {}
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert examples, f"{page} has no example"
    for code in examples:
        for given, small in (replace or {}).items():
            code = code.replace(given, small)
        exec(code, names)
    return names


def test_the_readme(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_image(120, 80).save("bike.jpg")
    small = {"Qwen/Qwen2-VL-2B-Instruct": str(tiny.folder), "keep_layers(12)": "keep_layers(3)"}
    names = run_examples("README.md", small)
    assert names["vectors"].shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, atol=1e-5)
    assert (tmp_path / "my-puma/config.json").exists()
    assert names["config"].kept_layers == (0, 1, 2)


def test_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples("docs/data.md")
    assert mbeir.discover("mine").union_train is not None
    report = mbeir.validate("mine", check_images=False)
    assert report.sound, str(report)
