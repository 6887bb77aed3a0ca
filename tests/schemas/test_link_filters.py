"""Topic filters against the MQTT specification's own examples, and against paho's matcher."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from fedge.schemas.link.filters import FilterSet, covers, is_valid_filter


@pytest.mark.parametrize(
    ("topic_filter", "topic", "covered"),
    [
        # MQTT 5, sections 4.7.1.2 and 4.7.1.3.
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        # Section 4.7.2.
        ("#", "$SYS/broker", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/broker", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ],
)
def test_the_specifications_examples_hold(topic_filter, topic, covered):
    assert covers(topic_filter, topic) is covered
    assert FilterSet([topic_filter]).covers(topic) is covered


@pytest.mark.parametrize("text", ["", "a/#/b", "sport/tennis#", "sport+", "a/+b/c", "\0"])
def test_what_the_specification_forbids_is_no_filter(text):
    assert not is_valid_filter(text)
    with pytest.raises(ValueError, match="not a topic filter"):
        FilterSet([text])


levels = st.sampled_from(["a", "b", "", "$x"])
topics = st.lists(levels, min_size=1, max_size=5).map("/".join).filter(bool)
filters = (
    st.lists(st.sampled_from(["a", "b", "", "+", "$x"]), max_size=4)
    .flatmap(lambda some: st.sampled_from([some, [*some, "#"]]))
    .map("/".join)
    .filter(is_valid_filter)
)


@given(st.lists(filters, max_size=4), topics)
def test_a_set_of_filters_covers_what_paho_says_that_one_of_them_matches(some, topic):
    assert FilterSet(some).covers(topic) is any(topic_matches_sub(each, topic) for each in some)


@given(st.lists(st.tuples(st.booleans(), filters), max_size=20))
def test_a_set_of_filters_is_a_set(changes):
    ours, reference = FilterSet(), set()
    for add, topic_filter in changes:
        (ours.add if add else ours.discard)(topic_filter)
        (reference.add if add else reference.discard)(topic_filter)
    assert set(ours) == reference
    assert len(ours) == len(reference)
