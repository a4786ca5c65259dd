"""Analysis of finished runs: why these blocks were removed, and how evaluated models compare."""
