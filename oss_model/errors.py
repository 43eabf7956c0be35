"""The one error a person is shown instead of a traceback."""


class InputError(ValueError):
    """Input that cannot be used: a file, a configuration, or an argument.

    Each fault is one line that says what is wrong, where, what was expected, what was found and what to do.
    All faults known at the time are reported together; the command lines print them and exit with code 2.
    """

    def __init__(self, *faults: str):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


def raise_all(faults: list[str]) -> None:
    """Raise one `InputError` naming every fault, or return if there is none."""
    if faults:
        raise InputError(*faults)
