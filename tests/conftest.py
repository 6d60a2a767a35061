"""Shapes in annotations are checked at run time in every test, eight CPU devices are simulated."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("puma_jax", "beartype.beartype")
