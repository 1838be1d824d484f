"""The way of text: rows, tokenizers, packed windows, mixtures, batches."""
