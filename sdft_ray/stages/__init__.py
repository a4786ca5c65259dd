"""The Ray shell: one thin file per stage. A stage reads artifacts and writes one; no tensor arithmetic here."""
