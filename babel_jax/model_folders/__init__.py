"""Model folders in the formats of Hugging Face and Orbax: read, written and converted into each other bit for
bit.
"""
