"""Evaluate embeddings on M-BEIR: query sets, search, metrics, reports, pictures and MTEB."""
