"""Two hosts: network namespaces of this machine with a cable between them, which is cut."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.launch import REPOSITORY
from tests.helpers.ranks import RUN, Ranks, final_state, wait_for

pytestmark = pytest.mark.slow

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces that reach each other and nothing else."""
    names = [f"effdense-{os.getpid()}-{end}" for end in "ab"]
    cables = [f"eff{os.getpid() % 100000}{end}" for end in "ab"]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
                ip("link", "set", cable, "netns", name)
                # one name in both: torchrun and gloo are told it
                ip("-n", name, "link", "set", cable, "name", "cable")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield names


def test_a_host_cut_off_and_back(hosts: list[str], tmp_path: Path) -> None:
    """Each host starts torchrun again until it succeeds, as a cluster's scheduler would.

    They share the file system, as the machines of a cluster do.
    """
    run = [*RUN, "--epochs", 4]
    (tmp_path / "alone").mkdir()
    with Ranks(tmp_path / "alone", run, 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()

    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
    said = [tmp_path / f"host-{name}.txt" for name in "ab"]
    with ExitStack() as stack:
        for host, address, file in zip(hosts, ADDRESSES, said, strict=True):
            torchrun = [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job"),
                *("--rdzv-endpoint", f"{ADDRESSES[0]}:29477", "--local-addr", address),
                # its own guess goes by the machine's name, which both hosts share
                *("--rdzv-conf", f"is_host={int(address == ADDRESSES[0])},read_timeout=20"),
                *(str(REPOSITORY / "train_ddp.py"), *map(str, run), "--hang-timeout", "3"),
            ]
            again = f"until {shlex.join(torchrun)}; do sleep 1; done"
            process = subprocess.Popen(
                ["ip", "netns", "exec", host, "bash", "-c", again],
                stdout=stack.enter_context(file.open("wb")),
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env=environment,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
        store = tmp_path / "run" / "checkpoints"
        wait_for(lambda: len(list(store.glob("epoch-*"))) >= 2, timeout=200)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        wait_for(lambda: any(b"has not moved" in f.read_bytes() for f in said), timeout=200)
        assert not (tmp_path / "run" / "model.pt").exists()
        ip("-n", hosts[1], "link", "set", "cable", "up")
        wait_for((tmp_path / "run" / "report.html").exists, timeout=300)
    assert any("going on from epoch" in file.read_text() for file in said)
    assert any(
        "does not answer" in line
        for file in said
        for line in file.read_text().splitlines()
        if line.startswith("error: the run has not moved for")
    )
    assert final_state(tmp_path / "run") == final_state(tmp_path / "alone" / "run")
