"""Names over torchvision's whole zoo: what torchvision gives, featx gives; what it cannot trace is refused clearly."""

from __future__ import annotations

import pytest

from tests import featx, nets
from tests.helpers import feature_extraction, ignored_warnings, node_names, parametrize, zoo
from tests.nets import build_on_meta
from tests.versions import older

theirs = feature_extraction()

pytestmark = [zoo, pytest.mark.names]
ZOO = nets.zoo_names()


def test_the_zoo_is_whole() -> None:
    video = {"swin3d_b", "swin3d_s", "swin3d_t"} if older(torchvision="0.15") else set()
    assert {*nets.UNTRACEABLE, *nets.FAMILIES} - set(ZOO) == video & set(nets.FAMILIES)
    assert len(nets.UNTRACEABLE) == 14
    if not older(torchvision="0.29.1"):
        assert len(ZOO) == 121 - len(video)


@parametrize("name", nets.traceable())
def test_names_equal_torchvisions(name: str) -> None:
    model = build_on_meta(name)
    with ignored_warnings():
        train, evaluation = theirs.get_graph_node_names(model)
    ours = node_names(model)
    assert ours.train == train
    assert ours.eval == evaluation
    assert len(evaluation) > 10


@parametrize("name", sorted(nets.UNTRACEABLE))
def test_the_others_fail_for_the_same_reason(name: str) -> None:
    model = build_on_meta(name)
    kind, message = nets.UNTRACEABLE[name]
    with pytest.raises(kind, match=message) as raised:
        theirs.get_graph_node_names(model)
    with pytest.raises(featx.UntraceableError, match="its control flow depends on its inputs") as raised_here:
        node_names(model)
    assert type(raised_here.value.__cause__) is type(raised.value)
    assert raised_here.value.path == ""
    assert raised_here.value.module_type is type(model)
