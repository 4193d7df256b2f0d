"""What speaks to users: an error that names the place, what is wrong and the remedy; and advice."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right. The command line prints it without a traceback and exits with 2.

    `message` says where and what; `remedy` says what to do about it.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  {remedy}" if remedy else message)
        self.message, self.remedy = message, remedy


class Advice(UserWarning):
    """Something that works and that the user probably does not want; shown as one line."""
