"""The one exception that means: the user asked for something that cannot be done."""


class UserError(ValueError):
    """A wrong input, flag, file or shape; its one sentence says what was expected and what came."""
