"""What PSFT does to a small model's skills: `make evidence`, read in docs/evidence.md.

Importing the package makes the quickstart's modules importable: skill_data, prepare and
skills are the same definitions, written once.
"""

import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
if str(QUICKSTART) not in sys.path:
    sys.path.insert(0, str(QUICKSTART))
