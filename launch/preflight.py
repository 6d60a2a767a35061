"""Check all hosts before a long job: `python launch/preflight.py --bucket FOLDER`.

Run it on every host like the job itself, with the same `--distributed.*` flags. The first host
prints a line for each check; all hosts exit with 1 if a check failed.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import metadata
from json import dumps, loads

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from puma_jax import cli
from puma_jax.errors import PumaError
from puma_jax.parallel.multihost import DistributedConfig, initialize

_PACKAGES = (
    "jax jaxlib libtpu jax-cuda13-plugin jax-cuda12-plugin tokamax flax optax orbax-checkpoint "
    "transformers puma-jax"
)
_ALONE = DistributedConfig()
_GATHERED_MIB = 64
_CLOCK_TOLERANCE_S = 2.0


def main(
    bucket: str | None = None,
    min_free_gib: float = 10.0,
    json: bool = False,
    distributed: DistributedConfig = _ALONE,
) -> None:
    """Check that all hosts are alike, reach each other, and can write to the output folder.

    Args:
        bucket: Output folder of the job, also gs://...; all hosts must see it. The default checks
            none.
        min_free_gib: Free disk space in GiB that every host needs, in the current folder and for
            temporary files.
        json: Print one JSON object instead of lines.
        distributed: How the hosts connect to each other.
    """
    initialize(distributed)
    checks: list[Callable[[], str]] = [devices, versions, total, bandwidth, clock]
    checks += [partial(disk, min_free_gib), *([partial(folder, bucket)] if bucket else [])]
    results = []
    for check in checks:
        name = getattr(check, "func", check).__name__
        try:
            results.append({"name": name, "ok": True, "found": check()})
        except Exception as error:  # any error is a finding
            results.append({"name": name, "ok": False, "found": _line(error)})
            if check is devices:  # hosts that differ cannot gather results
                break
    ok = all(result["ok"] for result in results)
    lines = [f"{'ok  ' if r['ok'] else 'FAIL'} {r['name']}: {r['found']}" for r in results]
    print(dumps({"ok": ok, "checks": results}, indent=2) if json else "\n".join(lines), flush=True)
    if results[0]["ok"]:
        gather("")  # a launcher may kill all hosts when one fails: wait until the first has printed
    sys.exit(0 if ok else 1)


def devices() -> str:
    """Check that all hosts have the same devices, on the requested platform."""
    hosts = Counter(device.process_index for device in jax.devices())
    kinds = Counter(device.device_kind for device in jax.devices())
    found = f"hosts: {len(hosts)}, {', '.join(f'{kind}: {n}' for kind, n in kinds.items())}"
    if len(kinds) > 1 or len(set(hosts.values())) > 1:
        raise PumaError(f"{found}; devices of each host: {dict(hosts)}; expected the same on all")
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted and {"cuda": "gpu", "rocm": "gpu"}.get(wanted, wanted) != jax.default_backend():
        raise PumaError(f"{found}, but JAX_PLATFORMS asks for {wanted}: look at drivers and extras")
    return found


def versions() -> str:
    """Check that all hosts run the same package versions."""
    installed = {found.name: found.version for found in metadata.distributions()}
    mine = {name: installed.get(name) for name in _PACKAGES.split()}
    hosts = [loads(text) for text in gather(dumps({"python": platform.python_version(), **mine}))]
    differences = [
        f"{name} is {version} on host 0 but {found[name]} on host {host}"
        for host, found in enumerate(hosts)
        for name, version in hosts[0].items()
        if found[name] != version
    ]
    if differences:
        raise PumaError(f"{'; '.join(differences)}: install the same on all")
    return ", ".join(f"{name} {version}" for name, version in hosts[0].items() if version)


def total() -> str:
    """Check a sum over all devices."""
    count, (numbers, everywhere) = jax.device_count(), _numbers()
    add = jax.jit(lambda x: (x + 1).sum(), out_shardings=everywhere)
    found, right = int(add(numbers).addressable_data(0)), count * (count + 1) // 2
    return _all(found == right, f"1 + ... + {count} is {found}", str(right))


def bandwidth() -> str:
    """Measure an all-gather over all devices, and check that the data arrive intact."""
    count, (numbers, everywhere) = jax.device_count(), _numbers()
    length = _GATHERED_MIB * 2**20 // 4 // count
    parts = jax.jit(lambda x: jnp.repeat(x, length), out_shardings=numbers.sharding)(numbers)
    all_gather = jax.jit(lambda x: x, out_shardings=everywhere)
    arrived = np.asarray(all_gather(parts).addressable_data(0))
    intact = np.array_equal(arrived, np.repeat(np.arange(count), length))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        all_gather(parts).block_until_ready()
        seconds.append(time.perf_counter() - start)
    slowest = max(float(text) for text in gather(str(np.median(seconds))))
    speed = 4 * length * (count - 1) / slowest / 1e9  # the data that one device receives
    found = f"{_GATHERED_MIB} MiB gathered in {slowest * 1e3:.1f} ms, {speed:.2f} GB/s a device"
    return _all(intact, found if count > 1 else "one device alone", "all parts unchanged")


def clock() -> str:
    """Check that the hosts' clocks agree: logs, file times and certificates rely on it."""
    gather("")  # all hosts continue at the same time
    times = [float(text) for text in gather(f"{time.time():.3f}")]
    if max(times) - min(times) > _CLOCK_TOLERANCE_S:
        ahead = ", ".join(f"host {host} {t - times[0]:+.1f} s" for host, t in enumerate(times))
        raise PumaError(f"{ahead}, expected {_CLOCK_TOLERANCE_S} s at most: set them by NTP")
    return f"{max(times) - min(times):.2f} s apart"


def disk(min_free_gib: float) -> str:
    """Check that every host has disk space in this folder and for temporary files."""
    places = (os.getcwd(), tempfile.gettempdir())
    free, place = min((shutil.disk_usage(place).free / 2**30, place) for place in places)
    return _all(free >= min_free_gib, f"{free:.1f} GiB free in {place}", f"{min_free_gib:g} GiB")


def folder(path: str) -> str:
    """Check that every host can write, read and delete in a folder, and sees what host 0 wrote."""
    root, token = epath.Path(path), secrets.token_hex(8)
    mine, first = root / f"preflight-{token}", root / f"preflight-{gather(token)[0]}"
    steps: tuple[Callable[[], object], ...] = (
        lambda: root.mkdir(parents=True, exist_ok=True),
        lambda: mine.write_text(token),
        first.read_text,
        lambda: mine.unlink(missing_ok=True),
    )
    wrong = ""
    for step in steps:
        try:
            step()
        except Exception as error:  # file systems and bucket clients raise errors of any kind
            wrong = wrong or _line(error)
        gather("")  # read after all have written, delete after all have read
    return _all(not wrong, wrong or path, "a folder that all hosts share and may write to")


def gather(text: str) -> list[str]:
    """Return the texts of all hosts; every host must call this."""
    line = np.zeros(2048, np.uint8)
    data = text.encode()[: line.size]
    line[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(line)
    return [bytes(row[row > 0]).decode(errors="replace") for row in rows]


def _all(ok: bool, found: str, expected: str) -> str:
    """Return what was found if it is right on all hosts.

    Raises:
        PumaError: It is wrong on some host.
    """
    hosts = gather(("+" if ok else "-") + found)
    bad = [f"host {host}: {text[1:]}" for host, text in enumerate(hosts) if text[0] == "-"]
    if bad:
        raise PumaError(f"{'; '.join(bad)}; expected {expected}")
    return found


def _line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, PumaError) else f"{type(error).__name__}: {text}"


def _numbers() -> tuple[jax.Array, NamedSharding]:
    """Return 0, 1, ... with one number on each device, and the sharding of replicated arrays."""
    values = np.arange(jax.device_count(), dtype=np.int32)
    mesh = jax.make_mesh(values.shape, ("all",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("all"))
    numbers = jax.make_array_from_callback(values.shape, spread, lambda index: values[index])
    return numbers, NamedSharding(mesh, PartitionSpec())


if __name__ == "__main__":
    cli.run(main)
