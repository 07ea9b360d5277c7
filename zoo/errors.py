"""The one exception a user can mend: its message is one line that says what is wrong and what to do."""


class ZooError(Exception):
    """Bad input, a missing file, an option out of bounds. Command lines print it as one line and exit with code 2."""
