"""Check and measure everything that is to be known of one NVIDIA GPU, in eight minutes.

    pip install -e '.[cuda,test]' && python benchmarks/gpu.py --out gpu

torch has to be a build for CUDA; nothing is downloaded. Each part is a process. All start at once,
load their libraries and compile side by side, which is what takes longest; they measure one by one,
see `machine.alone`. The host and the tests come last, in the time that is left. One that fails or
is not done after eight minutes does not keep the others, and compiled programs are kept in the
folder, so that a second run is faster. After every part `gpu.json` and `gpu.md` are written anew,
beside the output of each part. `--smoke` runs all parts on a CPU, at a size that means nothing, to
show that they run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path

import machine

HERE = Path(__file__).parent
# One line, as JSON; jax is asked in a process of its own, which gives the memory back.
ABOUT = """
import importlib.metadata, json, jax, torch
names = ("jax", "jaxlib", "tokamax", "torch", "transformers", "sentence-transformers", "flash-attn")
installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
versions = {name: installed.get(name) for name in names}
device = jax.devices()[0]
print(json.dumps({"card": device.device_kind, "backend": jax.default_backend(),
                  "capability": getattr(device, "compute_capability", None),
                  "torch_finds_cuda": torch.cuda.is_available(), "versions": versions}))
"""


@dataclass(frozen=True)
class Part:
    """One process: what it shows, and its command on a GPU and on a CPU.

    Two sides of a comparison are processes of their own where one leaves the other no memory.
    """

    name: str
    shows: str
    command: tuple[str, ...]
    smoke: tuple[str, ...]
    is_last: bool = False
    """Whether it starts when all before it are done, for it keeps all cores or the card busy."""


_PYTEST = ("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/model/test_parity.py")
_STEP = ("benchmarks/stage2_step.py", "--only")
_HOST = ("benchmarks/pipeline.py", "--repeats", "1", "--turns", "1")
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
_TOY = (
    *("benchmarks/stage2_step.py", "--toy", "--pairs", "4", "--mini-batch", "4", "--rank", "4"),
    *("--dtype", "float32", "--repeats", "1"),
)
PARTS = (
    Part(
        "forward",
        "decoder and tower beside torch sdpa",
        (
            *("benchmarks/forward.py", "--dtype", "bfloat16", "--layers", "12"),
            *("--length", "2048", "--rows", "8"),
        ),
        ("benchmarks/forward.py", "--toy", "--length", "64", "--rows", "1", "--repeats", "1"),
    ),
    Part(
        "embedding",
        "a mixed corpus from files to vectors beside sentence-transformers",
        ("benchmarks/embedding.py", "--batch-sizes", "32", "64"),
        ("benchmarks/embedding.py", "--toy", "--items", "6", "--batch-sizes", "6"),
    ),
    Part(
        "step",
        "a step of the paper's second stage: adapters, images",
        (*_STEP, "puma_jax"),
        _TOY,
    ),
    Part(
        "step of sentence-transformers",
        "the same step with its cached loss",
        (*_STEP, "sentence-transformers", "--repeats", "2"),
        (),  # the part before runs both, which compares them
    ),
    Part(
        "attention",
        "every kernel on packed rows, forward and backward, against float32",
        ("benchmarks/attention.py",),
        ("benchmarks/attention.py", "--toy", "--repeats", "1"),
    ),
    Part(
        "search",
        "exact search of a million bfloat16 vectors of 1,536 values",
        (
            *("benchmarks/search.py", "--alone", "--dtype", "bfloat16", "--repeats", "3"),
            *("--documents", "1000000"),
        ),
        (
            *("benchmarks/search.py", "--alone", "--dtype", "bfloat16", "--repeats", "1"),
            *("--documents", "300", "--width", "32", "--queries", "2", "--k", "5"),
        ),
    ),
    Part(
        "host",
        "items prepared from files, by cores",
        (*_HOST, "--cores", "1", str(_CORES)),
        (*_HOST, "--cores", "1", "--images", "4"),
        is_last=True,
    ),
    Part(
        "parity",
        "the parity ladder against transformers, float32",
        (*_PYTEST, "-k", "not windowed and not deepstack"),
        (*_PYTEST, "--collect-only"),  # the suite runs it on CPUs
        is_last=True,
    ),
)


def environment(smoke: bool, out: Path) -> dict[str, str]:
    """Return the environment of the processes."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    chosen = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # for tests.reference
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # all of them need memory
        "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        machine.LOCK: str(out / "lock"),
    }
    if smoke:
        fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        return {**os.environ, **chosen, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast}
    return {**os.environ, **chosen, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}


def run(
    part: Part, smoke: bool, out: Path, deadline: float, after: Sequence[Future] = ()
) -> dict[str, object]:
    """Run a part once others are done; return how it ended, its results and its tables."""
    wait(after)
    results, log = (out / f"{part.name.replace(' ', '-')}{end}" for end in (".json", ".log"))
    results.unlink(missing_ok=True)
    command = [sys.executable, *(part.smoke if smoke else part.command)]
    settings = environment(smoke, out)
    if "pytest" in command:
        # Parts of a model that tests call by themselves do not ask for all bits of float32.
        settings["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    else:
        command += ["--json", str(results)]
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command,
                cwd=HERE.parent,
                env=settings,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(0.1, deadline - time.monotonic()),
                check=False,
            ).returncode
            ended = "ok" if code == 0 else f"exited with {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {time.monotonic() - start:.0f} s"
    output = log.read_text("utf-8", errors="replace")
    return {
        "ended": ended,
        "seconds": round(time.monotonic() - start, 1),
        "results": json.loads(results.read_text("utf-8")) if results.exists() else None,
        "tables": [line for line in output.splitlines() if re.match(r"\||.*puma_jax is ", line)],
        "last_lines": output.splitlines()[-12:],
    }


def write(out: Path, about: dict, found: dict[str, dict]) -> None:
    """Write what was found so far as JSON and as a page of tables."""
    everything = {"machine": about, "parts": found}
    (out / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items() if v)
    lines = [f"# {about['card']}", "", f"{versions}, {os.cpu_count()} cores.", ""]
    lines += ["| part | shows | ended | seconds |", "|---|---|---|--:|"]
    for part in PARTS:
        if part.name in found:
            of = found[part.name]
            lines.append(f"| {part.name} | {part.shows} | {of['ended']} | {of['seconds']} |")
    for name, of in found.items():
        failed = ["```", *of["last_lines"], "```"] if of["ended"] != "ok" else []
        lines += ["", f"## {name}", "", *(of["tables"] or of["last_lines"][-1:]), *failed]
    (out / "gpu.md").write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder to write to")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument(
        "--limit", type=int, default=480, help="seconds for all parts together (default: 480)"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on a CPU")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + arguments.limit * (10 if arguments.smoke else 1)
    asked = subprocess.run(
        [sys.executable, "-c", ABOUT],
        env=environment(arguments.smoke, out),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode:
        parser.exit(1, f"jax or torch does not start: {asked.stderr.splitlines()[-1]}\n")
    about = json.loads(asked.stdout.splitlines()[-1])
    if not arguments.smoke and not about["torch_finds_cuda"]:
        print("torch finds no GPU: the parts that compare with it fail; install a CUDA build")
    parts = [
        part
        for part in PARTS
        if (not arguments.parts or part.name in arguments.parts)
        and (part.smoke or not arguments.smoke)
    ]
    found: dict[str, dict] = {}
    with ThreadPoolExecutor(len(parts)) as threads:
        started: dict[Future, Part] = {}
        for part in parts:
            after = list(started) if part.is_last and not arguments.smoke else []
            job = threads.submit(run, part, arguments.smoke, out, deadline, after)
            started[job] = part
        for future in as_completed(started):
            name = started[future].name
            found[name] = future.result()
            write(out, about, found)
            print(f"{name}: {found[name]['ended']}, {found[name]['seconds']} s")
            print(*found[name]["tables"], sep="\n", flush=True)
    failed = [name for name, of in found.items() if of["ended"] != "ok"]
    print(f"written: {out / 'gpu.json'} and gpu.md")
    if failed:
        parser.exit(1, f"failed: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
