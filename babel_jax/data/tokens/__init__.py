"""The one way from text to token ids and back: tokenizers, special tokens, chat templates, prompts."""
