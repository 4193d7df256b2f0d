"""The one exception that speaks to users: a message that names the place, what is wrong and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right. The command line prints it without a traceback and exits with 2.

    `message` says where and what; `remedy` says what to do about it.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}\n  {remedy}" if remedy else message)
        self.message, self.remedy = message, remedy
