"""Start-up hook (placeholder until the plugin lands)."""


def activate() -> None:
    """Do nothing yet."""
