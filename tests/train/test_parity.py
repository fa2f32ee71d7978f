"""Encoders against the reference outputs of the published implementation (tests/data/parity)."""

import numpy as np
import pytest
import torch

from tests.train.parity_cases import CASES, PARITY, Case, distance

UNUSED = ("self_attn", "memory_proj", "c_attn", "v_proj", "norm1", "norm2")


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(request.param)


def test_masks_are_the_published_ones(case):
    """The ROI masks have one row per ROI in published order, the remainder last."""
    queries = case.queries()

    assert np.array_equal(queries.lh, case.arrays["expected/lh_masks"] == 1)
    assert np.array_equal(queries.rh, case.arrays["expected/rh_masks"] == 1)


def test_predictions_are_the_published_ones(case):
    """The same weights and features give the same predictions of both hemispheres, to 1e-5."""
    lh, rh = case.model()(case.features)

    assert distance(lh, case.arrays["expected/lh_pred"]) < 1e-5
    assert distance(rh, case.arrays["expected/rh_pred"]) < 1e-5


@pytest.mark.parametrize("name", [c for c in CASES if "expected/attention" in np.load(PARITY / f"{c}.npz").files])
def test_attention_is_the_published_one(name):
    """The last layer's attention, averaged over heads, is the published one to 1e-5."""
    case = Case(name)

    assert distance(case.model().attention(case.features), case.arrays["expected/attention"]) < 1e-5


def test_losses_of_three_steps_are_the_published_ones(case):
    """Three optimizer steps on the same batch follow the published losses to 1e-4: gradients are right, too."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-4)
    losses = []
    for _ in range(4):
        loss = model.loss(*model(case.features), case.tensor("lh_target"), case.tensor("rh_target"))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    assert distance(losses, case.arrays["expected/losses"]) < 1e-4


def test_state_dicts_keep_published_names_and_order(case):
    """What was loaded comes out again bit for bit under the same names; only entries that nothing uses are left out."""
    saved = case.model().state_dict()

    assert all(torch.equal(value, case.state[name]) for name, value in saved.items())
    unused = {
        name for name in case.state.keys() - saved.keys() if "self_attn" not in name and "memory_proj" not in name
    }
    assert unused <= {n for n in case.state if "c_attn" in n or "v_proj" in n or "norm1" in n or "norm2" in n}
