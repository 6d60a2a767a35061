"""Report the memory of the contrastive loss on each of eight devices: dense, gathered, ring.

    python benchmarks/ring_memory.py

It prints the temporary memory of the compiled program on each device, without arguments and
results, for MAC-Loss and its gradients, with equal documents masked and a trained temperature.
Nothing runs, so sizes beyond this machine's memory work, too.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from machine import describe

from puma_jax.axes import BATCH_AXES
from puma_jax.evaluation.report import markdown
from puma_jax.losses import DENSE, Layout, mac_loss
from puma_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh

MIB = 2**20


def temporary_bytes(pairs: int, width: int, layout: Layout, mesh: jax.sharding.Mesh) -> int:
    """Return the temporary bytes of the loss and its gradients on one device."""
    share = batch_sharding(mesh)
    vectors = jax.ShapeDtypeStruct((pairs, width), jnp.float32, sharding=share)
    number = jax.ShapeDtypeStruct((pairs,), jnp.int32, sharding=share)

    def loss(queries, candidates, modality, document, tau):
        return mac_loss(
            queries,
            candidates,
            modality,
            tau_norm=tau,
            tau_hard=0.6 * tau,
            document=document,
            layout=layout,
        )

    compiled = (
        jax.jit(jax.value_and_grad(loss, (0, 1, 4)))
        .lower(vectors, vectors, number, number, jax.ShapeDtypeStruct((), jnp.float32))
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 1536])
    parser.add_argument("--chunk-size", type=int, nargs="+", default=[128, 256, 512])
    given = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = make_mesh(MeshConfig())
    forms = {"dense": DENSE}
    for kind in ("gather", "ring"):
        for chunk_size in given.chunk_size:
            forms[f"{kind}, chunk_size {chunk_size}"] = Layout(chunk_size, mesh, BATCH_AXES, kind)
    print(f"{describe()}, {mesh.size} devices, MiB of temporary memory per device")
    columns = [(pairs, width) for width in given.width for pairs in given.pairs]
    lines = [
        [name, *(f"{temporary_bytes(*size, layout, mesh) / MIB:.1f}" for size in columns)]
        for name, layout in forms.items()
    ]
    print(markdown(["form", *(f"N {n:,}, D {d:,}" for n, d in columns)], lines))


if __name__ == "__main__":
    main()
