"""Sets workshop/CHEATSHEET.md on one page to print: workshop/cheatsheet.pdf. `make docs` runs it.

A section is a heading with one table, or a paragraph at the end. A4 across, in two columns; an error when it
does not fit on one page.
"""

import re
from pathlib import Path
from xml.sax.saxutils import escape

import matplotlib
from reportlab.lib.colors import HexColor
from reportlab.lib.pagesizes import A4, landscape
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import BaseDocTemplate, Frame, KeepTogether, PageTemplate, Paragraph, Spacer, Table

ROOT = Path(__file__).resolve().parents[2]
SOURCE, PDF = ROOT / "workshop" / "CHEATSHEET.md", ROOT / "workshop" / "cheatsheet.pdf"
MARGIN, GAP = 9 * mm, 6 * mm
INK, FAINT, ACCENT, SHADE = map(HexColor, ("#1f2328", "#d1d9e0", "#0550ae", "#f6f8fa"))
FONTS = {  # matplotlib brings them
    "Text": "DejaVuSans",
    "Text-Bold": "DejaVuSans-Bold",
    "Text-Italic": "DejaVuSans-Oblique",
    "Code": "DejaVuSansMono",
}


def marked(text: str) -> str:
    """A line of Markdown as reportlab's own marks: `code`, **bold** and *italic*."""
    text = re.sub(r"`([^`]+)`", r'<font face="Code" color="#0550ae">\1</font>', escape(text))
    return re.sub(r"\*(\w+)\*", r"<i>\1</i>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text))


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def table(rows: list[str], width: float, text: ParagraphStyle) -> Table:
    """A table of Markdown; a column is as wide as the longest of its words and lines ask for."""
    head, _, *body = map(cells, rows)
    lines = [*([head] if any(head) else []), *body]
    lengths = [max(6, min(52, max(map(len, column)))) for column in zip(*lines, strict=True)]
    styled = [[Paragraph(marked(cell), text) for cell in line] for line in lines]
    looks: list[tuple[object, ...]] = [
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LINEBELOW", (0, 0), (-1, -1), 0.4, FAINT),
        ("TOPPADDING", (0, 0), (-1, -1), 1.6),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 2.2),
        ("LEFTPADDING", (0, 0), (-1, -1), 2),
        ("RIGHTPADDING", (0, 0), (-1, -1), 2),
    ]
    if any(head):
        looks.append(("BACKGROUND", (0, 0), (-1, 0), SHADE))
    return Table(styled, [width * length / sum(lengths) for length in lengths], style=looks)


def build(source: Path, to: Path) -> None:
    """Write the PDF; its bytes depend on the text alone, not on the day."""
    for name, file in FONTS.items():
        pdfmetrics.registerFont(TTFont(name, Path(matplotlib.get_data_path(), "fonts", "ttf", f"{file}.ttf")))
    pdfmetrics.registerFontFamily("Text", *list(FONTS)[:3])
    text = ParagraphStyle("text", fontName="Text", fontSize=7.8, leading=9.8, textColor=INK)
    heading = ParagraphStyle(
        "heading", text, fontName="Text-Bold", fontSize=9.5, leading=13, textColor=ACCENT
    )
    page = landscape(A4)
    width, height = (page[0] - 2 * MARGIN - GAP) / 2, page[1] - 2 * MARGIN
    title, *sections = source.read_text().split("\n## ")
    parts: list[object] = [
        Paragraph(title.strip("# \n"), ParagraphStyle("title", heading, fontSize=13, leading=17))
    ]
    for section in sections:
        name, _, rest = section.partition("\n")
        rows = [line for line in rest.splitlines() if line.startswith("|")]
        prose = " ".join(line for line in rest.splitlines() if not line.startswith("|")).strip()
        parts.append(KeepTogether([Paragraph(marked(name), heading), table(rows, width, text), Spacer(0, 5)]))
        if prose:
            parts.append(Paragraph(marked(prose), text))
    frames = [Frame(MARGIN + i * (width + GAP), MARGIN, width, height, *[0] * 4, id=str(i)) for i in range(2)]
    document = BaseDocTemplate(str(to), pagesize=page, invariant=1, title=title.strip("# \n"))
    document.addPageTemplates(PageTemplate(frames=frames))
    document.build(parts)
    if document.page > 1:
        raise SystemExit(f"error: {source} takes {document.page} pages: shorten it, until it fits on one")
