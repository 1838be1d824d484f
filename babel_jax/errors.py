"""What ends a command before its time, and is no fault of the program."""


class BadInput(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do about it. Exit status 2."""


class Preempted(BaseException):
    """SIGTERM: the machine is about to be taken away, and the command stopped where it can be resumed. Exit status 0.

    As KeyboardInterrupt, it is nothing that an `except Exception` around damaged files may take for their fault.
    """
