"""Training: a run is a list of stages, a stage is one compiled step over planned batches."""
