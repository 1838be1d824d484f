"""Training batches: how languages are mixed, and how windows become the batches of each process."""
