"""What means "the user can mend this": the command line turns it into one line, exit code 2; a full disk is a kind."""

import errno


class UserError(Exception):
    """One sentence that says what is wrong, where, and what to do about it."""

    def __str__(self) -> str:
        said = super().__str__()
        if said.startswith("Caught ") and "Traceback (most recent call last)" in said:
            # torch's DataLoader raises a worker's error anew, with the worker's traceback before it.
            said = said.rpartition("deepmsi.errors.")[2].partition(": ")[2].strip()
        return said


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(UserError):
    """There is no room left for a file; the command line adds how to go on."""
