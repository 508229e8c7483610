"""The one exception that means: the input is wrong, and here is what to do about it."""


class InputError(ValueError):
    """Bad input from the user: a file, a config key, a folder. The command line prints it as one line and exits with 2."""
