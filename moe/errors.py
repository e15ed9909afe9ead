"""The one exception that a user's mistake raises.

Commands catch it, print its sentence without a traceback and leave with exit code 2.
"""


class UserError(ValueError):
    """What a user can cause and mend: the message says what, where, what is allowed, what to do."""
