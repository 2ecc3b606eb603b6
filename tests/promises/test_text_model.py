"""Your own model and data: with the workshop's patches for a text, the steps keep their promises."""

import os
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import (
    FOLDERS,
    ROOT,
    SHARDED,
    command,
    disagreements,
    errors,
    finish,
    largest_difference,
    load,
    paths,
    planted,
    start,
    train,
)
from torch.utils.data import DistributedSampler

from beyond.decoder import Block, Decoder
from beyond.text import IGNORED, LENGTH, Text, cut, in_words, load_text
from beyond.text import PIECES as DEFAULT_PIECES
from common.snapshot import snapshots, step_of
from workshop import text_model

WORKSHOP = ROOT / "workshop"
# The patch of each step, and how many changed lines it may have in its train.py, and in all files.
PATCHES = {
    "01": ("text_model_01.patch", 27, 27),
    "03": ("text_model.patch", 27, 27),
    "05": ("text_model_05.patch", 28, 28),
}
# An epoch has 53 steps of 12 pieces. 647 pieces and 107 test pieces are not divisible by 2 or 3.
BATCH = 12
PIECES = 647
FLAGS = [f"--num-samples={PIECES}", "--epochs=2", "--vit-depth=2", "--precision=float64", "--save-every=30"]
QUICK = [("03", 3, 1), ("05", 2, 2)]
# A step, its ranks, and --accumulate, which step 03 does not have.
GROWN = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in [
        *(("03", ranks, 1) for ranks in (1, 2, 3)),
        *(("05", ranks, accumulate) for ranks in (1, 2, 3) for accumulate in (1, 2)),
    ]
]


def apply(root, *steps):
    """Copy the steps, `common` and `beyond` to `root`, and apply the patches there, as text_model.py says."""
    for folder in ("common", "beyond", *(FOLDERS[step] for step in steps)):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for step in steps:
        shutil.copy(WORKSHOP / "text_model.py", root / FOLDERS[step])
        load(WORKSHOP / "break_it.py").apply_patch(WORKSHOP / PATCHES[step][0], root)
    return root


@pytest.fixture(scope="session")
def on_text(tmp_path_factory):
    """A copy of the steps that have a patch, with the patch applied."""
    return apply(tmp_path_factory.mktemp("on", numbered=False) / "text", *PATCHES)


@pytest.fixture(scope="session")
def proof(once, on_text):
    """A step's run on the text with FLAGS, made only once."""

    def get(step, ranks=1, accumulate=1):
        flags = [*FLAGS, f"--batch-size={BATCH // ranks // accumulate}"]
        flags += [f"--accumulate={accumulate}"] if accumulate > 1 else []
        return once(step, ranks, *flags, root=on_text)

    return get


def changed(patch):
    """The lines that a patch removes and adds, for each file that it changes."""
    found = {}
    for line in (WORKSHOP / patch).read_text().splitlines():
        if line.startswith("+++ b/"):
            found[line.removeprefix("+++ b/")] = lines = []
        elif line[0] in "+-" and not line.startswith("--- a/"):
            lines.append(line)
    return found


@pytest.mark.parametrize("step", PATCHES)
def test_a_patch_is_short_and_leaves_common_alone(step):
    patch, of_script, in_all = PATCHES[step]
    counts = {file: Counter(line[0] for line in lines) for file, lines in changed(patch).items()}
    for file, count in counts.items():
        print(f"{patch}: {file} +{count['+']} −{count['-']}")
    assert 0 < counts[f"{FOLDERS[step]}/train.py"].total() <= of_script
    assert sum(count.total() for count in counts.values()) <= in_all
    assert {Path(file).parts[0] for file in counts} == {FOLDERS[step]}
    assert max(len(line) for lines in changed(patch).values() for line in lines) <= 101  # "+", and 100


def lesson(step):
    """The lines of train.py that a step's patch changes, without the docstring, as step 01 has them."""
    lines = {line[1:].strip() for line in changed(PATCHES[step][0])[f"{FOLDERS[step]}/train.py"]}
    lines = {line for line in lines if not line.startswith(('"""', "$ ", "--"))}
    lines = {line.replace("self.ddp_model(", "self.model(") for line in lines}
    return {line.replace(', launcher="torchrun"', "") for line in lines}


def test_the_patches_change_the_same_lines():
    """Except for step 05's units, and its parser, which has a name there. So one patch is enough to learn."""
    one, three, five = map(lesson, PATCHES)
    print(sorted(one ^ five))
    assert len(one) > 15 and three == one
    assert one - five == {
        "return make_parser(__file__, __doc__).parse_args()",
        "parser = make_parser(__file__, __doc__)",
        "return parser.parse_args()",
    }
    script = (ROOT / FOLDERS["05"] / "train.py").read_text()
    units = re.search(r"^def units\(.*?(?=^\S)", script, re.M | re.S)
    assert five - one == {"return list(model.blocks)"} | {
        line.strip() for line in units[0].splitlines() if line.strip().startswith(("if ", "return "))
    }


@pytest.mark.sample(3)
@pytest.mark.few(1)
@pytest.mark.parametrize(("step", "ranks", "accumulate"), GROWN)
def test_on_a_text_too_every_step_ends_where_step_01_ends(proof, step, ranks, accumulate):
    """Even though the ranks of a step, and the batches of a rank, have different numbers of characters."""
    run, reference = proof(step, ranks, accumulate), proof("01")
    assert len(run.losses) == 106
    _, labels = load_text(None, PIECES)[1].tensors
    assert run.test["total"] == (labels != IGNORED).sum()  # one answer for each character
    assert disagreements(run, reference) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_have_different_numbers_of_characters(ranks):
    """In nearly all steps of the runs above: otherwise, these runs would prove little."""
    data, _ = load_text(None, PIECES)
    lengths = torch.tensor([len(piece) for piece in data.pieces])
    shares = []
    for rank in range(ranks):
        sampler = DistributedSampler(data, ranks, rank, seed=0, drop_last=True)
        shares.append(lengths[list(sampler)][: 53 * BATCH // ranks].view(53, -1).sum(dim=1))
    counts = torch.stack(shares)
    different = (counts.amax(dim=0) > counts.amin(dim=0)).sum().item()
    print(f"{different} of 53 steps; in the first two: {counts[:, :2].T.tolist()}")
    assert different > 40


@pytest.mark.parametrize(
    ("step", "ranks"),
    [("03", 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("01", 1), ("03", 2), ("05", 3)])],
)
def test_on_a_text_too_a_resumed_run_is_bit_identical(proof, on_text, tmp_path, step, ranks):
    """From step 90 of 106, which is step 37 of the 53 steps in its epoch."""
    whole = proof(step, ranks)
    (tmp_path / "snapshots").mkdir()
    [path] = [path for path in snapshots(whole.snapshot_dir, step == SHARDED) if step_of(path) == 90]
    (shutil.copytree if step == SHARDED else shutil.copy)(path, tmp_path / "snapshots" / path.name)
    run = train(step, ranks, tmp_path, *FLAGS, f"--batch-size={BATCH // ranks}", root=on_text)
    difference = largest_difference(run.weights, whole.weights)
    print(f"{run.name}, resumed after step 90 of 106: {len(run.losses)} steps, weights {difference}")
    assert "resumed from snapshots: epoch 1, step 90\n" in run.out
    assert difference == 0.0
    # The reports cover other groups of steps, so an all-reduce adds three ranks' losses in another order.
    assert (run.losses - whole.losses[90:]).abs().max() < 1e-14
    assert run.test == whole.test


def test_it_learns_more_than_which_character_is_most_common(proof):
    """On a text of sums that are not in the training text."""
    run = proof("01")
    accuracies = [event["accuracy"] for event in run.events if event["event"] == "eval"]
    _, labels = load_text(None, PIECES)[1].tensors
    labels = labels[labels != IGNORED]
    guessing = labels.unique(return_counts=True)[1].max().item() / labels.numel()
    print(f"accuracy after each epoch {accuracies}, of the most common character {guessing:.4f} (twice that)")
    assert 2 * guessing < accuracies[0] < accuracies[1]
    # Nobody can know the first number in a sum. So few steps do not show every leak; the next test does.
    assert accuracies[1] < 0.9


def test_no_guess_knows_what_follows():
    """When all characters after it change, a guess stays the same; the guesses after it do not."""
    torch.manual_seed(0)
    model = Decoder(width=64, depth=2, heads=4).double()
    text, other = torch.randint(256, (2, 3, LENGTH))
    for known in (1, 20, LENGTH - 1):
        mixed = torch.cat([text[:, :known], other[:, known:]], dim=1)
        off = (model(text) - model(mixed)).abs().amax(dim=(0, 2))
        print(
            f"{known} characters alike: guesses off by {off[:known].max():.1e}, after them {off[known]:.1e}"
        )
        assert off[:known].max() < 1e-12 < 1e-3 < off[known]


def test_each_character_is_guessed_once():
    """From the ones before it in its piece; the first one, from the last one of the previous piece."""
    text = b"one\n\n" + bytes(range(32, 232)) + b"\nthe end"
    pieces = cut(text)
    assert b"".join(pieces) == text
    assert [len(piece) for piece in pieces] == [4, 1, 64, 64, 64, 9, 7]
    data = Text(pieces, "some")
    texts, labels = data.tensors
    print(texts.shape, texts.dtype, labels.dtype)
    counted = labels != IGNORED
    assert counted.sum(dim=1).tolist() == [len(piece) for piece in pieces]
    assert bytes(labels[counted].tolist()) == text
    assert bytes(texts[counted].tolist()) == b"\n" + text[:-1]
    assert data.checksum() != Text(pieces[::-1], "some").checksum()
    assert data.checksum() != Text(pieces, "other").checksum()


def test_padding_changes_no_guess():
    """A padded piece gets the same logits as without its padding."""
    torch.manual_seed(0)
    model = Decoder(width=64, depth=2, heads=4).double()
    texts, _ = Text([b"one and one is two\n"], "some").tensors
    difference = (model(texts)[:, :19] - model(texts[:, :19])).abs().max().item()
    print(f"{difference:.1e}")
    assert difference < 1e-12


def test_the_sums_are_right_and_the_tested_ones_are_new():
    train_data, test_data = load_text(None, 2000)
    assert (len(train_data), len(test_data)) == (2000, 333)
    assert train_data.name == "sums-2000"
    assert load_text(None)[0].name == f"sums-{DEFAULT_PIECES}"
    numbers = {in_words(number): number for number in range(100)}
    assert len(numbers) == 100 and numbers["seventeen"] == 17 and numbers["forty-two"] == 42
    seen = [set(), set()]
    for found, data in zip(seen, (train_data, test_data), strict=True):
        for piece in data.pieces:
            line = piece.decode()
            assert line.endswith("\n") and len(piece) <= LENGTH
            a, b, total = (numbers[word] for word in re.split(" and | is ", line.strip()))
            assert a + b == total, line
            found.add((a, b))
    print(f"{len(seen[0])} sums to train on, {len(seen[1])} to test on")
    assert 1000 < len(seen[0]) <= 2100 and 200 < len(seen[1]) <= 400
    assert not seen[0] & seen[1]


def test_your_own_text_is_what_is_in_the_folder(tmp_path):
    (tmp_path / "b.txt").write_text("Größe " * 200)
    (tmp_path / "a.md").write_text("small\n" * 200)
    (tmp_path / "c.py").write_text("none of it")
    pieces = cut(("small\n" * 200 + "\n" + "Größe " * 200).encode())
    assert len(pieces) == 200 + 1 + 200 * 8 // 64  # the ö and the ß are two bytes each
    train_data, test_data = load_text(tmp_path)
    print(train_data.name, len(train_data), len(test_data))
    assert len(test_data) == len(train_data) // 6
    assert train_data.pieces + test_data.pieces == pieces[: len(train_data) + len(test_data)]
    assert len(pieces) - len(train_data) - len(test_data) <= 1
    fewer, _ = load_text(tmp_path, 7)
    assert fewer.pieces == pieces[:7]
    # Another text is another run, and other data for check_ranks_agree.
    (tmp_path / "a.md").write_text("smelt\n" * 200)
    again, _ = load_text(tmp_path)
    assert again.name != train_data.name and again.checksum() != train_data.checksum()
    assert load_text(None, 9)[0].checksum() == load_text(None, 9)[0].checksum()


WRONG = {
    "no folder": (["--data-dir=nowhere"], "cannot read nowhere: No such file or directory; point --data-dir"),
    "no text": (
        ["--data-dir=empty"],
        "the *.txt and *.md in empty make 0 pieces, and 2 are",
    ),
    "little text": (["--data-dir=little", "--num-samples=8"], "make 7 pieces, and 9 are"),
    "a folder as a file": (["--data-dir=odd"], "cannot read odd/a.txt: Is a directory; point --data-dir"),
    "a model of digits": (
        ["--model=cnn", "--num-samples=64"],
        "--model cnn is for digits: leave it out; --vit-width, --vit-depth",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_is_said_in_one_line(on_text, tmp_path, wrong):
    for folder in ("empty", "little", "odd/a.txt"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "little" / "a.txt").write_text("four" * 100)
    flags, said = WRONG[wrong]
    status, out, err = finish(start([*command("01", 1, on_text), "--use-gpu=0", *flags], tmp_path))
    print(out, err)
    assert status == 2 and "Traceback" not in err and len(errors(err)) == 1 and said in err
    assert sorted(os.listdir(tmp_path)) == ["empty", "little", "odd"]


def test_the_flags_size_the_decoder(on_text, tmp_path):
    flags = ["--num-samples=16", "--batch-size=16", "--epochs=1", "--vit-width=128", "--vit-depth=3"]
    run = train("01", 1, tmp_path, *flags, root=on_text)
    assert run.out.startswith("01_single_gpu: decoder-128x3 on sums-16, cpu, float32, 1 × batch 16 = 16 ")
    assert run.state["run"] == "decoder-128x3-sums-16"
    assert run.weights["head.weight"].shape == (256, 128)
    assert len({name.split(".")[1] for name in run.weights if name.startswith("blocks.")}) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--meta-init", "--activation-checkpointing", "--accumulate=3"],
        ["--no-reshard", "--cpu-offload", "--replicas=2"],
    ],
    ids=" ".join,
)
def test_step_05s_flags_change_nothing(proof, on_text, tmp_path, flags):
    batch = BATCH // 2 // (3 if "--accumulate=3" in flags else 1)
    run = train("05", 2, tmp_path, *FLAGS, f"--batch-size={batch}", *flags, root=on_text)
    assert disagreements(run, proof("01")) == []


@pytest.mark.slow
def test_step_05s_units_are_the_blocks(proof):
    """So at most the whole model without one block is gathered at a time."""
    memory = [event for event in proof("05", 2).events if event["event"] == "memory"][-1]
    gathered, whole = memory["ranks"][0][3], memory["ddp"][0]
    block = sum(weight.nbytes for weight in Block(width=64, heads=4).double().parameters())
    print(f"gathered at most {gathered:,} bytes of {whole:,}; a block has {block:,}")
    assert gathered == whole - block


@pytest.mark.slow
def test_ranks_with_other_texts_are_told(tmp_path):
    """For example, when one node has another text."""
    root = apply(tmp_path / "root", "05")
    planted(root, "05", ("load_text(args.data_dir,", "load_text(args.data_dir / os.environ['RANK'],"))
    for rank in "01":
        (tmp_path / "text" / rank).mkdir(parents=True)
        (tmp_path / "text" / rank / "a.txt").write_text(f"rank {rank} " * 100)
    words = [*command("05", 2, root), "--use-gpu=0", "--data-dir=text"]
    status, _, err = finish(start(words, tmp_path))
    print(errors(err))
    assert status != 0
    assert re.search(r"^error: rank 1 on \S+ has data text-\w+ \w+, rank 0 on \S+ has text-\w+ ", err, re.M)


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path):
    """The commands of text_model.py's docstring, which are also the page's, and the way back."""
    for name in ("common", "beyond", "workshop", FOLDERS["03"]):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = re.findall(r"^    (\S.*)$", text_model.__doc__, re.M)
    assert [shlex.split(line)[0] for line in lines] == ["cp", "git", "torchrun"]
    assert (
        "\n".join(["```sh", *lines, "```"]) in (ROOT / "docs" / "reference" / "your-own-model.md").read_text()
    )
    lines[-1] += " --num-samples 256 --epochs 1 --use-gpu 0"
    before = (ROOT / FOLDERS["03"] / "train.py").read_text()
    for line in [*lines, lines[1].replace("apply", "apply -R")]:
        env = {"PATH": paths(), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        status, out, err = finish(start(["bash", "-c", line], tmp_path, **env))
        print(f"$ {line}\n{out}\n{err}")
        assert status == 0
        if line.startswith("torchrun"):
            assert re.search(r"^epoch 1/1  test loss .* \([\d,]+ of 1,521\)$", out, re.M)
    assert (tmp_path / FOLDERS["03"] / "train.py").read_text() == before
