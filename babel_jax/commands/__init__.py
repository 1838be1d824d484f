"""The commands of `babel`, grouped by their subject.

Each file declares its commands, and imports the code that they need only when they run.
"""
