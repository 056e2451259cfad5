"""Clocks as nvidia-smi prints them, and what is known where it is not there.

The lines have the form of `nvidia-smi --help-query-gpu`, the names of the bits are those of nvml.h.
Not covered: a driver of today.
"""

import sys

import pytest
import torch

from benchmarks import clocks
from benchmarks.clocks import State

LINE = "550.54.15, 1785, 1980, 2619, 688.41, 700.00, 61, 0x0000000000000004"
STATE = State("550.54.15", 1785.0, 1980.0, 2619.0, 688.41, 700.0, 61.0, ("power cap",))


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (LINE, STATE),
        (LINE + "\n", STATE),
        (
            "470.1, 1410, 1410, 1215, 61.0, [N/A], 33, 0x0000000000000000",
            State("470.1", 1410.0, 1410.0, 1215.0, 61.0, None, 33.0, ()),
        ),
        (
            "[N/A], [Not Supported], 1, 2, 3, 4, 5, 0x0000000000001061",
            State(
                None, None, 1.0, 2.0, 3.0, 4.0, 5.0,
                ("idle", "thermal slowdown by software", "thermal slowdown by hardware", "0x1000"),
            ),
        ),
        ("1, 2, 3, 4, 5, 6, 7, [Unknown Error]", State("1", 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, None)),
        ('Field "clocks_event_reasons.active" is not a valid field to query.', clocks.UNKNOWN),
        ("No devices were found", clocks.UNKNOWN),
        ("", clocks.UNKNOWN),
    ],
)  # fmt: skip
def test_a_line_of_nvidia_smi(line, state):
    assert clocks.parse(line) == state


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is only named."""
    properties = type("Properties", (), {"uuid": "12-34"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("known", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_a_driver_that_knows_one_of_the_names(gpu, known, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\ntime.sleep(0.05)\n"
        "assert sys.argv[1] == '--id=GPU-12-34'\n"
        "assert sys.argv[3] == '--format=csv,noheader,nounits'\n"
        f"right = sys.argv[2].startswith('--query-gpu=') and sys.argv[2].endswith(',{known}')\n"
        f"print({LINE!r} if right else 'Field is not a valid field to query.')\n"
        "sys.exit(not right)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    worked = []
    assert clocks.read(lambda: worked.append(1)) == STATE
    assert worked, "the GPU was left idle"


def test_what_torch_tells_where_there_is_no_nvidia_smi(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1755)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 350_500)
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 40)
    assert clocks.read() == State(sm_mhz=1755.0, power_watts=350.5, temperature_c=40.0)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1 / 0)  # as without nvidia-ml-py
    assert clocks.read() == clocks.UNKNOWN


def test_without_a_gpu_nothing_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clocks.read() == clocks.UNKNOWN
