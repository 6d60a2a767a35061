"""Modules that worker processes import stay small."""

import subprocess
import sys

import pytest

HEAVY = ("flax", "transformers", "puma_jax.model")


@pytest.mark.parametrize("module", ["store", "plan", "packing"])
def test_data_modules_import_no_model_and_no_transformers(module):
    code = f"import sys, puma_jax.data.{module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = done.stdout.split()
    assert f"puma_jax.data.{module}" in imported
    assert not [name for name in imported if name in HEAVY]
