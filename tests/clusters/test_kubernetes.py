"""04_multinode/kubernetes.yaml: Kubernetes' schema accepts it, and its command trains."""

import copy
import subprocess

import kubernetes_validate
import pytest
import torch
import yaml
from helpers import FOLDERS, GLOBAL_BATCH, PROOF, ROOT, environment, largest_difference
from hosts import WHY, network, possible

from common.snapshot import snapshots

SERVICE, JOB = yaml.safe_load_all((ROOT / FOLDERS["04"] / "kubernetes.yaml").read_text())
VERSION = "1.31"


def test_the_schema_accepts_both():
    for resource in (SERVICE, JOB):
        kubernetes_validate.validate(resource, VERSION, strict=True)
        print(f"{resource['kind']}: valid in Kubernetes {VERSION}")


@pytest.mark.parametrize("mistake", ["a word wrong", "a number as text", "a missing part"])
def test_the_schema_would_refuse_a_mistake(mistake):
    job = copy.deepcopy(JOB)
    container = job["spec"]["template"]["spec"]["containers"][0]
    if mistake == "a word wrong":
        job["spec"]["completion"] = job["spec"].pop("completions")
    elif mistake == "a number as text":
        job["spec"]["parallelism"] = "2"
    else:
        del container["name"]
    with pytest.raises(kubernetes_validate.ValidationError) as refusal:
        kubernetes_validate.validate(job, VERSION, strict=True)
    print(refusal.value)


def test_names_fit_together():
    pod = JOB["spec"]["template"]
    assert pod["spec"]["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == 2
    script = pod["spec"]["containers"][0]["command"][2]
    assert f"--nnodes={JOB['spec']['completions']} " in script
    # A pod's name is the job's name and a number. The other pods find it in the service's domain.
    endpoint = (
        f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}:{SERVICE['spec']['ports'][0]['port']}"
    )
    assert f"--rdzv-endpoint={endpoint} " in script


@pytest.mark.root
@pytest.mark.skipif(not possible(), reason=WHY)
def test_its_command_trains_on_two_hosts(tmp_path, proof):
    container = JOB["spec"]["template"]["spec"]["containers"][0]
    variables = {item["name"]: item["value"] for item in container["env"]} | {"OMP_NUM_THREADS": "1"}
    script = container["command"][2]
    with network(tmp_path / "net", 2) as net:
        lines = [f"10.77.0.{i + 1} ddp-{i}.ddp ddp-{i}" for i in range(2)]
        (net.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        script = script.replace("/storage", str(net.disk)).replace(" --epochs=5", "")
        own = " ".join([*PROOF, f"--batch-size={GLOBAL_BATCH // 2}", "--use-gpu=0"])
        pods = []
        for i, host in enumerate(net.hosts):
            host.run(f"hostname ddp-{i}")
            index = {"JOB_COMPLETION_INDEX": str(i)}
            pods.append(host.start(f"cd {ROOT} && {script} {own}", **environment(**variables, **index)))
        for pod, host in zip(pods, net.hosts, strict=True):
            try:
                out, _ = pod.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                host.kill_all()
                raise
            print(out)
            assert pod.returncode == 0
            state = torch.load(snapshots(host.disk / "snapshots")[0], weights_only=True)
            assert largest_difference(state["model"], proof("03", 2).weights) == 0.0
