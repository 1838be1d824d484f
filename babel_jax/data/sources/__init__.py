"""The origins of text: files, web pages, the hub, the embedded corpus. They give rows, each with its
language.
"""
