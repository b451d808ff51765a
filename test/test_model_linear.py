"""The linear layer: nn.Linear's numbers and gradients by either product."""

import pytest
import torch

from pi0_ros.model import linear as module
from pi0_ros.model.linear import Linear, for_products


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    calls = []
    product = module._product
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(1) or product(*args))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_onednn_product_and_gradients_equal_torch(onednn, bias, layout):
    torch.manual_seed(0)
    layer = Linear(96, 160, bias=bias)
    x = torch.randn(2, 96, 60).transpose(1, 2) if layout == "transposed" else torch.randn(2, 60, 96)
    grad = torch.randn(2, 160, 60).transpose(1, 2)
    wanted = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    x.requires_grad_()
    found = layer(x)
    found.backward(grad)
    assert len(onednn) == 3  # forward, and one for each gradient
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    rows, grads = x.detach().flatten(0, 1).double(), grad.flatten(0, 1).double()
    torch.testing.assert_close(x.grad.double(), grad.double() @ layer.weight.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.weight.grad.double(), grads.t() @ rows, atol=1e-4, rtol=0)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), grads.sum(dim=0), atol=1e-4, rtol=0)


def test_a_frozen_weight_costs_no_weight_gradient(onednn):
    layer = Linear(128, 128, bias=False).requires_grad_(False)
    x = torch.randn(100, 128, requires_grad=True)
    layer(x).sum().backward()
    assert len(onednn) == 2 and layer.weight.grad is None and x.grad is not None


@pytest.mark.parametrize("case", ["small", "bfloat16", "autocast"])
def test_other_cases_go_the_usual_way(onednn, case):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    layer = Linear(128, 128, dtype=dtype)
    x = torch.randn(10 if case == "small" else 200, 128, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert layer(x).dtype == (torch.float32 if case == "small" else torch.bfloat16)
    assert not onednn


def test_what_products_take_is_turned_only_under_autocast_and_where_there_is_one():
    assert for_products(torch.zeros(2)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert for_products(torch.zeros(2)).dtype == torch.bfloat16
    assert for_products(torch.zeros(2, device="meta")).device.type == "meta"
