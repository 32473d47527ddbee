"""Machines by name and from files."""

import pytest

from tipdistill.plan.machines import MACHINES, Machine, read_machine


def test_a_file_gives_all_rates_or_changes_a_named_machine(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("{flops: 1e12, bandwidth: 1e11, link: 1e10, network: 1e9, memory_gib: 16, utilization: 0.5}")
    assert read_machine(str(path)) == Machine(1e12, 1e11, 1e10, 1e9, 16, utilization=0.5)
    path.write_text("{base: h200, node: 4}")
    changed = read_machine(str(path))
    assert changed.node == 4
    assert changed.memory_gib == MACHINES["h200"].memory_gib


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{base: h100, flop: 1}", "Did you mean 'flops'"),
        ("{base: h300}", "base must be one of h100, h200, a100, got 'h300'"),
        ("{flops: 1e12}", "bandwidth, link, network, memory_gib must be given"),
        ("{base: h100, flops: -1}", "flops of a machine must be a positive number, got -1"),
        ("{base: h100, flops: fast}", "must be a positive number, got 'fast'"),
        ("{base: h100, utilization: 1.5}", "at most 1"),
        ("[h100]", "must hold a mapping"),
        ("{base: h100", "is not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, said):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="own") as refused:
        read_machine(str(path))
    assert said in str(refused.value)
