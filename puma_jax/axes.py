"""Names of the mesh axes, and the tile that accelerator kernels want rows to be a multiple of.

They live here so that the model, the data and the parallel rules share them without importing each
other.
"""

DATA_AXIS = "data"
"""Devices along it hold whole copies of the weights, each with its own part of the batch."""
FSDP_AXIS = "fsdp"
"""Devices along it share out the weights of one copy, each with its own part of the batch."""
TENSOR_AXIS = "tensor"
"""Devices along it share out heads and hidden units, all with the same part of the batch."""
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
"""Axes that rows, items and the loss are spread over."""
MESH_AXES = (*BATCH_AXES, TENSOR_AXIS)
"""All axes of a mesh, in order."""

TILE = 128
"""Positions in one tile of an attention kernel."""
