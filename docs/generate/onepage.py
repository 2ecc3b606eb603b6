"""One page that shows how the scripts grow: docs/index.html. `make docs` makes it, and it needs no network.

It has no text of its own but the labels of its keys: the words are those of the READMEs, cut into stops
(stops.py), and the code is that of the five scripts, two and two merged (pieces.py). onepage.css has its
looks, onepage.js its keys; both go into the page, and so do the pictures.
"""

import base64
import os.path
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token as Block
from markdown_it.utils import EnvType, OptionsDict
from pygments.lexers import PythonLexer
from pygments.token import Token

from docs.generate.pieces import FOLDERS, ROOT, Line, functions, merged, script
from docs.generate.stops import Stop, places, sections, slug, stops

DOCS = ROOT / "docs"
HERE = Path(__file__).parent
PAGE = DOCS / "index.html"
COLORED = [  # what of a script is colored, and the class of that color
    (Token.Comment, "c"),
    (Token.Literal.String, "s"),
    (Token.Literal.Number, "m"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
    (Token.Name.Decorator, "f"),
    (Token.Name.Function, "f"),
    (Token.Name.Class, "f"),
    (Token.Name.Builtin, "b"),
]
KEYS = {  # of the page, with what the help says
    "→ ←": "the next piece, the one before; or swipe",
    "↓ ↑": "the next step, the one before",
    "0 … 5": "the ladder, a step",
    "f": "fold all but the lesson",
    "w": "the whole new script, alone",
    "p": "the presenter's size; PgDn and PgUp go from piece to piece, too",
    "d": "dark, light",
    "?": "this help; Esc closes it",
}
stops_of = cache(stops)  # not read before the pages are filled


# --- Code


def colored(text: str) -> list[str]:
    """The lines of a Python text, as HTML."""
    lines = [""]
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        color = next((name for above, name in COLORED if kind in above), "")
        for number, part in enumerate(value.split("\n")):
            if number:
                lines.append("")
            indent = " " * (len(part) - len(part.lstrip(" ")))
            words = escape(part[len(indent) :], quote=False)
            lines[-1] += indent + (f"<i class={color}>{words}</i>" if words and color else words)
    return lines


SCRIPTS = {step: colored(script(step)) for step in FOLDERS}


def row(sign: str, number: int | None, html: str, more: str = "") -> str:
    """A line of a script. Its number and its sign are set by the style sheet, so that they are not copied.

    A line that is too long continues below its own beginning, and may break where an attribute begins.
    """
    tag = {"-": "del", "+": "ins"}.get(sign, "div")
    words = html.lstrip(" ")
    indent = html[: len(html) - len(words)]
    if len(re.sub("<.*?>", "", html)) > 30:
        words = re.sub(r"(?<=\w)([.(])(?=[\w<*])", r"\1<wbr>", words)
    numbered = f" data-n={number}" if number else ""
    where, space = (f" i{len(indent) // 4}", f"<b>{indent}</b>") if indent else ("", "")
    return f'<{tag} class="l{where}{more}"{numbered}>{space}{words}</{tag}>'


def run(where: str, old: str, new: str, lines: int, more: str) -> str:
    """Lines that belong together: of the older script on the left, of the newer one on the right."""
    left = f'<div class="old">{old}</div>'
    what = f'data-f="{where}" data-what="⋯ {where}, {lines} {"lines" if lines > 1 else "line"}"'
    return f'<div class="run{more}" {what}>{left}<div class="new">{new}</div></div>\n'


def two_scripts(before: str, after: str) -> str:
    """Two neighboring scripts side by side; what only the newer one alone has to show is `extra`."""
    html, parts, last = SCRIPTS[after], [], 0

    def missing(upto: int) -> str:
        return "".join(row(" ", n, html[n - 1], " extra") for n in range(last + 1, upto))

    def place(line: Line) -> tuple[bool, str]:
        return line.sign == " ", line.function if line.sign == " " else ""

    for (same, where), group in groupby(merged(before, after), place):
        lines, old, new = list(group), "", ""
        for line in lines:
            if line.old:
                old += row(line.sign, line.old, SCRIPTS[before][line.old - 1])
            if line.new:
                new += missing(line.new) + row(line.sign, line.new, html[line.new - 1])
                last = line.new
        if same:
            blank = "" if any(line.text for line in lines) else " blank"
            parts.append(run(where, old, new, len(lines), f" same{blank}"))
        else:
            parts.append(run(lines[0].function, old, new, len(lines), " change"))
    return "".join(parts)


def one_script(step: str) -> str:
    """The first script."""
    lines, names = script(step).splitlines(), functions(script(step))
    parts = []
    for where, group in groupby(range(len(lines)), lambda at: names[at]):
        ats = list(group)
        blank = "" if any(lines[at] for at in ats) else " blank"
        rows = "".join(row(" ", at + 1, SCRIPTS[step][at]) for at in ats)
        parts.append(run(where, "", rows, len(ats), f" same{blank}"))
    return "".join(parts)


def diff(stop: Stop) -> str:
    """The change of a stop as its README shows it, for print and for small screens."""
    rows = ""
    for line in stop.lines:
        step, number = (f"{int(stop.step) - 1:02}", line.old) if line.sign == "-" else (stop.step, line.new)
        rows += row(line.sign, None, SCRIPTS[step][number - 1] if number else escape(line.text))
    return f'<div class="diff">{rows}</div>' if rows else ""


# --- Words


def picture(name: str, alt: str) -> str:
    """A picture of docs/pictures in both themes."""
    images = ""
    for theme in ("light", "dark"):
        data = base64.b64encode((DOCS / "pictures" / f"{name}-{theme}.png").read_bytes()).decode()
        images += f'<img class="{theme}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f'<p class="picture">{images}</p>\n'


def target(page: Path, link: str) -> str:
    """Where a page's link leads from here: to a stop if there is one, else to a file, or to the net."""
    url = urlsplit(link)
    if url.scheme:
        return link
    file = Path(os.path.normpath(page.parent / url.path)) if url.path else page
    step = next((step for step, folder in FOLDERS.items() if file.parts[-2:] == (folder, "README.md")), None)
    step = step or next((step for step, folder in FOLDERS.items() if file.name == folder), None)
    if step and not url.fragment:
        return f"#{step}-{stops_of(step)[0].name}"
    if step and any(stop.name == url.fragment for stop in stops_of(step)):
        return f"#{step}-{url.fragment}"
    if file == ROOT / "README.md" and url.fragment == "the-ladder":
        return "#ladder"
    relative = os.path.relpath(file, DOCS) + ("/" if file.is_dir() else "")
    return relative + (f"#{url.fragment}" if url.fragment else "")


def html_block(
    self: RendererHTML, tokens: Sequence[Block], at: int, options: OptionsDict, env: EnvType
) -> str:
    """Marks of docs/generate/pages.py are left out; a `<picture>` is shown in both themes."""
    found = re.search(r'alt="([^"]+)" src="[^"]*pictures/([\w-]+)-light', tokens[at].content)
    return picture(found[2], found[1]) if found else ""


def fence(self: RendererHTML, tokens: Sequence[Block], at: int, options: OptionsDict, env: EnvType) -> str:
    """A block of code, a command, or what it prints; a diagram, which only GitHub draws, behind its name."""
    token = tokens[at]
    code = escape(token.content, quote=False)
    if token.info == "python":
        code = "\n".join(colored(token.content))
    shown = f'<pre tabindex=0 role=group aria-label="{token.info}" class="{token.info}">{code}</pre>\n'
    return f"<details><summary>diagram</summary>{shown}</details>" if token.info == "mermaid" else shown


def link_open(
    self: RendererHTML, tokens: Sequence[Block], at: int, options: OptionsDict, env: EnvType
) -> str:
    """A link as seen from this page."""
    return f'<a href="{escape(target(env["page"], str(tokens[at].attrGet("href"))))}">'


def image(self: RendererHTML, tokens: Sequence[Block], at: int, options: OptionsDict, env: EnvType) -> str:
    """A large picture: a link to it will do."""
    link = target(env["page"], str(tokens[at].attrGet("src")))
    return f'<a href="{escape(link)}">{escape(tokens[at].content)}</a>'


def table_open(
    self: RendererHTML, tokens: Sequence[Block], at: int, options: OptionsDict, env: EnvType
) -> str:
    return '<div class="wide" tabindex=0 role=group aria-label="table"><table>\n'


def table_close(
    self: RendererHTML, tokens: Sequence[Block], at: int, options: OptionsDict, env: EnvType
) -> str:
    return "</table></div>\n"


MARKDOWN = MarkdownIt("commonmark").enable("table")
for rule in (html_block, fence, link_open, image, table_open, table_close):
    MARKDOWN.add_render_rule(rule.__name__, rule)


@cache
def references(page: Path) -> object:
    """The links that a page defines at its end."""
    env: EnvType = {"page": page}
    MARKDOWN.parse(page.read_text(), env)
    return env.get("references", {})


def prose(page: Path, text: str) -> str:
    """A piece of a page's Markdown as HTML."""
    env: EnvType = {"page": page, "references": references(page)}
    return str(MARKDOWN.render(text, env)).replace("<th></th>", "<td></td>")  # a column without a name


def inline(text: str) -> str:
    return str(MARKDOWN.renderInline(text))


# --- The page


def articles(step: str) -> Iterator[str]:
    """The stops of a step."""
    page = ROOT / FOLDERS[step] / "README.md"
    for number, stop in enumerate(stops_of(step), start=1):
        old, new = (" ".join(map(str, numbers)) for numbers in places(stop))
        words = "" if old or new or step == "01" else " data-words"
        again = ' class="again"' if stop.again else ""
        yield (
            f'<article id="{step}-{stop.name}" aria-labelledby="h-{step}-{stop.name}"'
            f' data-old="{old}" data-new="{new}" data-functions="{" ".join(stop.functions)}"{words}>\n'
            f'<h3 id="h-{step}-{stop.name}" tabindex="-1">{inline(re.sub(r"^Step .*?: ", "", stop.heading))}'
            f" <small>{number} of {len(stops_of(step))}</small></h3>\n"
            f"<div{again}>{prose(page, stop.before)}</div>\n{diff(stop)}"
            f"<div>{prose(page, stop.after)}</div>\n</article>\n"
        )


def contents(step: str) -> str:
    """The names of a step's stops, as links."""
    items = "".join(
        f'<li><a href="#{step}-{stop.name}">{inline(re.sub("^Step .*?: ", "", stop.heading))}</a></li>'
        for stop in stops_of(step)
    )
    more = f'<li><a href="../{FOLDERS[step]}/README.md">{FOLDERS[step]}/README.md</a></li>'
    return f"<details class=contents><summary>All pieces</summary><ol>{items}</ol><ul>{more}</ul></details>\n"


def step_page(step: str) -> str:
    """A step: its stops, and beside them the scripts."""
    before = f"{int(step) - 1:02}"
    single = step == "01"
    heading = sections((ROOT / FOLDERS[step] / "README.md").read_text())[0][0]
    code = one_script(step) if single else two_scripts(before, step)
    names = [f"{FOLDERS[each]}/train.py" for each in ([step] if single else [before, step])]
    heads = "".join(f'<a href="../{name}">{name}</a>' for name in names)
    return (
        f'<section class="page{" single" if single else ""}" id="{step}" aria-labelledby="h-{step}">\n'
        f'<div class="words" tabindex="0">\n'
        f'{contents(step)}<h2 id="h-{step}">{inline(heading)}</h2>\n'
        f"{''.join(articles(step))}</div>\n"
        f'<div class="code" tabindex="0" role="region" aria-label="{" and ".join(names)}">'
        f'<div class="names">{heads}</div>\n{code}</div>\n</section>\n'
    )


def words_page(name: str, heading: str, body: str) -> str:
    """A page without scripts, which is one stop."""
    return (
        f'<section class="page" id="page-{name}" aria-labelledby="h-{name}">\n'
        f'<div class="words" tabindex="0">'
        f'<article id="{name}" aria-labelledby="h-{name}" data-old="" data-new="" data-functions=""'
        f' data-words>\n<h2 id="h-{name}" tabindex="-1">{inline(heading)}</h2>\n{body}</article>\n'
        f"</div>\n</section>\n"
    )


def section(page: Path, heading: str) -> str:
    """A section of a page, up to the next heading."""
    return prose(page, dict(sections(page.read_text()))[heading])


def pictures() -> str:
    """The pictures that no step's page has: the sections of the pages of docs in which they are."""
    body, shown = "", "".join((ROOT / folder / "README.md").read_text() for folder in FOLDERS.values())
    for page in sorted((DOCS / "reference").glob("*.md")):
        for heading, text in sections(page.read_text()):
            found = re.search(r"pictures/([\w-]+)-light", text)
            if found and f"pictures/{found[1]}-light" not in shown:
                link = f'<a href="reference/{page.name}#{slug(heading)}">{page.name}</a>'
                body += f"<h3>{inline(heading)} <small>{link}</small></h3>\n{prose(page, text)}"
    return body


def workshop() -> str:
    """The cards and the exercises, as links."""
    page = ROOT / "workshop" / "README.md"
    body = prose(page, sections(page.read_text())[0][1])
    for folder, file, facts in (
        ("break_it", "card.md", "card.toml"),
        ("exercises", "README.md", "exercise.toml"),
    ):
        items = ""
        for each in sorted((ROOT / "workshop" / folder).glob(f"[0-9]*/{facts}")):
            title = tomllib.loads(each.read_text())["title"]
            link = f"../workshop/{folder}/{each.parent.name}/{file}"
            items += f'<li><a href="{link}">{each.parent.name[:2]} {inline(title)}</a></li>\n'
        body += f"<h3>workshop/{folder}</h3>\n<ul class=cards>\n{items}</ul>\n"
    return body


def make() -> str:
    """The page."""
    readme = ROOT / "README.md"
    title, intro = sections(readme.read_text())[0]
    style, keys = (HERE / "onepage.css").read_text(), (HERE / "onepage.js").read_text()
    names = ["ladder", *FOLDERS, "pictures", "workshop"]
    links = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in names)
    buttons = "".join(
        f'<button type="button" data-key="{key}"{pressed}>{name}<kbd>{sign}</kbd></button>'
        for key, sign, name, pressed in (
            ("ArrowLeft", "←", "Back", ""),
            ("ArrowRight", "→", "Next", ""),
            ("f", "f", "Fold", ' aria-pressed="false"'),
            ("w", "w", "Whole script", ' aria-pressed="false"'),
            ("p", "p", "Presenter", ' aria-pressed="false"'),
            ("d", "d", "Dark", ' aria-pressed="false"'),
            ("?", "?", "Keys", ""),
        )
    )
    help_ = "".join(
        f"<tr><th scope=row><kbd>{key}</kbd></th><td>{does}</td></tr>" for key, does in KEYS.items()
    )
    words = prose(readme, "\n\n".join(intro.split("\n\n")[:2]))
    words += f"<h3>The ladder</h3>\n{section(readme, 'The ladder')}"
    pages = words_page("ladder", title, words) + "".join(map(step_page, FOLDERS))
    pages += words_page("pictures", "Pictures", pictures())
    pages += words_page("workshop", "The workshop", workshop())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">To the piece</a>
<header>
<h1>{inline(title)}</h1>
<nav aria-label="Steps"><ul>{links}</ul></nav>
<div role="group" class="keys" aria-label="Keys">{buttons}</div>
</header>
<main id="main" tabindex="-1">
{pages}</main>
<p role="status" aria-live="polite" id="said"></p>
<dialog id="help" aria-labelledby="h-help">
<h2 id="h-help">Keys</h2>
<table>{help_}</table>
<p><label><input type="checkbox" id="letters" checked> letters and digits are keys</label></p>
<form method="dialog"><button>Close</button></form>
</dialog>
<script>
{keys}</script>
</body>
</html>
"""


def build() -> None:
    PAGE.write_text(make())
