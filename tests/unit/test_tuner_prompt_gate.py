import math

import pytest
import torch

from atomtune.errors import UserError
from atomtune.tuner import PromptGate


def gate_of(weight: torch.Tensor, bias: float = 0.0) -> PromptGate:
    gate = PromptGate(len(weight))
    with torch.no_grad():
        gate.weight.copy_(weight)
        gate.bias.fill_(bias)
    return gate


def test_against_a_naive_loop() -> None:
    torch.manual_seed(0)
    e, mask = torch.randn(4, 6, 5), torch.rand(4, 6) > 0.4
    gate = gate_of(torch.randn(5), 0.3)
    for row in range(4):
        best = -math.inf
        for token in range(6):
            if mask[row, token]:
                x = e[row, token]
                best = max(best, (gate.weight @ (x / x.square().mean().sqrt())).item() - 0.3)
        assert gate.pre_code(e, mask)[row].item() == pytest.approx(best, rel=1e-5)
        expected = min(max(0.5 + 0.5 * best, 0.0), 1.0)
        assert gate(e, mask)[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_exact_ends_and_start() -> None:
    e = torch.ones(1, 1, 1)
    for z, expected in ((-1.0, 0.0), (-3.0, 0.0), (0.0, 0.5), (1.0, 1.0), (5.0, 1.0)):
        assert gate_of(torch.zeros(1), -z)(e).item() == expected
    assert PromptGate(8)(torch.randn(3, 2, 8)).tolist() == [1.0, 1.0, 1.0]
    assert gate_of(torch.ones(1))(e, torch.zeros(1, 1)).item() == 0.0


def test_prompts_on_another_device_are_read_there() -> None:
    """As offloading has it, which moves the model later."""
    assert gate_of(torch.ones(5))(torch.randn(2, 3, 5, device="meta")).device.type == "meta"


def test_list_equals_padded() -> None:
    torch.manual_seed(0)
    items = [torch.randn(n, 5) for n in (3, 1, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
    mask = torch.arange(4) < torch.tensor([[3], [1], [4]])
    gate = gate_of(torch.randn(5))
    torch.testing.assert_close(gate.pre_code(items), gate.pre_code(padded, mask))


def calibrated(unrelated: list[float], concept: list[float], share: float) -> tuple[list[float], list[float], tuple]:
    """The gate's values at prompts of those z after calibration, read through the gate itself."""
    gate = gate_of(torch.tensor([1.0, 0.0]))
    both = torch.tensor([*unrelated, *concept])
    # A unit-RMS embedding whose first feature is z / scale.
    scale = 2 * both.abs().max().item()
    with torch.no_grad():
        gate.weight[0] = scale
    first = both / scale
    e = torch.stack([first, (2 - first**2).sqrt()], -1).unsqueeze(1)
    z = gate.pre_code(e)
    torch.testing.assert_close(z, both)
    shares = gate.calibrate(z[: len(unrelated)], z[len(unrelated) :], share)
    values = gate(e).tolist()
    return values[: len(unrelated)], values[len(unrelated) :], shares


def test_calibration_where_the_kinds_separate() -> None:
    off, on, shares = calibrated([-1.0, 0.2, 0.5], [0.9, 2.0], 0.5)
    assert off == [0.0, 0.0, 0.0]
    assert on == [1.0, 1.0]
    assert shares == (1.0, 1.0)


def test_calibration_where_they_overlap() -> None:
    unrelated = [i / 100 for i in range(100)]
    off, on, shares = calibrated(unrelated, [0.5, 0.951, 1.5, 2.0], 0.95)
    assert off.count(0.0) >= 95
    assert on[0] == 0.0
    assert on[1:] == [1.0, 1.0, 1.0]
    assert shares.silent_share == off.count(0.0) / 100
    assert shares.open_share == 0.75


def test_calibration_that_can_open_nothing() -> None:
    off, on, shares = calibrated([0.0, 3.0], [1.0, 2.0], 1.0)
    assert off == [0.0, 0.0]
    assert on == [0.0, 0.0]
    assert shares == (1.0, 0.0)


def test_calibration_errors() -> None:
    gate, some, none = PromptGate(2), torch.zeros(3), torch.zeros(0)
    with pytest.raises(UserError, match="silent_share"):
        gate.calibrate(some, some, 0.0)
    with pytest.raises(UserError, match="at least one"):
        gate.calibrate(none, some)
