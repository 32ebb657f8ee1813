"""The one error that users cause: a sentence that names the remedy. The command line exits with 2 on it."""


class InputError(ValueError):
    """Bad input: the message is one clear sentence with the remedy in it."""
