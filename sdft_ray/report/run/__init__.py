"""One run: its page, and its result in the terminal."""
