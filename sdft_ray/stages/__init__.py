"""The Ray shell: one thin file per stage. A stage reads artifacts and writes one; no tensor arithmetic here."""

import os

# Ray reads this when it is imported. After Ctrl-C a step's thread may ask once more, and must not start a new Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
