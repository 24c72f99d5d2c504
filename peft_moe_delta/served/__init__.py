"""Models behind an HTTP port: whether a running server answers as the export does in plain transformers."""
