"""Examples in docstrings say what happens."""

import doctest
import importlib
import pkgutil

import puma_jax


def test_the_examples_are_true():
    names = [module.name for module in pkgutil.walk_packages(puma_jax.__path__, "puma_jax.")]
    run = 0
    for name in names:
        if not name.endswith("__main__"):
            results = doctest.testmod(importlib.import_module(name))
            assert not results.failed, name
            run += results.attempted
    assert run >= 8
