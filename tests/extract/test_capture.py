"""Watching a forward pass sees what it should, only where and while it was asked to."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from brainenc.extract.capture import Watch, tensor_of, watching


class Block(nn.Module):
    """One attention with a scale of its own choosing."""

    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return F.scaled_dot_product_attention(x, 2 * x, 3 * x, scale=self.scale)


def model_of(*blocks):
    return nn.Sequential(*blocks)


def test_another_scale_is_folded_into_q():
    """A kernel called with its own scale still gives q, k, v of which softmax(q k^T / sqrt(d)) v holds as written."""
    model, x, seen = model_of(Block(scale=0.9)), torch.randn(1, 2, 5, 16), []
    with watching(model, Watch(attention={"0": seen.append})):
        output = model(x)
    (heads,) = seen
    scores = heads.q @ heads.k.transpose(-2, -1) / 4
    assert torch.allclose(scores.softmax(-1) @ heads.v, output, atol=1e-6)


def test_only_the_blocks_asked_for_are_heard():
    """Attention in other blocks, and outside of any, is nobody's."""
    model, x, seen = model_of(Block(), Block(), Block()), torch.randn(1, 2, 5, 16), []
    with watching(model, Watch(attention={"1": seen.append})):
        F.scaled_dot_product_attention(x, x, x)
        second = model[0](x)
        model(x)
        F.scaled_dot_product_attention(x, x, x)
    assert len(seen) == 1
    assert torch.equal(seen[0].q, second)


def test_the_kernel_comes_back_whatever_happens():
    """An error inside, and watching inside of watching, leave PyTorch's own function in place at the end."""
    kernel, model = F.scaled_dot_product_attention, model_of(Block())
    watch = Watch(attention={"0": lambda _: None})
    with watching(model, watch):
        with pytest.raises(RuntimeError), watching(model, watch):
            raise RuntimeError("on purpose")
        assert F.scaled_dot_product_attention is not kernel
    assert F.scaled_dot_product_attention is kernel
    assert torch.backends.mha.get_fastpath_enabled()


def test_threads_hear_only_themselves():
    """Two models watched in two threads at once each hear their own attention; a third, unwatched, is not heard."""
    heard = {n: [] for n in range(2)}
    gate = threading.Barrier(3)

    def work(n):
        model = model_of(Block())
        x = torch.full((1, 1, 2, 4), float(n + 1))
        gate.wait()
        for _ in range(200):
            if n == 2:
                model(x)
                continue
            with watching(model, Watch(attention={"0": heard[n].append})):
                model(x)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: {h.q.flatten()[0].item() for h in seen} for n, seen in heard.items()} == {0: {1.0}, 1: {2.0}}
    assert all(len(seen) == 200 for seen in heard.values())
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


def test_outputs_are_told_apart_from_their_wrappings():
    """The tensor of an output is itself, the first of a tuple, or the last hidden state; anything else has none."""
    x = torch.ones(2)

    class Wrapped:
        last_hidden_state = x

    assert tensor_of(x) is x
    assert tensor_of((x, None)) is x
    assert tensor_of([(x,)]) is x
    assert tensor_of(Wrapped()) is x
    assert tensor_of(None) is None
    assert tensor_of(()) is None
