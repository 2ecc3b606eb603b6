"""A workshop in a room without a network: collect what the laptops need in a folder, and install from it.

    python workshop/bundle.py prepare DIR    with a network: collect the repository, MNIST and wheels in DIR
    python3 DIR/bundle/bundle.py install     on a laptop, from a copy of DIR: set up the repository in DIR

Both commands need only Python and pip. Exit status: 0 if everything is done, 1 if something could not be
collected or installed, 2 if the command was wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

from doctor import ROOT, OneLineParser, damage, python_of, quoted, reach, stop  # noqa: E402

COPY = HERE.parents[1]  # of the folder DIR, for `install`: this file is then in DIR/bundle
OWN_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Names that are not packed if there is no git to say what belongs to the repository.
LEFT_OUT = {".git", ".venv", "data", "checkpoints", "mine", "__pycache__", ".DS_Store", ".mutants"}


class Markers(NamedTuple):
    """What a requirement such as `triton; platform_system == "Linux"` can ask about a platform."""

    os_name: str
    sys_platform: str
    platform_system: str
    platform_machine: str


def manylinux(machine: str) -> list[str]:
    """Return pip's names for a Linux with glibc 2.28 (2018) or newer, which torch needs."""
    names = [f"manylinux_2_{minor}" for minor in range(28, 4, -1)]
    names += ["manylinux2014", "manylinux2010", "manylinux1", "linux"]
    return [f"{name}_{machine}" for name in names]


PLATFORMS = {  # pip's names for them, and their markers
    "linux-x86_64": (manylinux("x86_64"), Markers("posix", "linux", "Linux", "x86_64")),
    "linux-aarch64": (manylinux("aarch64"), Markers("posix", "linux", "Linux", "aarch64")),
    "macos-arm64": (["macosx_14_0_arm64"], Markers("posix", "darwin", "Darwin", "arm64")),
    "windows-amd64": (["win_amd64"], Markers("nt", "win32", "Windows", "AMD64")),
}


def this_platform() -> str:
    """Return this machine's name among PLATFORMS, or a name of the same kind."""
    system = platform.system().lower().replace("darwin", "macos")
    return f"{system}-{platform.machine().lower()}"


def copy_mnist(raw: Path, to: Path) -> None:
    """Copy the files that `to` does not have yet, or not completely."""
    to.mkdir(parents=True, exist_ok=True)
    for name in damage(to):
        shutil.copyfile(raw / name, to / name)


# --- prepare


def prepare(args: argparse.Namespace) -> None:
    """Collect in the folder `args.dir` what laptops without a network need."""
    platforms = args.platform or [this_platform()]
    for name in platforms:
        if name not in PLATFORMS:
            stop(f"torch has no wheels for {name}; --platform takes: {', '.join(PLATFORMS)}")
    if not re.fullmatch(r"3\.[1-9]\d?", args.python):
        stop(f"--python takes a version such as {OWN_PYTHON}, not '{args.python}'")
    if not args.requirements.is_file():
        stop(f"{args.requirements} does not exist: --requirements takes a file such as requirements.txt")
    if importlib.util.find_spec("pip") is None:
        stop(f"this Python has no pip: {quoted(sys.executable, '-m', 'ensurepip')}", 1)
    bundle = args.dir / "bundle"
    wheels = bundle / "wheels"
    complete = bundle / "bundle.json"  # written last, so that an incomplete bundle has none
    complete.unlink(missing_ok=True)
    shutil.rmtree(wheels, ignore_errors=True)  # pip could choose one that an earlier `prepare` has left
    wheels.mkdir(parents=True)
    print(f"repository: {pack_repository(bundle / 'repository.tar', args.dir)}", flush=True)
    collect_mnist(args.data_dir, args.dir / "data" / "MNIST" / "raw")
    (bundle / "requirements.txt").write_text("\n".join(read_requirements(args.requirements)) + "\n")
    for name in platforms:
        collect_wheels(bundle, name, args.python, args.index_url)
    for name in ("bundle.py", "doctor.py"):
        shutil.copyfile(HERE.parent / name, bundle / name)
    about = {"python": args.python, "platforms": platforms, "requirements": args.requirements.name}
    complete.write_text(json.dumps(about, indent=1) + "\n")
    for line in describe_torch(wheels):
        print(line)
    size = sum(path.stat().st_size for path in args.dir.rglob("*") if path.is_file()) / 10**6
    print(f"{args.dir} has {size:,.0f} MB. Copy it to each laptop.")
    print(f"Then, in that copy, with Python {args.python}:\n\n    python3 bundle/bundle.py install")


def pack_repository(file: Path, folder: Path) -> str:
    """Pack the repository, without `folder`, which may be in it; return which version it is."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT)]
        archive = [*git, "archive", "--format=tar", f"--output={file.resolve()}", "HEAD"]
        done = subprocess.run(archive, capture_output=True, text=True)
        if done.returncode:
            stop(f"git could not pack the repository: {done.stderr.strip()}", 1)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        changed = len(status.stdout.splitlines())
        missing = f"; changes not in it, because they are not committed: {changed}" if changed else ""
        return f"its newest commit{missing}"

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = ROOT / member.name
        is_cache = path.name.startswith(".") and path.name.endswith("_cache")
        is_bundle = path.resolve() in (folder.resolve(), folder.resolve() / "bundle")
        is_left_out = is_cache or is_bundle or path.name in LEFT_OUT
        return None if is_left_out else member

    with tarfile.open(file, "w") as tar:
        for path in sorted(ROOT.iterdir()):
            tar.add(path, path.name, filter=wanted)
    return "this folder, because there is no git"


def collect_mnist(data_dir: Path, to: Path) -> None:
    """Copy MNIST from `data_dir`. If it is not there, download it first."""
    raw = data_dir / "MNIST" / "raw"
    if damage(raw):
        sys.path.insert(0, str(ROOT))
        try:
            from common.mnist import download
        except ImportError as error:
            stop(f"MNIST is not in {data_dir}, and downloading it needs torch ({error})", 1)
        problem = download(data_dir, raw)
        if problem:
            stop(f"MNIST is not in {data_dir} and could not be downloaded ({problem}); see --data-dir", 1)
    for name, problem in damage(raw).items():
        stop(f"{raw / name} {problem}; delete it, or use another --data-dir", 1)
    copy_mnist(raw, to)
    print("MNIST: copied", flush=True)


def read_requirements(file: Path) -> list[str]:
    """Return the requirements in a file, and in the files that it names with -r."""
    requirements = []
    for line in file.read_text().splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        other = re.match(r"(?:-r|--requirement)[\s=]+(.+)", line)
        if other:
            requirements += read_requirements(file.parent / other[1])
        elif line:
            requirements.append(line)
    return requirements


def collect_wheels(bundle: Path, name: str, python: str, index: str) -> None:
    """Download the wheels that a platform needs, with pip as it is configured here."""
    words = [sys.executable, str(HERE), "--pip", name, python]
    words += ["download", "--only-binary=:all:", f"--dest={bundle / 'wheels'}", "--progress-bar=off"]
    words += [f"--requirement={bundle / 'requirements.txt'}", f"--python-version={python}"]
    words += ["--implementation=cp", *(f"--platform={tag}" for tag in PLATFORMS[name][0])]
    if index and name.startswith("linux"):
        why = reach(f"{index.rstrip('/')}/torch/")
        if why:
            print(f"{name}: {index} does not answer ({why}), so pip uses only its own configuration")
        else:
            words.append(f"--extra-index-url={index}")
    print(f"{name}: wheels for Python {python} …", flush=True)
    if subprocess.run(words).returncode:
        stop(f"pip did not find all wheels for {name} and Python {python}; its message is above", 1)


def run_pip(name: str, python: str, *words: str) -> NoReturn:
    """In a child process of `collect_wheels`: run pip for another platform, and exit.

    Its flag --platform chooses the wheels. But pip asks this machine whether to install a requirement with
    `platform_system == "Linux"`, so it gets the other platform's answers here.
    """
    from pip._internal.cli.main import main as pip
    from pip._vendor.packaging import markers

    own = markers.default_environment()
    other = {**PLATFORMS[name][1]._asdict(), "python_version": python, "python_full_version": f"{python}.0"}
    markers.default_environment = lambda: {**own, **other}
    sys.exit(pip(list(words)))


def describe_torch(wheels: Path) -> list[str]:
    """Return a line for each build of torch: those only for CPUs are much smaller than the others."""
    lines = []
    for path in sorted(wheels.glob("torch-*.whl")):
        _, version, _, _, tag = path.stem.replace("%2B", "+").split("-")
        cuda = "manylinux" in tag and "+cpu" not in version and any(wheels.glob("nvidia_*.whl"))
        lines.append(f"torch {version} ({tag}): {'with CUDA' if cuda else 'only for CPUs'}")
    return lines


# --- install


def install(folder: Path, to: Path) -> None:
    """Set up the repository in `to` from what `prepare` has collected in `folder`, without a network."""
    bundle = folder / "bundle"
    if not (bundle / "bundle.json").is_file():
        stop(f"{folder} has no complete bundle: make one with `bundle.py prepare`, and copy all of it")
    about = json.loads((bundle / "bundle.json").read_text())
    if about["python"] != OWN_PYTHON:
        found = f"the wheels are for Python {about['python']}, but this is Python {OWN_PYTHON}"
        stop(f"{found}: use python{about['python']}")
    if this_platform() not in about["platforms"]:
        stop(f"the wheels are for {', '.join(about['platforms'])}, but this is {this_platform()}")
    raw = folder / "data" / "MNIST" / "raw"
    for name, problem in damage(raw).items():
        stop(f"{raw / name} {problem}: copy it again", 1)
    to.mkdir(parents=True, exist_ok=True)
    kept = unpack(bundle / "repository.tar", to)
    print(f"repository: in {to}{f', which already had: {kept}' if kept else ''}", flush=True)
    copy_mnist(raw, to / "data" / "MNIST" / "raw")
    print(f"MNIST: in data\nwheels: going to {to / '.venv'} …", flush=True)
    install_wheels(bundle, to)
    # make would install these again, which needs a network, if its marks were missing.
    marks = {"requirements.txt": ["installed"], "requirements-dev.txt": ["installed", "installed-dev"]}
    for mark in marks.get(about["requirements"], []):
        (to / ".venv" / mark).touch()
    doctor = f"cd {quoted(to)} && {quoted(python_of(Path()))} workshop/doctor.py"
    print(f"wheels: installed\n\nNext:\n\n    {doctor}")


def unpack(file: Path, to: Path) -> str:
    """Unpack the repository into `to`; return the names that were there before, which stay as they are."""
    kept = []
    with tempfile.TemporaryDirectory(dir=to, prefix=".unpacking-") as scratch:
        shutil.unpack_archive(file, scratch)
        for path in sorted(Path(scratch).iterdir()):
            if (to / path.name).exists():
                kept.append(path.name)
            else:
                os.replace(path, to / path.name)
    return ", ".join(kept)


def install_wheels(bundle: Path, to: Path) -> None:
    """Create an environment in `to`, and install the requirements in it."""
    if subprocess.run([sys.executable, "-m", "venv", str(to / ".venv")]).returncode:
        stop(f"no environment; on Debian and Ubuntu this needs the package python{OWN_PYTHON}-venv", 1)
    words = [str(python_of(to)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    words += ["--no-index", f"--find-links={bundle / 'wheels'}"]
    words += [f"--requirement={bundle / 'requirements.txt'}"]
    # A laptop's own settings could send pip to a network. --isolated ignores pip's environment variables, and
    # PIP_CONFIG_FILE its configuration files.
    words.append("--isolated")
    if subprocess.run(words, env={**os.environ, "PIP_CONFIG_FILE": os.devnull}).returncode:
        stop("pip could not install the wheels; its message is above", 1)


def main() -> int:
    if sys.argv[1:2] == ["--pip"]:
        run_pip(*sys.argv[2:])
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="collect what the laptops need", allow_abbrev=False)
    add = command.add_argument
    add("dir", type=Path, metavar="DIR", help="the folder, which you then copy to each laptop")
    add("--platform", action="append", metavar="NAME", help=f"{', '.join(PLATFORMS)} (this one)")
    add("--python", default=OWN_PYTHON, metavar="X.Y", help=f"the laptops' Python ({OWN_PYTHON})")
    requirements = ROOT / "requirements.txt"
    add("--requirements", type=Path, default=requirements, metavar="FILE", help="packages (requirements.txt)")
    add("--index-url", default="", metavar="URL", help="more wheels for Linux, such as those only for CPUs")
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="where MNIST is, or goes (data)")
    command = commands.add_parser("install", help="set up this machine from the folder", allow_abbrev=False)
    command.add_argument("--to", type=Path, default=COPY, metavar="FOLDER", help="where it is set up (DIR)")
    args = parser.parse_args()
    try:
        if args.command == "prepare":
            prepare(args)
        else:
            install(COPY, args.to.resolve())
    except OSError as error:
        stop(f"{error}; make room, make it writable, or choose another folder", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
