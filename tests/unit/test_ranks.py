"""Who am I, from what each launcher leaves in the environment."""

import pytest

from aifactory_train.errors import PlanError, RendezvousError
from aifactory_train.train.ranks import (
    Ranks,
    check_world_size,
    find_ranks,
    first_host,
    node_name,
    quoted_environment,
    tasks_by_node,
)

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NODELIST": "nid[0012-0014,0020]",
}


def test_alone_is_one_rank():
    assert find_ranks(env={}) == Ranks(0, 1, 0, "alone", "127.0.0.1", 0)


def test_torchrun_says_rank_and_address():
    assert find_ranks(env=TORCHRUN) == Ranks(3, 8, 1, "torchrun", "node1", 29500)


def test_srun_gives_rank_first_host_and_a_port_of_the_job():
    assert find_ranks(env=SLURM) == Ranks(5, 16, 1, "slurm", "nid0012", 20000 + 4567)
    other = find_ranks(env={**SLURM, "SLURM_JOB_ID": "1234568"})
    assert other.port != 24567, "two jobs on one node must not meet"


def test_the_launchers_address_wins_under_srun():
    ranks = find_ranks(env={**SLURM, "MASTER_ADDR": "nid0012-ib0", "MASTER_PORT": "4711"})
    assert (ranks.address, ranks.port) == ("nid0012-ib0", 4711)


def test_a_batch_shell_without_srun_is_alone():
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}
    assert find_ranks(env=batch).world_size == 1


def test_the_ranks_of_a_node_can_be_a_run_of_their_own():
    of_node = find_ranks(env={**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, of_node=True)
    assert (of_node.rank, of_node.world_size, of_node.address) == (1, 4, "127.0.0.1")
    env = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x3),2", "SLURM_NODEID": "3"}
    assert find_ranks(env=env, of_node=True).world_size == 2
    assert find_ranks(env=env, of_node=True).port not in (find_ranks(env=env).port, 29500)
    assert find_ranks(env={}, of_node=True) == find_ranks(env={})


def test_slurms_short_form_of_tasks_is_written_out():
    assert tasks_by_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_by_node("4") == [4] and tasks_by_node("") == []


def test_a_result_quotes_what_decides_communication_and_no_secrets():
    env = {"NCCL_ALGO": "RING", "FI_PROVIDER": "cxi", "SLURM_JOB_ID": "1", "SLURM_JWT": "x", "HF_TOKEN": "x"}
    assert list(quoted_environment(env)) == ["FI_PROVIDER", "NCCL_ALGO", "SLURM_JOB_ID"]


def test_a_node_is_called_as_slurm_calls_it():
    assert node_name({"SLURMD_NODENAME": "nid0012"}) == "nid0012"
    assert "." not in node_name({})


def test_the_end_of_the_job_is_known_under_every_launcher():
    for env in ({}, TORCHRUN, SLURM):
        assert find_ranks(env={**env, "SLURM_JOB_END_TIME": "1790000000"}).end_time_s == 1790000000.0
        assert find_ranks(env=env).end_time_s is None


@pytest.mark.parametrize("text", ["", " ", "N/A", "UNLIMITED", "inf", "nan", "0", "-5", "12:00:00"])
def test_an_end_that_is_no_time_is_no_end(text):
    assert find_ranks(env={"SLURM_JOB_END_TIME": text}).end_time_s is None


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("nid[0012-0014,0020],x1", "nid0012"),
        ("a[3,5]b", "a3b"),
        ("lrdn0[07-09]", "lrdn007"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert first_host(nodelist) == host


def test_a_broken_environment_names_the_variable():
    with pytest.raises(RendezvousError, match="WORLD_SIZE is 'eight'"):
        find_ranks(env={**TORCHRUN, "WORLD_SIZE": "eight"})
    with pytest.raises(RendezvousError, match="SLURM_STEP_NODELIST"):
        first_host("")


def test_another_number_of_ranks_than_planned_is_refused():
    with pytest.raises(PlanError, match="the plan is for 4 ranks, torchrun started 8"):
        check_world_size(find_ranks(env=TORCHRUN), 4)
