"""The one exception that means "the user can mend this": the command line turns it into one line, exit code 2."""


class UserError(Exception):
    """One sentence that says what is wrong, where, and what to do about it."""
