"""Hooks: what they see, what they change, and that nothing of them stays behind."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from torch import nn

from d4s.models.architectures import Anatomy
from d4s.models.trace import Trace, first_tensor, replaced_forward, stopping


class Chain(nn.Module):
    """Three linear layers, counting how often each has run; the middle one is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(input=self.first(x)))


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_it_holds_what_went_in_and_what_came_out():
    chain, x = Chain(), torch.randn(4, 5)
    with Trace(chain.first) as first, Trace(chain.middle) as middle:
        chain(x)
    assert torch.equal(first.input, x) and torch.equal(first.output, chain.first(x))
    assert torch.equal(middle.input, first.output), "an input passed by keyword is an input too"
    assert torch.equal(middle.output, chain.middle(first.output))


def test_it_holds_the_last_of_several_calls():
    chain, x, y = Chain(), torch.randn(4, 5), torch.randn(2, 5)
    with Trace(chain.first) as trace:
        chain(x), chain(y)
    assert torch.equal(trace.input, y)


def test_an_edit_replaces_what_the_rest_of_the_model_sees():
    chain, x = Chain(), torch.randn(4, 5)
    with Trace(chain.middle, edit=lambda output: output * 2) as trace:
        found = chain(x)
    middle = chain.middle(chain.first(x))
    torch.testing.assert_close(found, chain.last(2 * middle))
    torch.testing.assert_close(trace.output, 2 * middle)
    assert torch.equal(chain(x), chain.last(middle)), "the edit ends with the context"


def test_an_edit_of_a_module_that_returns_a_tuple_keeps_the_rest_of_it():
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x + 1, "kept"

    pair, x = Pair(), torch.randn(3)
    with Trace(pair, edit=torch.neg) as trace:
        found = pair(x)
    assert torch.equal(found[0], -(x + 1)) and found[1] == "kept"
    assert torch.equal(trace.output, found[0]) and trace.returned[1] == "kept"
    assert torch.equal(first_tensor(found), found[0]) and first_tensor(x) is x


def test_stop_ends_the_forward_pass_after_the_module():
    chain = Chain()
    ran: list[str] = []
    for name, module in chain.named_children():
        module.register_forward_hook(lambda _m, _a, _o, name=name: ran.append(name))
    reached = False
    with Trace(chain.middle, stop=True) as trace, stopping():
        chain(torch.randn(4, 5))
        reached = True
    assert trace.output.shape == (4, 5) and ran == ["first", "middle"] and not reached


def test_stopping_lets_other_errors_through_and_the_hook_goes_with_them():
    chain = Chain()
    with pytest.raises(RuntimeError, match="mat1 and mat2"), Trace(chain.last, stop=True), stopping():
        chain(torch.randn(4, 6))
    assert _hooks(chain) == 0


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_a_stopped_pass_sees_what_a_whole_pass_sees(model_type, seed):
    model = tiny_model(model_type, seed)
    module = Anatomy(model).projection(1)
    ids = torch.tensor([tiny_tokenizer()("The capital of France is Paris")["input_ids"]])
    with torch.no_grad():
        with Trace(module) as whole:
            model(input_ids=ids)
        with Trace(module, stop=True) as stopped, stopping():
            model(input_ids=ids)
    assert torch.equal(whole.input, stopped.input) and torch.equal(whole.output, stopped.output)
    assert _hooks(model) == 0


def test_replaced_forward_runs_the_function_instead_of_the_module():
    chain, x = Chain(), torch.randn(4, 5)
    plain = chain(x)
    with replaced_forward({chain.first: lambda x: x, chain.middle: lambda input: 3 * input}):
        assert torch.equal(chain(x), chain.last(3 * x))
    assert torch.equal(chain(x), plain)
    assert "forward" not in chain.first.__dict__


def test_replaced_forward_puts_back_an_instances_own_forward_also_after_an_error():
    chain, x = Chain(), torch.randn(4, 5)
    chain.first.forward = own = lambda x: x + 7
    with (
        pytest.raises(ZeroDivisionError),
        replaced_forward({chain.first: lambda x: x, chain.last: torch.neg}),
    ):
        raise ZeroDivisionError
    assert chain.first.__dict__["forward"] is own and "forward" not in chain.last.__dict__
    torch.testing.assert_close(chain(x), chain.last(chain.middle(x + 7)))
