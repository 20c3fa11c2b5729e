"""The one exception a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave: one sentence with the value, what was expected and the fix."""
