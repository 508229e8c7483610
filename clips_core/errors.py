"""The exceptions that mean: the input is wrong, and here is what to do about it."""


class InputError(ValueError):
    """Bad input from the user: a file, a config key, a folder. The command line prints it as one line and exits with 2."""


class BadSample(InputError):
    """One sample that cannot be used, among others that can. Where it is fatal, it is an `InputError` like any other.

    Attributes:
        cause: a few words that are the same for every sample with this fault ("empty caption"), to count by.
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # it comes back from a loader's worker
        return BadSample, (self.cause, str(self))


class Stopped(Exception):
    """A scheduler asked a stage to end (SIGTERM, SIGUSR1); its state is saved, and the same command goes on from it."""
