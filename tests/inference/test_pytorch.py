"""Where a network computes in PyTorch."""

import pytest
import torch

from shufflenet.common.messages import UsageError
from shufflenet.inference.pytorch import choose_device, torch_threads


def test_choose_device_takes_what_is_there_and_names_what_is_not():
    count, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if count else "mps" if mps else "cpu")
    for name in (f"cuda:{count}", "tpu", *["mps"] * (not mps)):
        with pytest.raises(UsageError, match=f"--device {name} is not there: use .*cpu"):
            choose_device(name)
    if count:  # what asks for no device means the one that was named
        choose_device(f"cuda:{count - 1}")
        assert torch.cuda.current_device() == count - 1


def test_the_caller_gets_its_threads_back_whatever_happens():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
