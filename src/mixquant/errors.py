"""The one error that users cause: a sentence that names the remedy. The command line exits with 2 on it."""


class InputError(ValueError):
    """Bad input: the message is one clear sentence with the remedy in it, in one line, whatever names it quotes.

    below: what stands below the sentence, such as the last lines of a log.
    """

    def __init__(self, sentence: str, below: str = "") -> None:
        super().__init__(" ".join(sentence.splitlines()) + (f"\n{below}" if below else ""))
