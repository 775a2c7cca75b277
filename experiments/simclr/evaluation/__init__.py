"""What trained features are worth, and how it is shown."""
