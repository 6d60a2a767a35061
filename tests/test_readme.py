"""The README's examples run as they stand, on a small model in place of the published one."""

import re
from pathlib import Path

import numpy as np

from tests.reference import random_image

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_image(120, 80).save("bike.jpg")
    names: dict = {}
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        code = example.replace("Qwen/Qwen2-VL-2B-Instruct", str(tiny.folder))
        exec(code.replace("keep_layers(12)", "keep_layers(3)"), names)
    assert names["vectors"].shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, atol=1e-5)
    assert (tmp_path / "my-puma/config.json").exists()
    assert names["config"].kept_layers == (0, 1, 2)
