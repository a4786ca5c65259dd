"""One self-contained page about a run, and the table at its end. Plain values in, text out."""
