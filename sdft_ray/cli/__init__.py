"""The command `sdft`: `app.py` holds it, the other files its larger subcommands and what they print."""
