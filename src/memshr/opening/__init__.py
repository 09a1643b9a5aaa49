"""Opens what a user names. Each mechanism is imported when it is asked for."""
