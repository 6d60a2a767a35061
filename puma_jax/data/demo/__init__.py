"""What the benchmarks share that are built here, from drawings that any machine can get."""
