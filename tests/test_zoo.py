"""Names over torchvision's whole zoo: what torchvision gives, featx gives; what it cannot trace is refused clearly."""

from __future__ import annotations

import warnings

import pytest
import torchvision
from torchvision.models import feature_extraction as theirs

from tests import featx, nets

pytestmark = pytest.mark.zoo
ZOO = nets.zoo_names()


def test_the_zoo_is_whole() -> None:
    assert set(nets.UNTRACEABLE) <= set(ZOO)
    assert len(nets.UNTRACEABLE) == 14
    if torchvision.__version__.startswith("0.29."):
        assert len(ZOO) == 121


@pytest.mark.parametrize("name", [name for name in ZOO if name not in nets.UNTRACEABLE])
def test_names_equal_torchvisions(name: str) -> None:
    model = nets.build_on_meta(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, evaluation = theirs.get_graph_node_names(model)
    ours = featx.get_graph_node_names(model, suppress_diff_warning=True)
    assert ours.train == train
    assert ours.eval == evaluation
    assert len(evaluation) > 10


@pytest.mark.parametrize("name", sorted(nets.UNTRACEABLE))
def test_the_others_fail_for_the_same_reason(name: str) -> None:
    model = nets.build_on_meta(name)
    kind, message = nets.UNTRACEABLE[name]
    with pytest.raises(kind, match=message) as raised:
        theirs.get_graph_node_names(model)
    with pytest.raises(featx.UntraceableError, match=message) as raised_here:
        featx.get_graph_node_names(model)
    assert type(raised_here.value.__cause__) is type(raised.value)
    assert raised_here.value.path == ""
    assert raised_here.value.module_type is type(model)
