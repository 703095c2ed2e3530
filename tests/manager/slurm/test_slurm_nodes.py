"""Nodes and partitions as scontrol prints them, and names of hosts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis.strategies import builds, integers, sampled_from, sets

from manager.slurm.nodes import MIB, fold_names, parse_nodes, parse_partitions

PAGE = """\
NodeName=gpu07 Arch=x86_64 CoresPerSocket=32
   CPUAlloc=10 CPUEfctv=62 CPUTot=64 CPULoad=0.16
   AvailableFeatures=a100
   Gres={gres}
   GresDrain=N/A
   GresUsed={used}
   RealMemory=512000 AllocMem=100000 FreeMem=N/A Sockets=2 Boards=1
   MemSpecLimit=12000
   State={state} ThreadsPerCore=1 TmpDisk=100000 Weight=1 Owner=N/A MCS_label=N/A
   Partitions=gpu,long
   CfgTRES=cpu=62,mem=500G,billing=64,gres/gpu=4
   AllocTRES={tres}
   Reason=bad fan CPUAlloc=3 [root@2026-11-21T03:21:17]

"""
PARTITION = """\
PartitionName=gpu
   AllowGroups=ALL Default=YES QoS=N/A
   MaxNodes={most} MaxTime=2-00:00:00 MinNodes=0 LLN=NO
   Nodes=gpu[01-12]
   State=UP TotalCPUs=768 TotalNodes=12

"""


def node(gres="(null)", used="", state="MIXED", tres=""):
    (found,) = parse_nodes(PAGE.format(gres=gres, used=used, state=state, tres=tres))
    return found


@pytest.mark.parametrize(
    ("gres", "used", "tres", "gpus", "idle", "types"),
    [
        ("(null)", "gpu:0", "", 0, 0, ()),
        ("gpu:4", "gpu:1", "cpu=1", 4, 3, ()),
        ("gpu:a100:4(S:0-1)", "gpu:a100:3(IDX:0-2)", "", 4, 1, ("a100",)),
        (
            "gpu:a100:4(S:0,1),gpu:t4:2",
            "gpu:a100:0(IDX:N/A),gpu:t4:2(IDX:4,5)",
            "",
            6,
            4,
            ("a100", "t4"),
        ),
        ("craynetwork:4,gpu:2", "craynetwork:0,gpu:2(IDX:0-1)", "", 2, 0, ()),
        ("gpu:v100:4", "", "cpu=8,gres/gpu=3,gres/gpu:v100=3", 4, 1, ("v100",)),
        ("gpu:v100:4", "", "cpu=8,gres/gpu:v100=3", 4, 1, ("v100",)),
    ],
)
def test_gpus_are_counted(gres, used, tres, gpus, idle, types):
    found = node(gres=gres, used=used, tres=tres)
    assert (found.gpus, found.idle_gpus, found.gpu_types) == (gpus, idle, types)


def test_what_a_node_has_and_what_is_free():
    found = node()
    assert (found.name, found.partitions) == ("gpu07", ("gpu", "long"))
    assert (found.cpus, found.allocated_cpus, found.idle_cpus) == (62, 10, 52)
    assert found.memory_bytes == 500_000 * MIB
    assert found.free_memory_bytes == 400_000 * MIB
    assert found.os_free_bytes is None
    assert found.reason == "bad fan CPUAlloc=3 [root@2026-11-21T03:21:17]"


@pytest.mark.parametrize(
    ("state", "condition", "is_usable", "is_idle"),
    [
        ("IDLE", "idle", True, True),
        ("IDLE+CLOUD+POWERED_DOWN", "idle", True, True),
        ("MIXED", "mixed", True, False),
        ("ALLOCATED", "allocated", True, False),
        ("IDLE+COMPLETING", "idle", True, False),
        ("IDLE+DRAIN", "drained", False, False),
        ("MIXED+DRAIN", "draining", False, False),
        ("DOWN*", "down*", False, False),
        ("DOWN+DRAIN+NOT_RESPONDING", "drained", False, False),
        ("IDLE*", "idle*", False, False),
        ("IDLE+RESERVED", "idle+reserved", False, False),
        ("UNKNOWN", "unknown", False, False),
    ],
)
def test_a_state_says_whether_jobs_may_go_there(state, condition, is_usable, is_idle):
    found = node(state=state)
    assert (found.condition, found.is_usable, found.is_idle) == (condition, is_usable, is_idle)
    assert (found.idle_cpus > 0) == is_usable


@pytest.mark.parametrize(
    ("gres", "gigabytes"),
    [
        ("gpu:a100_80gb:4", 80),
        ("gpu:h100-94g:4", 94),
        ("gpu:1g.10gb:7", 10),
        ("gpu:a100_80gb:2,gpu:a100_40gb:2", 40),
        ("gpu:a100_80gb:2,gpu:t4:2", None),
        ("gpu:a100:4", None),
        ("gpu:4", None),
        ("(null)", None),
    ],
)
def test_a_type_may_tell_how_much_memory_a_gpu_has(gres, gigabytes):
    expected = None if gigabytes is None else gigabytes * 10**9
    assert node(gres=gres).gpu_memory_bytes == expected


@pytest.mark.parametrize(("most", "max_nodes"), [("UNLIMITED", None), ("4", 4)])
def test_a_partition_is_read(most, max_nodes):
    (found,) = parse_partitions(PARTITION.format(most=most))
    assert (found.name, found.is_default, found.state) == ("gpu", True, "UP")
    assert (found.max_nodes, found.max_time) == (max_nodes, "2-00:00:00")


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["node1", "node2", "node3", "gpu07"], "gpu07,node[1-3]"),
        (["n9", "n10", "n11"], "n[9-11]"),
        (["n09", "n10", "n1"], "n[1,09-10]"),
        (["login"], "login"),
        (["a", "a1"], "a,a1"),
        (["r1i0n1", "r1i0n2", "r2i0n1"], "r1i0n[1-2],r2i0n1"),
        ([], ""),
    ],
)
def test_names_are_folded_as_slurm_does(names, folded):
    assert fold_names(names) == folded


@given(
    names=sets(
        builds(
            lambda prefix, number, width: f"{prefix}{number:0{width}}",
            sampled_from(["n", "rack1-", "gpu"]),
            integers(0, 120),
            sampled_from([1, 3]),
        ),
        max_size=20,
    )
)
def test_folded_names_unfold_to_the_same(names):
    assert unfold(fold_names(names)) == names


def unfold(text: str) -> set[str]:
    found = set()
    for prefix, inside in re.findall(r"([^,\[]+)(?:\[([^\]]+)\])?", text):
        if not inside:
            found.add(prefix)
        for part in filter(None, inside.split(",")):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                found.add(prefix + str(number).zfill(len(first)))
    return found
