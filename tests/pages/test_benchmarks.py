"""The benchmarks still run, and what the pages say about them is what was recorded."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, command, finish, load, ranks_of, read_run, start

from common.mnist import load_mnist
from common.models import build_model
from docs.generate import pictures

RECORDS = [json.loads(line) for line in (ROOT / "benchmarks/results/speedrun.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_speed_run_is_what_it_was(mnist_dir, tmp_path):
    """With one seed. The recorded accuracy is the mean of 30."""
    words = [sys.executable, str(ROOT / "benchmarks" / "speedrun.py"), "--seeds=1", "--ranks=2"]
    process = start([*words, f"--data-dir={mnist_dir}"], tmp_path, OMP_NUM_THREADS="1")
    status, out, err = finish(process, 300)
    print(out, err)
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    [record] = [record for record in RECORDS if (record["ranks"], record["precision"]) == (2, "float32")]
    assert result.keys() == record.keys()
    # Another processor adds in another order, like one more of the 30: none of them is four deviations off.
    assert abs(result["mean"] - record["mean"]) < 4 * record["sd"]
    assert 0 < result["train_seconds"] < result["wall_seconds"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['ranks']} ranks")
def test_the_page_gives_what_was_recorded(record):
    page = " ".join((ROOT / "docs" / "reference" / "speed.md").read_text().split())
    assert f"{record['machine']}" in page and f"torch {record['torch']}" in page
    recipe = load(ROOT / "benchmarks" / "speedrun.py").RECIPE
    assert all(flag.replace("=", " ") in page for flag in recipe) and len(recipe) == 3
    # What is not in a flag: label smoothing, and AdamW's betas.
    script = load(ROOT / "benchmarks" / "label_smoothing.py")
    correct_digit = f"{1 - 0.9 * script.SMOOTHING:g}"
    other_digit = f"{0.1 * script.SMOOTHING:g}"
    for number in (correct_digit, other_digit, *map(str, script.BETAS)):
        assert re.search(rf"\b{re.escape(number)}\b", page), number
    assert "benchmarks/label_smoothing.py" in page
    assert len(record["accuracies"]) == record["n"] >= 30 and record["mean"] >= 99.0


@pytest.mark.few(2)
@pytest.mark.parametrize("step", ["01", "03", "04", "05"])
def test_a_step_takes_another_loss_and_other_betas(tmp_path, step):
    """label_smoothing.py: training uses both, and the test loss is the usual one."""
    script = load(ROOT / "benchmarks" / "label_smoothing.py")
    ranks = ranks_of(step)
    flags = ["--num-samples=120", f"--batch-size={24 // ranks}", "--epochs=1", "--precision=float64"]
    flags += ["--use-gpu=0", "--metrics=metrics.jsonl", "--snapshot-dir=snapshots"]
    words = [*command(step, ranks)[:-1], script.__file__, step]
    status, out, err = finish(start([*words, *flags], tmp_path))
    print(out, err)
    assert status == 0
    run = read_run(step, tmp_path)

    torch.manual_seed(0)
    model = build_model("cnn", "float64")
    train_data, test_data = load_mnist(None, 120)
    images, labels = train_data[torch.randperm(120, generator=torch.Generator().manual_seed(0))[:24]]
    expected = F.cross_entropy(model(images), labels, label_smoothing=script.SMOOTHING)
    assert run.losses[0].item() == pytest.approx(expected.item(), abs=1e-10)
    model.load_state_dict(run.weights)
    expected = F.cross_entropy(model(test_data.images), test_data.labels)
    assert run.test["loss"] == pytest.approx(expected.item(), abs=1e-10)
    assert all(tuple(group["betas"]) == script.BETAS for group in run.state["optimizer"]["param_groups"])


def bench_records():
    """What `make bench` has recorded, by machine."""
    files = [
        path for path in (ROOT / "benchmarks" / "results").glob("*.json") if path.with_suffix(".md").exists()
    ]
    return {path.stem: json.loads(path.read_text()) for path in files}


@pytest.mark.slow
def test_the_bench_still_runs(tmp_path):
    """All its rows, except those of larger models, and those of a textbook's minutes."""
    out = tmp_path / "found.json"
    words = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "--quick", f"--out={out}"]
    status, said, err = finish(start(words, tmp_path), 600)  # 35 s alone
    print(said, err)
    assert status == 0 and out.with_suffix(".md").read_text() in said
    record = json.loads(out.read_text())
    [recorded, *_] = bench_records().values()
    assert record.keys() == recorded.keys()
    names = [re.sub(r"[\d,]+ MB", "", row["name"]) for row in recorded["rows"]]
    small = [name for name in names if not re.search("resnet18|vit|textbook", name)]
    assert [re.sub(r"[\d,]+ MB", "", row["name"]) for row in record["rows"]] == small
    assert all(
        0 < ratio < 1000 for row in record["rows"] for ratio in row["ratios"] if "minus" not in row["name"]
    )


def test_the_bench_was_recorded_whole():
    """Every row has its goal, and the table is the record's."""
    bench = load(ROOT / "benchmarks" / "bench.py")
    assert bench_records()
    for machine, record in bench_records().items():
        assert (ROOT / "benchmarks" / "results" / f"{machine}.md").read_text() == bench.table(record)
        goals = {row["name"]: row["goal"] for row in record["rows"]}
        assert sum(goal == 0.97 for goal in goals.values()) == 5 * 3 * 2
        assert sorted(goal for goal in goals.values() if goal and goal != 0.97) == [
            *(0.5, 0.75, 0.93, 1.0, 2.0, 2.5, 2.5, 5, 15, 40)
        ]
    assert min(record["minutes"] for record in bench_records().values()) < 20


def test_alpha_and_beta_are_found():
    predict = load(ROOT / "benchmarks" / "predict.py")
    points = [(size, 1e-4 + 2e-9 * size) for size in (1 << power for power in range(10, 20))]
    assert predict.fit(points) == pytest.approx((1e-4, 2e-9))


def test_what_a_rank_holds_was_predicted_to_the_byte():
    record = json.loads((ROOT / "benchmarks" / "results" / "prediction.json").read_text())
    measured = [row for row in record["bytes"] if "measured" in row]
    assert [row["ranks"] for row in measured] == [1, 2, 3, 4]
    assert all(row["states"] == row["measured"] for row in measured)


@pytest.mark.slow
def test_what_is_on_paper_is_what_was_recorded(tmp_path):
    words = [sys.executable, str(ROOT / "benchmarks" / "predict.py"), "--paper"]
    status, out, err = finish(start(words, tmp_path))
    assert status == 0, err
    found = json.loads(out)
    record = json.loads((ROOT / "benchmarks" / "results" / "prediction.json").read_text())
    assert found["bytes"] == [row for row in record["bytes"] if "measured" not in row]
    for ours, theirs in zip(found["paper"], record["paper"], strict=True):
        assert ours == pytest.approx(theirs)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("step", ["02", "04", "05"])
def test_a_timeline_shows_when_ranks_talk(step):
    """Once before the forward pass, then DDP in the last backward pass, FSDP in every pass."""
    timeline = load(ROOT / "benchmarks" / "timeline.py")
    for parts in timeline.timeline(step)["ranks"]:
        passes = {kind: [part[1:] for part in parts if part[0] == kind] for kind in timeline.KINDS}
        micro = 4 if step == "04" else 1
        assert len(passes["forward"]) == len(passes["backward"]) == micro
        count, *talks = passes["collective"]
        assert count[0] < passes["forward"][0][0]
        begins = passes["forward"][0][0] if step == "05" else passes["backward"][-1][0]
        assert talks and all(begins <= begin < end for begin, end in talks)
        assert all(any(a < end and begin < b for a, b in [count, *talks]) for begin, end in passes["waiting"])
        assert passes["optimizer"][-1][0] >= passes["backward"][-1][1]


@pytest.mark.slow
def test_the_pictures_are_drawn_alike_each_time(tmp_path):
    """All of them, for light and dark pages. Each one is on a page, in both versions."""
    for folder in ("once", "twice"):
        pictures.draw_all(tmp_path / folder)
    names = sorted(path.name for path in pictures.PICTURES.iterdir())
    assert names == sorted(f"{name}-{theme}.png" for name in pictures.DRAWN for theme in pictures.THEMES)
    pages = "".join(
        page.read_text()
        for page in [*ROOT.glob("docs/reference/*.md"), ROOT / "README.md", *ROOT.glob("0*/README.md")]
    )
    for name in names:
        once, twice = ((tmp_path / folder / name).read_bytes() for folder in ("once", "twice"))
        assert once == twice and len(once) > 5000, name
        assert f"pictures/{name}" in pages, name
