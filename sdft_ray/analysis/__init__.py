"""Questions to finished runs: why these blocks went, and how evaluated models compare."""
