"""What a conversion can end with, besides success and `oss_model.errors.InputError`."""

from oss_model.errors import CommandError, Incomplete

__all__ = ["Different", "Incomplete"]


class Different(CommandError):
    """What is on disk is not what it should be. One line a difference."""

    exit_code = 1

    def __init__(self, differences: list[str]):
        super().__init__(*differences)
        self.differences = self.faults
