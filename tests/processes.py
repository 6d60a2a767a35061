"""Processes that tests start."""

import os


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process with simulated devices.

    Its programs are compiled with few optimizations, which take longer than what they save here.
    """
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=1",
    )
    return {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
