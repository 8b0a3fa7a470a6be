"""What means "the user can mend this": the command line turns it into one line, exit code 2; a full disk is a kind."""

import errno


class UserError(Exception):
    """One sentence that says what is wrong, where, and what to do about it."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(UserError):
    """There is no room left for a file; the command line adds how to go on."""
