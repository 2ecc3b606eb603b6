"""docs/index.html, one page for all steps, in a browser; and workshop/diff_steps.py, the same in a terminal.

Promise: the page of all steps, docs/index.html, shows the scripts and the text of the READMEs unchanged.
Keys, swipes and links move through its pieces, in light and dark mode, on a phone and on a projector. It
loads nothing from the network.
"""

import html
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import FOLDERS, ROOT, errors, finish, start

from docs.generate import onepage
from docs.generate.pieces import merged, pieces, script
from docs.generate.stops import places, stops

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PACKAGES = ROOT / "tests" / "pages" / "browser" / "node_modules"
INSTALL = "npm install --prefix tests/pages/browser --no-package-lock --ignore-scripts"
SIZES = {"phone": (390, 844), "laptop": (1280, 800), "projector": (1920, 1080)}
URL = onepage.PAGE.as_uri()
ALL = {f"{step}-{stop.name}": stop for step in FOLDERS for stop in stops(step)}
STEPS = list(FOLDERS)
DIFF = [sys.executable, str(ROOT / "workshop" / "diff_steps.py")]


def package(path):
    """A file of an npm package; without it, the test is skipped."""
    if not (PACKAGES / path).exists():
        pytest.skip(f"tests/pages/browser has no {path.partition('/')[0]}: {INSTALL}")
    return PACKAGES / path


@pytest.fixture(scope="module")
def chromium():
    """One browser for the tests of this file."""
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens the page; checks at the end that the console is empty, and that nothing else was loaded."""
    said, asked, opened, contexts = [], [], [], []

    def visit(to="", size="laptop", theme="light", url=URL, **more):
        width, height = SIZES[size]
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # a machine may be busy
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url[:200]))
        opened.append(url)
        page.goto(f"{url}#{to}" if to else url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((*opened, "data:"))] == []


def here(page):
    """The stop that is shown; checks that it is the only one."""
    shown = page.eval_on_selector_all(
        "article", "all => all.filter(each => each.checkVisibility()).map(each => each.id)"
    )
    assert len(shown) == 1, shown
    assert page.evaluate("location.hash") in ("", f"#{shown[0]}")
    return shown[0]


def lines(page, selector):
    """The lines of the scripts that can be seen, each with its text, sign and number."""
    return page.eval_on_selector_all(
        f".page.on .code {selector}",
        """all => all.filter(each => each.checkVisibility()).map(each => ({
            text: each.textContent, number: Number(each.dataset.n),
            sign: {DEL: "-", INS: "+", DIV: " "}[each.tagName], where: each.closest(".run").dataset.f }))""",
    )


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


# --- What is made


def test_the_page_is_as_make_docs_makes_it():
    """It fails if a script or a README has changed since the page was made: run `make docs`."""
    now, then = onepage.PAGE.read_text().splitlines(), onepage.make().splitlines()
    stale = [(i, *pair) for i, pair in enumerate(zip(now, then, strict=False)) if pair[0] != pair[1]]
    print(*[f"line {i}: {a[:200]}\n  make docs: {b[:200]}" for i, a, b in stale[:10]], sep="\n")
    assert stale == [] and len(now) == len(then)


def test_made_twice_it_is_the_same_to_the_byte():
    words = [
        sys.executable,
        "-c",
        "from docs.generate import onepage; print(onepage.make(), end='')",
    ]
    made = [
        subprocess.run(
            words, capture_output=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    print([len(each) for each in made])
    assert made[0] == made[1]


class Links(HTMLParser):
    """Collects ids, links, and what is loaded."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loaded = [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset") if values.get(name)]
        if tag == "link":
            self.loaded.append(values["href"])


def test_one_small_file_whose_links_lead_somewhere():
    text = onepage.PAGE.read_text()
    size, keys = len(text.encode()), (ROOT / "docs" / "generate" / "onepage.js").read_text().splitlines()
    print(f"{size:,} bytes, {len(keys)} lines of JavaScript")
    assert size < 1_500_000 and len(keys) < 200
    found = Links()
    found.feed(text)
    assert [each[:80] for each in found.loaded if not each.startswith("data:")] == []
    assert re.findall(r"url\(|@import|\bfetch\(|XMLHttpRequest|import\(", text) == []
    assert len(found.ids) == len(set(found.ids))
    assert set(ALL) <= set(found.ids)
    for link in found.links:
        url = urlsplit(link)
        if url.scheme or not url.path:
            assert url.scheme or url.fragment in found.ids, link
            continue
        file = onepage.PAGE.parent / unquote(url.path)
        assert file.exists(), link
        if url.fragment and not url.fragment.startswith("L"):
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert url.fragment in map(onepage.slug, titles), link
    print(f"{len(found.links)} links")


def test_all_changes_and_all_pictures_are_on_the_way():
    """Each changed line of the scripts is in a stop; each picture is on the page, in two themes."""
    for before, after in itertools.pairwise(STEPS):
        old, new = (set().union(*(places(stop)[side] for stop in stops(after))) for side in (0, 1))
        changed = [line for lines in pieces(before, after).values() for line in lines]
        assert [str(line) for line in changed if line.old not in old and line.new not in new] == []
    text = onepage.PAGE.read_text()
    drawn = {path.name for path in (ROOT / "docs" / "pictures").glob("*.png")}
    assert text.count('src="data:image/png') == len(drawn) and drawn


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_color_can_be_read_on_each_ground(theme):
    """In the scripts: every color of the syntax on every background that a line may have, at least 4.5:1."""
    style = (ROOT / "docs" / "generate" / "onepage.css").read_text()
    both = {
        name: colors[theme == "dark"]
        for name, *colors in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    }
    grounds = ("ground", "old", "new", "old-lit", "new-lit", "lit", "shade")
    inks = ("ink", "faint", "comment", "string", "number", "keyword", "function", "builtin")
    bad = []
    pairs = [(ink, ground) for ink in inks for ground in grounds]
    pairs += [("link", "ground"), ("link", "shade")]
    pairs += [(f"{kind}-sign", f"{kind}{lit}") for kind in ("old", "new") for lit in ("", "-lit")]
    for ink, ground in pairs:
        dim, bright = sorted(luminance(both[name]) for name in (ink, ground))
        contrast = (bright + 0.05) / (dim + 0.05)
        print(f"{theme}: {ink} on {ground}: {contrast:.1f}")
        if contrast < 4.5:
            bad.append(f"{ink} on {ground}: {contrast:.2f}")
    assert bad == []


# --- In a browser


@pytest.mark.slow
def test_arrow_keys_go_from_piece_to_piece_and_from_step_to_step(visit):
    page = visit()
    assert here(page) == "ladder"
    press(page, "ArrowLeft")
    assert here(page) == "ladder"
    page.evaluate(
        """() => { window.seen = []; addEventListener("keydown", () => seen.push([
            [...document.querySelectorAll("article")].filter(e => e.checkVisibility()).map(each => each.id),
            [...document.querySelectorAll("nav [aria-current]")].map(each => each.hash)])) }"""
    )
    names = [*ALL, "pictures", "workshop"]
    press(page, *["ArrowRight"] * len(names))
    wanted = [[[name], [f"#{name[:2]}" if name in ALL else f"#{name}"]] for name in names]
    assert page.evaluate("seen") == wanted
    press(page, "ArrowRight", "ArrowLeft", "ArrowLeft")
    assert here(page) == list(ALL)[-1]
    press(page, "ArrowUp")
    assert here(page) == f"04-{stops('04')[0].name}"
    press(page, "ArrowDown")
    assert here(page) == f"05-{stops('05')[0].name}"
    press(page, "2")
    assert here(page) == f"02-{stops('02')[0].name}"
    press(page, "0")
    assert here(page) == "ladder"


def swipe(page, x, y):
    """One finger, from the middle of the screen, in four moves."""
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        where = [{"x": 195 + x * part, "y": 400 + y * part} for part in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})

    touch("touchStart", 0)
    for part in (0.25, 0.5, 0.75, 1):
        touch("touchMove", part)
    touch("touchEnd")


@pytest.mark.slow
def test_a_swipe_goes_to_the_next_piece(visit):
    """Without `overscroll-behavior-x`, a swipe to the right goes back to the page that was open before."""
    first, second = "03-no-more-spawn", "03-no-more-spawn-end"
    page = visit(first, "phone", has_touch=True, is_mobile=True)
    for x, y, to in (
        (-150, 10, second),
        (150, 10, first),
        (-20, -250, first),  # this one scrolls
        (-100, -250, first),  # and so does this one
        (-30, 0, first),  # and this one is a finger that shakes
        (150, 0, "03-run-it"),
    ):
        swipe(page, x, y)
        page.wait_for_function("id => document.querySelector('article.on').id === id", arg=to)
        assert here(page) == to


def test_a_link_opens_its_piece_with_its_lines_lit(visit):
    """Each stop has its heading and, of both scripts, exactly the lines of its piece."""
    page = visit("workshop")
    seen = page.evaluate(
        """async names => {
            const found = [];
            for (const name of names) {
                const moved = new Promise(done => addEventListener("hashchange", done, {once: true}));
                location.hash = name;
                await moved;
                const shown = [...document.querySelectorAll("article")].filter(e => e.checkVisibility());
                const lit = side => Object.fromEntries([...document.querySelectorAll(
                    `.page.on .code .${side} .lit`)].map(line => [line.dataset.n, line.textContent]));
                const focus = document.activeElement;
                found.push([shown.map(each => each.id), focus.id, focus.innerText, lit("old"), lit("new")]);
            }
            return found;
        }""",
        list(ALL),
    )
    for (name, stop), (shown, focus, heading, *lit) in zip(ALL.items(), seen, strict=True):
        assert (shown, focus) == ([name], f"h-{name}")
        assert heading.startswith(re.sub(r"^Step \d+: ", "", stop.heading).replace("`", ""))
        for step, numbers, found in zip(
            (f"{int(stop.step) - 1:02}", stop.step), places(stop), lit, strict=True
        ):
            wanted = {str(number): script(step).splitlines()[number - 1] for number in numbers}
            assert found == wanted
    print(f"{len(ALL)} stops")
    for to, opens in (("03", f"03-{stops('03')[0].name}"), ("workshop", "workshop"), ("nothing", "ladder")):
        assert here(visit(to)) == opens


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS[1:])
def test_two_scripts_stand_side_by_side(visit, step):
    """The older script is left, the newer one right; equal lines are side by side, changes have signs."""
    before = f"{int(step) - 1:02}"
    name = next(name for name, stop in ALL.items() if stop.step == step and stop.request)
    page = visit(name)
    for side, sign in ((".old", "-"), (".new", "+")):
        wanted = [line for line in merged(before, step) if line.sign in (" ", sign)]
        shown = lines(page, f"{side} .l")
        assert [line["text"] for line in shown] == [line.text for line in wanted]
        assert [line["sign"] for line in shown] == [line.sign for line in wanted]
    tops = page.eval_on_selector_all(
        ".page.on .same",
        """all => all.map(run => ["old", "new"].map(side => run.querySelector(`.${side} .l:not(.extra)`)
            .getBoundingClientRect())).map(([a, b]) => [a.top - b.top, b.left - a.right])""",
    )
    assert all(abs(top) < 1 and -1 < gap < 20 for top, gap in tops)
    signs = page.eval_on_selector_all(
        ".page.on .code .change .l:not(.extra)",
        "all => all.map(line => getComputedStyle(line, '::before').content.trim())",
    )
    assert signs and all(re.search(r"[-+]\"$", sign) for sign in signs)


@pytest.mark.slow
def test_a_key_folds_all_but_the_lesson(visit):
    name = "02-the-evaluation"
    page = visit(name)
    whole = lines(page, ".l")
    press(page, "f")
    left = lines(page, ".l")
    print(f"{len(whole)} lines, {len(left)} when folded")
    lesson = {"Trainer.__init__", "Trainer.evaluate"}
    assert {line["where"] for line in left if line["sign"] == " "} == lesson
    kept = [line for line in whole if line["sign"] != " " or line["where"] in lesson]
    assert left == kept and len(left) < len(whole) / 2
    assert page.get_attribute("[data-key=f]", "aria-pressed") == "true"
    press(page, "ArrowRight", "ArrowRight")  # to another piece, which is another lesson
    assert {line["where"] for line in lines(page, ".l") if line["sign"] == " "} == {"Trainer.save_snapshot"}
    press(page, "f")
    assert lines(page, ".l") == whole


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_key_shows_the_whole_script(visit, step):
    page = visit(
        [name for name, stop in ALL.items() if stop.step == step and (stop.request or step == "01")][-1]
    )
    press(page, "w")
    shown = lines(page, ".l")
    assert [line["text"] for line in shown] == script(step).splitlines()
    assert [line["number"] for line in shown] == list(range(1, len(shown) + 1))
    press(page, "w")
    assert step == "01" or len(lines(page, ".l")) > len(shown)


@pytest.mark.slow
def test_whoever_has_no_mouse_gets_everywhere(visit):
    page = visit("03-run-it")
    page.evaluate("document.querySelector('.skip').focus()")
    order = []
    for _ in range(18):
        order.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
        press(page, "Tab")
    print(order)
    assert order[:9] == [
        "To the piece",
        "ladder",
        *STEPS,
        "pictures",
        "workshop",
    ]
    assert order[9].startswith("Back") and order[15].startswith("Keys")
    page.focus("[data-key=ArrowRight]")
    press(page, "Enter")
    assert here(page) == "03-no-more-spawn"
    assert page.evaluate("document.activeElement.dataset.key") == "ArrowRight"  # so Enter works again
    page.focus(".page.on .code")
    at = page.evaluate("document.querySelector('.page.on .code').scrollTop")
    press(page, "ArrowUp")
    page.wait_for_function("at => document.querySelector('.page.on .code').scrollTop < at", arg=at)
    assert here(page) == "03-no-more-spawn"  # the arrow has scrolled what has the focus


@pytest.mark.slow
def test_help_lists_the_keys_and_letters_can_be_turned_off(visit):
    page = visit("03")
    press(page, "?")
    assert page.is_visible("#help")
    listed = page.inner_text("#help table")
    assert all(key in listed for key in onepage.KEYS)
    press(page, "f")  # does nothing while the help is open
    page.uncheck("#letters")
    press(page, "Escape")
    assert not page.is_visible("#help")
    press(page, "f", "w", "5")
    assert page.evaluate("document.documentElement.className") == "js"
    assert here(page).startswith("03")
    keys = page.eval_on_selector_all("[data-key]", "all => all.map(each => each.dataset.key)")
    assert all(len(key) > 1 or any(key in one.split() for one in onepage.KEYS) for key in keys)


@pytest.mark.slow
def test_the_stop_is_said(visit):
    page = visit("03")
    press(page, "ArrowRight", "ArrowRight")
    said = page.inner_text("[aria-live=polite]")
    print(said)
    assert said == "Step 03: torchrun starts the processes. No more spawn 3 of 8. spawn"


def pictures_seen(page):
    return page.eval_on_selector_all(
        "article.on img",
        "all => all.filter(e => e.checkVisibility()).map(e => [e.className, e.naturalWidth])",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("theme", "other"), [("light", "dark"), ("dark", "light")])
def test_light_and_dark_follow_the_system_and_a_key(visit, theme, other):
    page = visit("pictures", theme=theme)
    for now in (theme, other):
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 300) == (now == "dark")
        shown = pictures_seen(page)
        assert {name for name, _ in shown} == {now} and all(width > 500 for _, width in shown)
        press(page, "d")
    page.emulate_media(color_scheme=other)
    page.wait_for_function("other => document.documentElement.dataset.theme === other", arg=other)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("size", "theme", "tried"),
    [
        ("laptop", "light", ["ladder", "01-how-it-works", "02-the-evaluation", "workshop", "?"]),
        ("laptop", "dark", ["05-the-bytes", "02-the-evaluation"]),
        ("phone", "light", ["02-the-evaluation"]),
    ],
)
@pytest.mark.slow
def test_axe_finds_nothing(visit, size, theme, tried):
    """Contrast, landmarks, headings, names, focus: all rules of axe-core, on each kind of stop."""
    rules = package("axe-core/axe.min.js").read_text()
    page = visit(tried[0], size, theme)
    page.evaluate(rules)
    found = []
    for to in tried:
        if to == "?":
            press(page, to)
        elif here(page) != to:
            page.evaluate("to => location.hash = to", to)
            page.wait_for_function("id => document.querySelector('article.on').id === id", arg=to)
        report = page.evaluate(
            """axe.run({exclude: [".page:not(.on)", "article:not(.on)"]}, {resultTypes: ["violations"]})
                .then(({violations, passes}) => ({violations, passes: passes.length}))"""
        )
        for broken in report["violations"]:
            nodes = [node["html"][:160] for node in broken["nodes"][:3]]
            found.append(f"{to}: {broken['id']}: {broken['help']}: {nodes}")
        print(f"{to}: {report['passes']} rules are kept")
        assert report["passes"] > 10
    print(*found, sep="\n")
    assert found == []


@pytest.mark.few(1)
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_its_screen(visit, tmp_path, size):
    """Nothing sticks out at the sides; on a projector, letters are large. Screenshots are in tmp_path."""
    for theme, name in (("light", "03-torchrun-starts-the-processes"), ("dark", "05-saving")):
        page = visit(name, size, theme)
        if size == "projector":
            press(page, "p")
        file = tmp_path / f"{size}-{theme}.png"
        page.screenshot(path=file)
        print(file)
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        shown = "article.on p", "article.on .diff .l" if size == "phone" else ".page.on .lit"
        for selector in shown:
            boxes = page.eval_on_selector_all(
                selector,
                """all => all.map(e => [e.getBoundingClientRect(), parseFloat(getComputedStyle(e).fontSize)])
                    .map(([box, letter]) => [box.left, box.right, letter])""",
            )
            assert boxes
            assert all(-1 <= left < right <= SIZES[size][0] + 1 for left, right, _ in boxes)
            smallest = min(letter for *_, letter in boxes)
            print(f"{size}: {selector}: {smallest} px")
            assert smallest >= {"phone": 12, "laptop": 12, "projector": 1080 / 51}[size]
        if size == "projector":  # a clicker's keys
            press(page, "PageDown")
            assert here(page) != name
            press(page, "PageUp")
            assert here(page) == name


@pytest.mark.slow
def test_print_has_all_pieces_and_no_buttons(visit):
    page = visit("03")
    press(page, "d")
    page.emulate_media(media="print")
    shown = page.eval_on_selector_all(
        "article", "all => all.filter(each => each.checkVisibility()).map(each => each.id)"
    )
    assert shown == ["ladder", *ALL, "pictures", "workshop"]
    assert not any(page.is_visible(each) for each in ("nav", ".keys", ".code", ".again", "#said"))
    assert page.eval_on_selector_all(
        "img", "all => all.filter(e => e.checkVisibility()).every(e => e.className === 'light')"
    )
    printed = "".join(page.eval_on_selector_all(".diff", "all => all.map(each => each.textContent)"))
    changed = [line.text for each in STEPS[1:] for stop in stops(each) for line in stop.lines]
    assert [text for text in changed if text not in printed] == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_without_scripts_all_is_there(visit):
    page = visit("03-no-more-spawn", java_script_enabled=False)
    assert page.locator("article:visible").count() == len(ALL) + 3
    assert page.locator(".code:visible").count() == len(STEPS)


DIAGRAMS = [
    (path.relative_to(ROOT), text)
    for path in sorted(ROOT.glob("**/*.md"))
    if "node_modules" not in path.parts and ".venv" not in path.parts
    for text in re.findall(r"^```mermaid\n(.*?)^```$", path.read_text(), re.M | re.S)
]


def test_mermaid_draws_the_diagrams_of_the_pages(visit, tmp_path):
    """As GitHub does, without an error in any diagram."""
    assert len(DIAGRAMS) >= 2
    file = tmp_path / "diagrams.html"
    file.write_text("<!doctype html><meta charset=utf-8><title>diagrams</title><link rel=icon href='data:,'>")
    page = visit(url=file.as_uri())
    page.add_script_tag(content=package("mermaid/dist/mermaid.min.js").read_text())
    page.evaluate("mermaid.initialize({startOnLoad: false})")
    for number, (path, text) in enumerate(DIAGRAMS):
        drawn = page.evaluate(
            "async ([id, text]) => (await mermaid.render(id, text)).svg", [f"d{number}", text]
        )
        words = html.unescape(re.sub(r"<[^>]+>", " ", drawn))
        print(f"{path}: {len(drawn)} bytes of SVG")
        assert "Syntax error" not in words
        for name in re.findall(r"participant \w+ as (.+)", text):
            assert name in words


# --- In a terminal


def test_diff_steps_shows_all_pieces_when_nobody_can_press_enter(tmp_path):
    status, out, err = finish(start([*DIFF, "02", "03"], tmp_path))
    print(out, err)
    assert (status, err) == (0, "") and "\033" not in out and "Enter" not in out
    changed = [str(line) for some in pieces("02", "03").values() for line in some]
    assert [line for line in changed if line not in out.splitlines()] == []
    shown = [stop for stop in stops("03") if stop.request]
    assert [f"--only {stop.name}" for stop in shown] == re.findall(r"^--only .*$", out, re.M)
    assert "torchrun does what `spawn` and parent.py did in step 02." in " ".join(out.split())


def test_diff_steps_lists_pieces_and_shows_one(tmp_path):
    status, listed, _ = finish(start([*DIFF, "4", "5", "--list"], tmp_path))
    print(listed)
    names = [line.split()[0] for line in listed.splitlines()]
    assert status == 0 and names == [stop.name for stop in stops("05") if stop.request]
    status, out, _ = finish(start([*DIFF, "4", "5", "--only", names[3]], tmp_path))
    print(out)
    assert status == 0 and re.findall(r"^--only (.*)$", out, re.M) == [names[3]]
    found = next(stop for stop in stops("05") if stop.name == names[3])
    assert "\n".join(map(str, found.lines)) in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["02", "04"], "step 04 does not follow step 02"),
        (["03", "02"], "step 02 does not follow step 03"),
        (["05", "06"], "there is no step 06"),
        (["02"], "required: MM"),
        (["02", "03", "--only", "nothing"], "there is no piece nothing"),
        (["02", "03", "--lines"], "--lines"),
    ],
)
def test_diff_steps_answers_a_wrong_question_with_one_line(tmp_path, words, says):
    status, out, err = finish(start([*DIFF, *words], tmp_path))
    print(err)
    assert (status, out) == (2, "") and len(errors(err)) == len(err.splitlines()) == 1 and says in err


def at_a_terminal(answers):
    """What diff_steps.py shows at a terminal to somebody who types these answers, and its status in a shell.

    Ctrl-C is typed again while nothing happens: if it comes between `input`'s prompt and its reading, Python
    notes it, but does not act on it until something else is typed.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs inherit another handler
        os.execv(DIFF[0], [*DIFF, "02", "03"])
    shown, answer, end = b"", b"", time.monotonic() + 60
    try:
        while time.monotonic() < end:
            if not select.select([terminal], [], [], 0.5)[0]:
                if answer == b"\x03":
                    os.write(terminal, answer)
                continue
            try:
                part = os.read(terminal, 4096)
            except OSError:  # on Linux: nobody holds the other end any more
                break
            if not part:
                break
            shown += part
            if shown.endswith(b"q: quit "):
                if not answers:  # it should have ended: hang up
                    break
                answer = answers.pop(0)
                os.write(terminal, answer)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    ended = os.waitstatus_to_exitcode(status)
    return shown.decode(), ended if ended >= 0 else 128 - ended  # the second Ctrl-C may come as Python ends


@pytest.mark.parametrize(
    ("answers", "pieces_shown", "status"),
    [([b"\n"] * 9, 6, 0), ([b"\n", b"q\n"], 2, 0), ([b"\x04"], 1, 0), ([b"\x03"], 1, 130)],
    ids=["enter", "q", "end of input", "ctrl-c"],
)
def test_diff_steps_waits_at_a_terminal(answers, pieces_shown, status):
    shown, ended = at_a_terminal(list(answers))
    print(shown)
    assert ended == status and "Traceback" not in shown
    assert shown.count("--only ") == pieces_shown
    assert "\033[31m-def worker(rank, port, args):\033[0m" in shown
    assert "\033[32m+def worker(args):\033[0m" in shown
