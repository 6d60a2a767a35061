"""Processes that tests start."""

import os


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with simulated devices.

    Its programs are compiled without optimizations: they run for a moment, and optimizing them
    takes three times as long as all the rest of their compilation.
    """
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
    )
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
