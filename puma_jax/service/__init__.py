"""The HTTP service: embeddings, search, and the page that shows it."""
