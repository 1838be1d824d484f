"""What a user did wrong, as an exception: the command line prints it as one line and exits with status 2."""


class BadInput(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do about it."""
