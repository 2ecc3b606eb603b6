"""The stops on the way through a step: each change of the script, with the words that its README has for it.

A stop is a `<!-- diff … -->` block of a step's README and the prose around it in its section: from the
heading, or the block before it, to the next block or heading. Blocks with no word between them are one stop.
A section that introduces the step, or shows how to run it, a picture, or what a run prints, is a stop without
a change. Step 01 changes nothing: each section of its README is a stop.

A stop is named after its heading, `the-evaluation`. Further stops of a section are named after the first
function that they change, too: `the-process-group-main`.
"""

import re
from dataclasses import dataclass

from docs.generate.pieces import FOLDERS, ROOT, Line, asked_for, block, merged

BLOCK = re.compile(r"<!-- diff\n(.*?)-->\n.*?\n<!-- end -->", re.S)


@dataclass(frozen=True)
class Stop:
    """One piece of a step, its prose in Markdown; `again`: the stop before it ends with the words before."""

    step: str
    name: str
    heading: str
    before: str
    request: str
    after: str
    again: bool = False

    @property
    def lines(self) -> list[Line]:
        """What a page shows of the change, as pieces.block has it."""
        return block(f"{int(self.step) - 1:02}", self.step, self.request) if self.request else []

    @property
    def functions(self) -> list[str]:
        """Where the change is, in the order of the request."""
        return list(dict.fromkeys(function for function, _, _ in asked_for(self.request)))


def sections(text: str) -> list[tuple[str, str]]:
    """The headings of a page, each with the Markdown from there to the next heading."""
    found: list[tuple[str, list[str]]] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.fullmatch(r"#+ (.*)", line)):
            found.append((heading[1], []))
        elif found:
            found[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in found]


def slug(heading: str) -> str:
    """A heading as it is written in a link, as GitHub does it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def readme(step: str) -> str:
    return (ROOT / FOLDERS[step] / "README.md").read_text()


def stops(step: str) -> list[Stop]:
    """The stops of a step in the order of its README."""
    found: list[Stop] = []
    names: set[str] = set()

    def add(heading: str, before: str, request: str, after: str, again: bool) -> None:
        name = first = slug(re.sub(r"^Step \d+: ", "", heading))
        if name in names:
            function = next(asked_for(request))[0].rpartition(".")[2].strip("_")
            name = second = f"{first}-{slug(function)}"
            for number in range(2, 99):
                if name not in names:
                    break
                name = f"{second}-{number}"
        names.add(name)
        found.append(Stop(step, name, heading, before, request, after, again))

    for heading, text in sections(readme(step)):
        proses, requests = BLOCK.split(text)[::2], BLOCK.findall(text)
        if not requests:
            shows = heading == "Run it" or "<picture>" in text or "<!-- output" in text
            if step == "01" or not found or shows:
                add(heading, text, "", "", False)
            continue
        at = 0
        while at < len(requests):
            end = at + 1
            while end < len(requests) and not proses[end].strip():
                end += 1
            add(heading, proses[at].strip(), "".join(requests[at:end]), proses[end].strip(), at > 0)
            at = end
    return found


def places(stop: Stop) -> tuple[list[int], list[int]]:
    """The numbers of the lines of a stop, in the older script and in the newer one."""
    if not stop.request:  # of step 01: the lines to which its words lead
        linked = sorted({int(number) for number in re.findall(r"\(train\.py#L(\d+)\)", stop.before)})
        return [], linked if stop.step == "01" else []
    known = set(merged(f"{int(stop.step) - 1:02}", stop.step))
    lines = [line for line in stop.lines if line in known]
    return [line.old for line in lines if line.old], [line.new for line in lines if line.new]
