"""The commands of `babel`, by what they work on.

Each file declares its own and imports what they need when they run.
"""
