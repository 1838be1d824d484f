"""Text from a model: decoding with a cache, one prompt or a conversation."""
