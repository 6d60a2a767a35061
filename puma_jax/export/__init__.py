"""Models for those who do not use puma_jax: as StableHLO, for transformers, for other tools."""
