"""LoRA adapters: where they go, that they start at nothing, and that merging gives the same function."""

import copy

import pytest
import torch
from torch import nn

from embodied_rl.errors import UserError
from embodied_rl.policies.lora import add_lora, linear_layers, merged_weights


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.inner = nn.ModuleDict({"fc": nn.Linear(5, 4, bias=False), "norm": nn.LayerNorm(4)})
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, image):
        x = self.conv(image).mean((2, 3))
        return self.inner["norm"](self.inner["fc"](torch.tanh(self.fc(x))))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


def randomise(network):
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)


IMAGE = torch.randn(2, 3, 8, 8)


def test_adapters_start_at_zero_and_only_they_are_trained(network):
    before = network(IMAGE)
    add_lora(network, linear_layers(network), rank=2, alpha=4)
    assert torch.equal(network(IMAGE), before)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.lora_{half}.default.weight" for layer in ("fc", "inner.fc") for half in "AB"}


def test_a_name_means_exactly_one_layer(network):
    add_lora(network, ["fc"], rank=1, alpha=1)
    assert "fc.lora_A.default.weight" in network.state_dict()
    assert "inner.fc.weight" in network.state_dict()


@pytest.mark.parametrize("targets", [["fc", "inner.fc"], ["conv"], ["fc", "conv"]])
def test_merged_weights_give_the_same_function_under_the_old_names(network, targets):
    plain = copy.deepcopy(network)
    add_lora(network, targets, rank=3, alpha=6)
    randomise(network)
    changed, merged = network(IMAGE), merged_weights(network)
    assert not torch.allclose(changed, plain(IMAGE))
    plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(plain(IMAGE), changed)
    assert torch.equal(network(IMAGE), changed)  # merging left the adapters alone


def test_without_adapters_the_merged_weights_are_the_weights(network):
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in merged_weights(network).items())


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [(["nowhere"], 2, "nowhere"), (["inner.norm"], 2, "inner.norm"), ([], 2, "anything"), (["fc"], 0, "rank")],
)
def test_wrong_targets_are_refused(network, targets, rank, message):
    with pytest.raises(UserError, match=message):
        add_lora(network, targets, rank, 1.0)
