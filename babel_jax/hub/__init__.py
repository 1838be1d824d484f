"""The Hugging Face hub: names of models, their files in the hub's cache, waiting for a busy hub, and its
errors in one line.
"""
