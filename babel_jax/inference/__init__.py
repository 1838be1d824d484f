"""Text generation: decoding with a cache, from one prompt or in a conversation."""
