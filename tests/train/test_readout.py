"""The readout: the published sum over masked queries, for less."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brainenc.train.readout import RoiReadout, VertexReadout, group_vertices

MASKS = hnp.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(0, 30)))


def published(readout, tokens, masks):
    """Every vertex for every query, masked, summed."""
    state = readout.state_dict()
    every = tokens @ state["weight"].T + state["bias"]
    return (every * torch.from_numpy(masks)).sum(dim=1)


@given(MASKS)
@settings(deadline=None, max_examples=60)
def test_groups_partition_the_vertices(masks):
    """Each vertex is in one group, with exactly the queries whose masks hold it; no two groups are alike."""
    order, groups = group_vertices(masks)

    assert sorted(order) == list(range(masks.shape[1]))
    assert [g.start for g in groups] + [masks.shape[1]] == [0] + [g.stop for g in groups] or not groups
    assert len({g.queries for g in groups}) == len(groups)
    for group in groups:
        for vertex in order[group.start : group.stop]:
            assert tuple(np.flatnonzero(masks[:, vertex])) == group.queries


@given(MASKS)
@settings(deadline=None, max_examples=40)
def test_readout_is_the_published_one(masks):
    """Predictions, and gradients of weights, biases and tokens, equal those of the masked sum."""
    torch.manual_seed(0)
    readout = RoiReadout(masks, 8)
    tokens = torch.randn(3, len(masks), 8, requires_grad=True)
    weight = readout.state_dict()["weight"].clone().requires_grad_()
    bias = readout.state_dict()["bias"].clone().requires_grad_()
    every = (tokens @ weight.T + bias) * torch.from_numpy(masks)
    wanted = every.sum(dim=1)
    slope = torch.randn(wanted.shape)

    found = readout(tokens)
    expected = torch.autograd.grad((wanted * slope).sum(), (tokens, weight, bias))
    got = torch.autograd.grad((found * slope).sum(), (tokens, readout.weight, readout.bias))

    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs[readout.order], rtol=1e-4, atol=1e-5)


def test_state_dicts_have_the_published_order():
    """What is loaded is what is saved, whatever the masks; and the same weights with other masks predict theirs."""
    rng = np.random.default_rng(0)
    masks, others = (rng.random((5, 40)) < 0.3 for _ in range(2))
    first, second = RoiReadout(masks, 8), RoiReadout(others, 8)
    given_state = {"weight": torch.randn(40, 8), "bias": torch.randn(40)}
    tokens = torch.randn(2, 5, 8)

    first.load_state_dict(given_state)
    second.load_state_dict(first.state_dict())

    assert all(torch.equal(second.state_dict()[k], v) for k, v in given_state.items())
    torch.testing.assert_close(second(tokens), published(first, tokens, others), rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_given_state_alone():
    """A state dict may be loaded into many models."""
    masks = np.random.default_rng(0).random((3, 20)) < 0.5
    state = {"weight": torch.randn(20, 4), "bias": torch.randn(20)}
    before = {k: v.clone() for k, v in state.items()}

    RoiReadout(masks, 4).load_state_dict(state)

    assert all(torch.equal(state[k], before[k]) for k in state)


def test_another_shape_is_refused_by_name():
    """PyTorch's own message survives the reordering."""
    with pytest.raises(RuntimeError, match="weight"):
        RoiReadout(np.ones((2, 5), dtype=bool), 4).load_state_dict(
            {"weight": torch.zeros(6, 4), "bias": torch.zeros(5)}
        )


def test_initial_weights_do_not_depend_on_the_masks():
    """Two readouts of one seed start from the same weights per vertex."""
    rng = np.random.default_rng(1)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(RoiReadout(rng.random((4, 25)) < 0.4, 6).state_dict())

    assert torch.equal(states[0]["weight"], states[1]["weight"])
    bound = 1 / 6**0.5
    assert states[0]["weight"].abs().max() <= bound
    assert states[0]["weight"].abs().max() > 0.9 * bound


def test_a_vertex_per_query_takes_its_own_row():
    """``voxels``: the diagonal of what the published code computes."""
    readout = VertexReadout(6, 4)
    tokens = torch.randn(2, 6, 4)

    every = tokens @ readout.weight.T + readout.bias

    torch.testing.assert_close(readout(tokens), torch.diagonal(every, dim1=1, dim2=2))
