"""What a conversion can end with, besides success and `oss_model.errors.InputError`."""


class Incomplete(Exception):
    """The conversion could not go on, but nothing is lost: the same command, run again, resumes (exit code 3)."""


class Different(Exception):
    """What is on disk is not what it should be (exit code 1). One line a difference."""

    def __init__(self, differences: list[str]):
        self.differences = differences
        super().__init__("\n".join(differences))
