"""Prepared data: documents packed into windows of a fixed length, stored, counted and read back."""
