"""Makes what the pages show from the scripts and from recorded runs: `make docs`.

Nothing is measured here: what benchmarks/ has recorded is in benchmarks/results, and `make record` runs the
pages' commands anew. A second `make docs` changes nothing. `make test` fails where a first one would change a
page.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from docs.generate import answer_sheet, cheatsheet, notebooks, onepage, pages, pictures

if __name__ == "__main__":
    pictures.draw_all()
    for page in pages.PAGES:
        page.write_text(pages.filled(page))
    notebooks.build_all()  # of the pages as they are now
    onepage.build()
    cheatsheet.build(cheatsheet.SOURCE, cheatsheet.PDF)
    answer_sheet.build()
