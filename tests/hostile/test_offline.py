"""`--offline` is offline: the demo trains, evaluates and is looked at where there is no network at all."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = (
    *(
        "train",
        "--preset",
        "demo",
        "--offline",
        "--run",
        "demo",
        "--training.updates",
        "2",
        "--evaluation.articles",
        "2",
    ),
    *("--rollout.articles", "2", "--rollout.trajectories", "2", "--evaluation.oracle", "false"),
)


def namespace() -> list[str]:
    """Return the command that runs another where there is no network but a loopback that is down."""
    for options in (["-rn"], ["-n"]):
        if (
            shutil.which("unshare")
            and subprocess.run(["unshare", *options, "true"], capture_output=True).returncode == 0
        ):
            return ["unshare", *options]
    pytest.skip("network namespaces are not allowed here")


def test_the_demo_runs_in_an_empty_network_namespace_and_connects_to_nothing(tmp_path):
    trace = tmp_path / "trace"
    traced = ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace)]
    enter = namespace()
    works = shutil.which("strace") and subprocess.run([*traced, "true"], capture_output=True).returncode == 0
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OPENAI_", "AGRL_"))
    }
    environment |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    agrl = [sys.executable, "-m", "attention_guided_rl", *DEMO]
    done = subprocess.run(
        [*enter, *(traced if works else []), *agrl], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo"
    assert (run / "checkpoints" / "update-000002" / "manifest.json").is_file()
    assert (run / "report.html").is_file()
    if works:
        calls = trace.read_text(errors="replace").splitlines()
        assert any("exited with 0" in line for line in calls)
        assert [line for line in calls if re.search(r"\b(AF_INET6?|AF_PACKET|AF_NETLINK)\b", line)] == []
        assert [line for line in calls if "connect(" in line and not re.search(r"AF_UNIX", line)] == []


def test_the_trace_would_show_a_connection(tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("no strace on PATH")
    trace = tmp_path / "trace"
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-e", "trace=connect", "-o", str(trace), sys.executable, "-c", code],
        capture_output=True,
    )
    if done.returncode:
        pytest.skip("strace is not allowed here")
    assert re.search(r"connect\(.*AF_INET", Path(trace).read_text())
